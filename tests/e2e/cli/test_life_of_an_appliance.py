"""An appliance from its making to its end, by the commands that people type."""

import http.client
import json
import os
import select
import shutil
import signal
import urllib.parse
from pathlib import Path
from typing import Any

import pytest

from api.initialise import initialise
from appliance.settings import load_settings
from appliance.store import Store
from tests.e2e.cli.conftest import PASSPHRASE, Appliance, free_port

# Each test runs a dozen commands, each a process of its own, on a machine that may be busy.
pytestmark = pytest.mark.timeout(300)

SECRET_WORDS = "the vault is behind the third painting"


def ask(endpoint: str, api_key: str, words: str = SECRET_WORDS) -> tuple[int, Any]:
    """One chat completion: the status and the answer."""
    address = urllib.parse.urlsplit(endpoint)
    connection = http.client.HTTPConnection(address.netloc, timeout=20)
    try:
        body = {"model": "stub", "messages": [{"role": "user", "content": words}], "max_tokens": 8}
        connection.request(
            "POST",
            f"{address.path}/chat/completions",
            body=json.dumps(body),
            headers={"Authorization": f"Bearer {api_key}", "Content-Type": "application/json"},
        )
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def key_of(appliance: Appliance) -> str:
    """A new client's key."""
    secret: str = appliance.json("key", "create", "--principal", "agents")["secret"]
    return secret


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def test_what_was_said_is_read_by_who_may_is_in_no_file_and_can_be_forgotten(appliance: Appliance) -> None:
    appliance.init_sealed("--grant", "transcript:read")
    endpoint = appliance.json("up", "--detach", "--passphrase-fd", "0", secret=PASSPHRASE)["endpoint"]
    appliance.ok("tenant", "create", "treasury")
    created = appliance.json("key", "create", "--tenant", "treasury", "--principal", "agents", "--label", "for tests")
    assert ask(endpoint, created["secret"])[0] == 200

    (listed,) = appliance.json("session", "list")["sessions"]
    session_id = listed["session_id"]
    assert listed["turns"] == 1
    shown = appliance.ok("session", "show", session_id)
    assert SECRET_WORDS in shown.out
    for secret in (SECRET_WORDS.encode(), created["secret"].encode(), b"treasury", b"for tests", PASSPHRASE):
        assert appliance.files_that_hold(secret) == []

    assert appliance.run("session", "forget", session_id, "--yes", "ses_another").status == 2
    assert appliance.json("session", "forget", session_id, "--yes", session_id)["session_id"] == session_id
    gone = appliance.run("session", "show", session_id, "--json")
    assert (gone.status, gone.json["code"]) == (5, "session_not_found")
    assert appliance.files_that_hold(session_id.encode()) == []
    assert appliance.json("down")["was_running"]
    assert appliance.json("down") == {"was_running": False, "pid": None}


def test_an_administrator_without_the_grant_does_not_read_and_the_client_reads_its_own(appliance: Appliance) -> None:
    appliance.init()
    endpoint = appliance.up()["endpoint"]
    mine, other = key_of(appliance), appliance.json("key", "create", "--principal", "others")["secret"]
    assert ask(endpoint, mine)[0] == 200
    session_id = appliance.json("session", "list")["sessions"][0]["session_id"]
    denied = appliance.run("session", "show", session_id, "--json")
    assert (denied.status, denied.json["code"]) == (4, "transcript_forbidden")
    assert SECRET_WORDS not in denied.out + denied.err
    own = appliance.run("session", "show", session_id, "--api-key-fd", "0", secret=mine.encode())
    assert SECRET_WORDS in own.out
    unseen = appliance.run("session", "show", session_id, "--json", "--api-key-fd", "0", secret=other.encode())
    unknown = appliance.run("session", "show", "ses_0", "--json", "--api-key-fd", "0", secret=other.encode())
    assert unseen.json == {**unknown.json, "message": unseen.json["message"]}
    refused = appliance.run("session", "list", "--json", "--api-key-fd", "0", secret=b"hf_wrong")
    assert (refused.status, refused.json["code"]) == (3, "invalid_api_key")


