"""A whole appliance and its witness on another node, over mutual TLS: what is co-signed, and what is found."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from api.admin import types
from benchmarks.running import make_appliance, running_gateway, running_stub
from tests.e2e.api.conftest import Served, until
from tests.e2e.api.witnesses import WitnessHost
from tests.e2e.cli.conftest import HOLDFAST
from tests.unit.audit.making import KEY


@pytest.fixture
def host(tmp_path: Path) -> WitnessHost:
    return WitnessHost.new(tmp_path / "other-node")


def holdfast(state_dir: Path, *words: str) -> Any:
    done = subprocess.run(
        [HOLDFAST, "--state-dir", str(state_dir), "--json", *words],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return json.loads(done.stdout)


def key_of(served: Served) -> str:
    """The log's public key, once its vault was open."""
    until(lambda: served.admin.audit_status().public_key is not None)
    return str(served.admin.audit_status().public_key)


def witness(served: Served) -> types.AuditWitness:
    (found,) = served.admin.audit_status().witnesses
    return found


def have_checkpoint(served: Served) -> int:
    """The size of a checkpoint that is made now."""
    return served.admin.audit_witness_request(witness=None, old_size=None).size


def audit_part(served: Served) -> types.Part:
    return next(part for part in served.admin.status().parts if part.name == "audit")


def told(served: Served, action: str) -> list[dict[str, Any]]:
    return [entry.record or {} for entry in served.admin.audit_entries(action=action, limit=20).entries]


def newly_cosigned(served: Served, least: int) -> Callable[[], bool]:
    return lambda: witness(served).size >= least and witness(served).silent_s is None


def test_the_log_is_cosigned_as_it_grows_and_found_when_it_is_put_back(tmp_path: Path, host: WitnessHost) -> None:
    state_dir, engine = tmp_path / "state", tmp_path / "engine.sock"
    api_key = make_appliance(state_dir)
    # Its key is made with its first start; the witness is given it, and it the witness's.
    with running_stub(engine), running_gateway(state_dir, engine) as gateway:
        log_key = key_of(Served(state_dir, engine, gateway, api_key))
    with host.running([log_key]) as it:
        vkey = it.vkey
    file = host.pki.folder.joinpath
    settings = {
        "url": f"https://127.0.0.1:{host.port}",
        "vkey": vkey,
        "ca": str(file("ca.pem")),
        "certificate": str(file("client.pem")),
        "private_key": str(file("client.key")),
    }
    lines = "".join(f"{name} = {json.dumps(value)}\n" for name, value in settings.items())
    with (state_dir / "holdfast.toml").open("a") as toml:
        toml.write(f"\n[audit.witness.other-node]\n{lines}")

    with running_stub(engine):
        with host.running([log_key]), running_gateway(state_dir, engine) as gateway:
            served = Served(state_dir, engine, gateway, api_key)
            for number in range(3):
                assert served.ask(f"question {number}").status == 200
                until(newly_cosigned(served, have_checkpoint(served)))
            assert audit_part(served).state == "ready"
            cosigned = witness(served)
            assert (cosigned.name, cosigned.refused, cosigned.error) == ("other-node", None, None)
            found = holdfast(state_dir, "audit", "verify", "--key", log_key, "--witness", vkey)
            assert found["witnessed"]["witness.example"]["size"] >= cosigned.size
            proof = tmp_path / "proof"
            holdfast(state_dir, "audit", "prove", "3", "--witness", vkey, "--output", str(proof))
            proved = holdfast(state_dir, "audit", "verify-proof", str(proof), "--key", log_key, "--witness", vkey)
            assert (proved["sequence"], proved["witness"]) == (3, "witness.example")
            (once,) = told(served, "audit.witnessed")
            assert once["target"] == {"id": vkey, "kind": "witness"}
            changed = [each["target"]["id"] for each in told(served, "config.changed")]
            assert "audit.witness.other-node.vkey" in changed
        # What was recorded last is co-signed before the gateway has ended.
        assert holdfast(state_dir, "audit", "verify", "--key", log_key, "--witness", vkey)["unsigned"] == 0
        shutil.copytree(state_dir / "audit", tmp_path / "older")

        with running_gateway(state_dir, engine) as gateway:  # the witness is down
            served = Served(state_dir, engine, gateway, api_key)
            until(lambda: witness(served).silent_s is not None)
            for number in range(20):
                assert served.ask(f"more {number}").status == 200
            down = have_checkpoint(served)
            assert witness(served).size < down
            assert "refused" in str(witness(served).error)
            assert "co-signed nothing for" in audit_part(served).detail
            assert (audit_part(served).state, served.admin.status().ready) == ("degraded", True)
            assert "the witness other-node is silent" in audit_part(served).troubles[0].what
            with host.running([log_key]):  # and comes back
                until(newly_cosigned(served, down))

        shutil.rmtree(state_dir / "audit")
        shutil.copytree(tmp_path / "older", state_dir / "audit")
        with host.running([log_key]) as it, running_gateway(state_dir, engine) as gateway:
            served = Served(state_dir, engine, gateway, api_key)
            until(lambda: witness(served).refused is not None)
            assert "it was cut off, or an old copy was put back" in str(witness(served).refused)
            assert audit_part(served).state == "degraded"
            assert "witness other-node REFUSES" in audit_part(served).detail
            until(lambda: bool(told(served, "witness.refused")))
            assert told(served, "witness.refused")[-1]["reason"] == "shorter"
            assert "REFUSED rollback: log=holdfast." in it.stderr.read_text()
            assert "witness other-node REFUSES" in (state_dir / "log" / "gateway.log").read_text()
            assert served.ask("it serves all the same").status == 200
            status = subprocess.run(
                [HOLDFAST, "--state-dir", str(state_dir), "audit", "status"],
                capture_output=True,
                text=True,
                timeout=60,
                check=True,
            ).stdout
            assert "other-node: REFUSES: this log has" in status


def test_a_witness_that_is_killed_before_it_answers_goes_on_with_what_it_saw(tmp_path: Path, host: WitnessHost) -> None:
    state_dir, engine = tmp_path / "state", tmp_path / "engine.sock"
    api_key = make_appliance(state_dir)
    with host.running([str(KEY.verifier())]) as it:  # for its key
        vkey = it.vkey
    file = host.pki.folder.joinpath
    environment = {
        "HOLDFAST_AUDIT__WITNESS": "{ other-node = { "
        f"url = 'https://127.0.0.1:{host.port}', vkey = '{vkey}', ca = '{file('ca.pem')}', "
        f"certificate = '{file('client.pem')}', private_key = '{file('client.key')}' }} }}"
    }
    with running_stub(engine), running_gateway(state_dir, engine, environment=environment) as gateway:
        served = Served(state_dir, engine, gateway, api_key)
        log_key = key_of(served)
        with host.running([log_key], killed=True) as it:
            have_checkpoint(served)
            until(lambda: it.process.poll() is not None)
        assert witness(served).size == 0
        with host.running([log_key]):
            until(lambda: witness(served).size > 0)
            until(newly_cosigned(served, have_checkpoint(served)))
        found = holdfast(state_dir, "audit", "verify", "--key", log_key, "--witness", vkey)
        assert found["witnessed"]["witness.example"]["size"] == witness(served).size
        assert told(served, "witness.refused") == []