def test_each_role_of_the_appliance_does_with_its_key_what_it_is_for(appliance: Appliance) -> None:
    appliance.init()
    appliance.up()

    def made(role: str) -> bytes:
        created = appliance.json("key", "create", "--appliance", "--role", role, "--principal", f"the {role}")
        assert (created["key"]["role"], created["key"]["tenant_id"]) == (role, None)
        secret: str = created["secret"]
        return secret.encode()

    keys = {role: made(role) for role in ("admin", "operator", "auditor")}

    def status_of(role: str, *words: str) -> int:
        return appliance.run(*words, "--json", "--api-key-fd", "0", secret=keys[role]).status

    for role in keys:
        for words in (("status",), ("kv", "status"), ("audit", "status"), ("tenant", "list"), ("key", "list")):
            assert status_of(role, *words) == 0, (role, words)
    assert {role: status_of(role, "audit", "tail") for role in keys} == {"admin": 0, "operator": 4, "auditor": 0}
    assert {role: status_of(role, "tenant", "create", f"of the {role}") for role in keys} == {
        "admin": 0,
        "operator": 4,
        "auditor": 4,
    }
    another = ("key", "create", "--appliance", "--role", "auditor", "--principal", "another")
    assert [status_of(role, *another) for role in keys] == [0, 4, 4]
    backup = appliance.state_dir.with_name("saved.tar")
    assert [status_of(role, "backup", str(backup)) for role in ("auditor", "operator", "admin")] == [4, 4, 0]
    assert [status_of(role, "seal") for role in ("auditor", "operator")] == [4, 0]
    told = appliance.run("unseal", "--api-key-fd", "0", secret=keys["admin"])
    assert told.status == 8
    assert "without an API key" in told.err
    appliance.ok("unseal")

    listed = appliance.ok("key", "list").out.splitlines()
    assert [line.split()[3:5] for line in listed[1:4]] == [[role, "(appliance)"] for role in keys]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--appliance",), "a client is always a tenant's"),
        (("--appliance", "--role", "admin", "--tenant", "default"), "--tenant TENANT or --appliance"),
        (("--appliance", "--role", "admin", "--tokens-per-day", "5"), "asks for no turns"),
        (("--appliance", "--role", "admin", "--model", "m"), "asks for no turns"),
    ],
)
def test_a_key_of_the_appliance_is_asked_for_without_contradiction(
    appliance: Appliance, words: tuple[str, ...], said: str
) -> None:
    refused = appliance.run("key", "create", "--principal", "somebody", *words, "--json")
    assert (refused.status, refused.json["code"]) == (2, "usage")
    assert said in refused.json["cause"]


def test_a_principal_that_is_there_keeps_its_role_and_another_is_a_conflict(appliance: Appliance) -> None:
    appliance.init()
    appliance.up()
    key_of(appliance)
    refused = appliance.run("key", "create", "--principal", "agents", "--role", "admin", "--json")
    assert (refused.status, refused.json["code"]) == (6, "role_differs")
    (listed,) = appliance.json("key", "list")["keys"]
    assert listed["role"] == "client"


def test_a_revoked_key_is_refused_at_the_very_next_request(appliance: Appliance) -> None:
    appliance.init()
    endpoint = appliance.up()["endpoint"]
    created = appliance.json("key", "create", "--principal", "agents")
    assert ask(endpoint, created["secret"])[0] == 200
    appliance.ok("key", "revoke", created["key"]["key_id"])
    assert ask(endpoint, created["secret"])[0] == 401
    (listed,) = appliance.json("key", "list")["keys"]
    assert listed["revoked_at"] is not None
    assert created["secret"] not in appliance.ok("key", "list").out


def test_sealed_it_answers_503_and_unsealed_it_serves(appliance: Appliance) -> None:
    appliance.init_sealed()
    said = appliance.ok("up", "--detach", "--json")
    assert "root.key" not in said.err
    started = said.json
    assert (started["sealed"], started["ready"]) == (True, False)
    assert ask(started["endpoint"], "hf_any")[0] == 503
    assert appliance.run("tenant", "list", "--json").json["code"] == "vault_sealed"
    status = appliance.run("status", "--json")
    assert (status.status, status.json["ready"]) == (8, False)

    wrong = appliance.run("unseal", "--json", "--passphrase-fd", "0", secret=b"not the passphrase")
    assert (wrong.status, wrong.json["code"]) == (4, "wrong_passphrase")
    assert ask(started["endpoint"], "hf_any")[0] == 503

    assert appliance.json("unseal", "--passphrase-fd", "0", secret=PASSPHRASE) == {"sealed": False, "changed": True}
    key = key_of(appliance)
    assert ask(started["endpoint"], key)[0] == 200
    assert appliance.ok("status").out.startswith("Holdfast 0.1.0 is ready.")

    assert appliance.json("seal")["changed"]
    status_code, answer = ask(started["endpoint"], key)
    assert (status_code, answer["error"]["code"]) == (503, "vault_sealed")


def test_up_with_a_wrong_passphrase_leaves_nothing_running(appliance: Appliance) -> None:
    appliance.init_sealed()
    outcome = appliance.run("up", "--detach", "--json", "--passphrase-fd", "0", secret=b"not the passphrase")
    assert (outcome.status, outcome.json["code"]) == (4, "wrong_passphrase")
    assert appliance.run("status", "--json").json["code"] == "appliance_down"


def test_a_second_up_names_the_first(appliance: Appliance) -> None:
    appliance.init()
    pid = appliance.up()["pid"]
    second = appliance.run("up", "--json")
    assert (second.status, second.json["code"]) == (6, "already_running")
    assert f"process {pid}" in second.json["message"]
    assert "holdfast down" in second.json["remedy"]


def test_of_two_ups_at_once_one_serves_and_the_other_names_it(appliance: Appliance) -> None:
    appliance.init()
    both = [appliance.start("up", "--detach", "--json") for _ in range(2)]
    said = [(process.communicate(timeout=60)[0], process.returncode) for process in both]
    served = [json.loads(out) for out, status in said if status == 0]
    refused = [json.loads(out) for out, status in said if status != 0]
    assert len(served) == 1
    assert [error["code"] for error in refused] == ["already_running"]
    assert f"process {served[0]['pid']}" in refused[0]["message"]


def test_ctrl_c_stops_what_up_started_and_leaves_with_0(appliance: Appliance) -> None:
    appliance.init()
    up = appliance.start("up", "--json")
    assert up.stdout is not None
    said = json.loads("".join(iter(up.stdout.readline, "}\n")) + "}")
    assert is_alive(said["pid"])
    up.send_signal(signal.SIGINT)
    _, err = up.communicate(timeout=30)
    assert up.returncode == 0, err
    assert "Stopped." in err
    assert not is_alive(said["pid"])


def test_a_gateway_in_the_foreground_does_not_outlive_the_command_that_was_killed(appliance: Appliance) -> None:
    appliance.init()
    up = appliance.start("up", "--json")
    assert up.stdout is not None
    pid = json.loads("".join(iter(up.stdout.readline, "}\n")) + "}")["pid"]
    gateway = os.pidfd_open(pid)
    up.kill()
    up.communicate()
    ended, _, _ = select.select([gateway], [], [], 30)
    os.close(gateway)
    assert ended


def test_who_is_no_administrator_of_it_starts_an_appliance_all_the_same(
    appliance: Appliance, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(os, "getuid", lambda: 4711)
        settings = load_settings({"vault": {"seal": "key-file"}}, environment={}, state_dir=appliance.state_dir)
        initialise(settings, passphrase=None, tenant_name="default")
    said = appliance.up()
    assert (said["ready"], said["endpoint"]) == (True, None)
    assert is_alive(said["pid"])
    assert appliance.run("status", "--json").json["code"] == "not_an_administrator"


def test_without_an_engine_up_says_what_it_waited_for_and_stops(appliance: Appliance) -> None:
    appliance.init()
    appliance.engine_socket = appliance.state_dir.parent / "no-engine.sock"
    outcome = appliance.run("up", "--detach", "--json", "--timeout", "1")
    assert (outcome.status, outcome.json["code"]) == (8, "not_ready_in_time")
    assert "engine" in outcome.json["cause"]
    assert appliance.run("status", "--json").json["code"] == "appliance_down"


def test_a_gateway_that_cannot_start_is_told_in_its_own_words(appliance: Appliance, listening_port: int) -> None:
    appliance.init()
    appliance.port = listening_port
    outcome = appliance.run("up", "--detach", "--json")
    assert (outcome.status, outcome.json["code"]) == (9, "cannot_listen")
    assert str(listening_port) in outcome.json["message"]


def test_a_home_so_deep_that_no_socket_name_holds_it(appliance: Appliance) -> None:
    appliance.state_dir = appliance.state_dir.parent.joinpath(*["so deep a home"] * 10) / "state"
    assert len(os.fsencode(appliance.state_dir / "run" / "admin.sock")) > 108
    appliance.init()
    endpoint = appliance.up()["endpoint"]
    assert ask(endpoint, key_of(appliance))[0] == 200
    assert appliance.json("down")["was_running"]


def test_a_database_on_a_machine_with_another_root_key_is_refused(appliance: Appliance, tmp_path: Path) -> None:
    appliance.init()
    thief = Appliance(tmp_path / "thief", free_port(), appliance.engine_socket)
    thief.init()
    shutil.copy(appliance.state_dir / "holdfast.db", thief.state_dir / "holdfast.db")
    outcome = thief.run("up", "--detach", "--json")
    assert (outcome.status, outcome.json["code"]) == (6, "foreign_root_key")
    assert thief.run("status", "--json").json["code"] == "appliance_down"


@pytest.mark.parametrize("seal", ["key-file", "passphrase"])
def test_a_database_that_is_gone_is_named_and_none_is_made_in_its_place(appliance: Appliance, seal: str) -> None:
    if seal == "key-file":
        appliance.init()
    else:
        appliance.init_sealed()
    database = appliance.state_dir / "holdfast.db"
    database.unlink()
    for there in (None, b""):
        if there is not None:
            database.write_bytes(there)
        outcome = appliance.run("up", "--detach", "--json")
        assert (outcome.status, outcome.json["code"]) == (6, "store_empty")
        assert str(database) in outcome.json["cause"]
        assert "holdfast restore" in outcome.json["remedy"]
        assert database.exists() == (there is not None)
    assert database.stat().st_size == 0


@pytest.mark.parametrize("seal", ["key-file", "passphrase"])
def test_a_database_without_keys_is_named(appliance: Appliance, seal: str) -> None:
    if seal == "key-file":
        appliance.init()
    else:
        appliance.init_sealed()
    database = appliance.state_dir / "holdfast.db"
    database.unlink()
    Store.open(f"sqlite:///{database}").close()
    outcome = appliance.run("up", "--detach", "--json")
    assert (outcome.status, outcome.json["code"]) == (6, "store_empty")
    assert "no keys" in outcome.json["cause"]


def test_a_backup_brings_back_what_was_there_when_it_was_made(appliance: Appliance, tmp_path: Path) -> None:
    appliance.init("--grant", "transcript:read")
    endpoint = appliance.up()["endpoint"]
    key = key_of(appliance)
    assert ask(endpoint, key)[0] == 200
    file = tmp_path / "appliance.tar"
    assert appliance.json("backup", str(file))["file"] == str(file)
    assert file.stat().st_mode & 0o777 == 0o600
    assert SECRET_WORDS.encode() not in file.read_bytes()
    assert appliance.run("backup", str(file), "--json").json["code"] == "file_in_the_way"

    session_id = appliance.json("session", "list")["sessions"][0]["session_id"]
    appliance.ok("session", "forget", session_id, "--yes", session_id)
    assert appliance.run("restore", str(file), "--replace", "state", "--json").json["code"] == "already_running"
    appliance.ok("down")
    assert appliance.run("restore", str(file), "--json").json["code"] == "restore_would_replace"
    assert appliance.run("restore", str(file), "--replace", "other", "--json").json["code"] == "not_confirmed"
    kept = Path(appliance.json("restore", str(file), "--replace", "state")["kept"])
    assert (kept / "holdfast.db").exists()
    endpoint = appliance.up()["endpoint"]
    assert SECRET_WORDS in appliance.ok("session", "show", session_id).out
    assert ask(endpoint, key)[0] == 200


def test_the_demonstration_needs_nothing_and_has_the_same_key_every_time(appliance: Appliance) -> None:
    key_file = f"For demonstrations only: whoever can read {appliance.state_dir / 'root.key'} can read everything.\n"
    started = appliance.ok("up", "--demo", "--detach", "--json")
    assert started.err.count(key_file) == 1
    first = started.json
    assert first["api_key"].startswith("hf_")
    assert ask(first["endpoint"], first["api_key"])[0] == 200
    (session,) = appliance.json("session", "list")["sessions"]
    assert SECRET_WORDS in appliance.ok("session", "show", session["session_id"]).out
    appliance.ok("down")
    started = appliance.ok("up", "--demo", "--detach", "--json")
    assert started.err.count(key_file) == 1, "it is said at every start"
    again = started.json
    assert again["api_key"] == first["api_key"]
    assert ask(again["endpoint"], again["api_key"])[0] == 200
    assert len(appliance.json("session", "list")["sessions"]) == 2


def test_a_real_appliance_is_not_shown_as_a_demonstration(appliance: Appliance) -> None:
    appliance.init()
    outcome = appliance.run("up", "--demo", "--json")
    assert (outcome.status, outcome.json["code"]) == (6, "not_a_demonstration")


def test_logs_tell_what_the_gateway_did_and_nothing_that_was_said(appliance: Appliance) -> None:
    appliance.init()
    endpoint = appliance.up()["endpoint"]
    key = key_of(appliance)
    ask(endpoint, key)
    assert appliance.run("logs", "gateway").status == 0
    for secret in (SECRET_WORDS.encode(), key.encode(), PASSPHRASE):
        assert appliance.files_that_hold(secret) == []


def test_commands_without_an_appliance_say_so(appliance: Appliance) -> None:
    assert appliance.run("up", "--json").json["code"] == "not_initialised"
    for words in (("status",), ("tenant", "list"), ("session", "list"), ("seal",)):
        outcome = appliance.run(*words, "--json")
        assert (outcome.status, outcome.json["code"]) == (8, "appliance_down"), words
