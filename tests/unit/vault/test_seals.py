"""The root key's seals, and what a process that holds keys does about its memory."""

import base64
import copy
import json
import os
import pickle
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from appliance.vault import (
    PlaintextSwap,
    RootKey,
    SealUnusable,
    WrongPassphrase,
    create_key_file_seal,
    create_passphrase_seal,
    open_with_key_file,
    open_with_passphrase,
    seal_kind,
)
from appliance.vault.process import lockable_bytes, plaintext_swap_devices, swap_warning

_CHEAP = {"memory_kib": 64, "iterations": 1}


def test_a_passphrase_opens_its_seal() -> None:
    root = RootKey.generate()
    seal = create_passphrase_seal(root, b"correct horse", **_CHEAP)
    assert seal_kind(seal) == "passphrase"
    assert open_with_passphrase(seal, b"correct horse").root_id == root.root_id


def test_another_passphrase_does_not() -> None:
    seal = create_passphrase_seal(RootKey.generate(), b"correct horse", **_CHEAP)
    with pytest.raises(WrongPassphrase) as caught:
        open_with_passphrase(seal, b"battery staple")
    assert "battery" not in str(caught.value)


def test_a_seal_of_the_default_strength_takes_the_memory_that_rfc_9106_asks_for() -> None:
    seal = json.loads(create_passphrase_seal(RootKey.generate(), b"x"))
    assert seal["kdf"]["memory_kib"] >= 64 * 1024
    assert seal["kdf"]["iterations"] >= 3


def test_a_key_file_opens_its_seal_and_is_closed_to_others(tmp_path: Path) -> None:
    root, key_file = RootKey.generate(), tmp_path / "root.key"
    seal = create_key_file_seal(root, key_file)
    assert key_file.stat().st_mode & 0o777 == 0o600
    assert open_with_key_file(seal, key_file).root_id == root.root_id


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o620, 0o700, 0o4600, 0o777])
def test_a_key_file_with_another_mode_is_refused_with_the_command_that_mends_it(tmp_path: Path, mode: int) -> None:
    key_file = tmp_path / "root.key"
    seal = create_key_file_seal(RootKey.generate(), key_file)
    key_file.chmod(mode)
    with pytest.raises(SealUnusable) as caught:
        open_with_key_file(seal, key_file)
    assert caught.value.remedy == f"chmod 600 {key_file}"


def test_a_key_file_that_its_owner_may_only_read_does(tmp_path: Path) -> None:
    key_file = tmp_path / "root.key"
    seal = create_key_file_seal(RootKey.generate(), key_file)
    key_file.chmod(0o400)
    assert open_with_key_file(seal, key_file).root_id


def test_a_key_file_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key_file = tmp_path / "root.key"
    seal = create_key_file_seal(RootKey.generate(), key_file)
    owner = os.geteuid()
    monkeypatch.setattr("os.geteuid", lambda: owner + 1)
    with pytest.raises(SealUnusable) as caught:
        open_with_key_file(seal, key_file)
    assert f"belongs to uid {owner}" in caught.value.cause


@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_key_file_of_another_size_is_refused(tmp_path: Path, size: int) -> None:
    key_file = tmp_path / "root.key"
    seal = create_key_file_seal(RootKey.generate(), key_file)
    key_file.write_bytes(bytes(size))
    with pytest.raises(SealUnusable):
        open_with_key_file(seal, key_file)


def test_a_link_or_a_pipe_is_no_key_file(tmp_path: Path) -> None:
    key_file, link, pipe = tmp_path / "root.key", tmp_path / "link", tmp_path / "pipe"
    seal = create_key_file_seal(RootKey.generate(), key_file)
    link.symlink_to(key_file)
    os.mkfifo(pipe, 0o600)
    for other in (link, pipe, tmp_path / "missing"):
        with pytest.raises(SealUnusable):
            open_with_key_file(seal, other)


def test_an_existing_key_file_is_never_overwritten(tmp_path: Path) -> None:
    key_file = tmp_path / "root.key"
    create_key_file_seal(RootKey.generate(), key_file)
    before = key_file.read_bytes()
    with pytest.raises(SealUnusable):
        create_key_file_seal(RootKey.generate(), key_file)
    assert key_file.read_bytes() == before


def test_another_seals_key_file_does_not_open_it(tmp_path: Path) -> None:
    seal = create_key_file_seal(RootKey.generate(), tmp_path / "a")
    create_key_file_seal(RootKey.generate(), tmp_path / "b")
    with pytest.raises(WrongPassphrase):
        open_with_key_file(seal, tmp_path / "b")


@pytest.mark.parametrize(
    "damage",
    [b"", b"{}", b"\xff", b"[]", b'{"format": 1}', b'{"format": "holdfast-root-seal-1", "kind": "x"}'],
)
def test_a_damaged_seal_says_so(damage: bytes) -> None:
    with pytest.raises(SealUnusable):
        open_with_passphrase(damage, b"x")


def test_a_wrapped_root_key_that_was_changed_does_not_open(tmp_path: Path) -> None:
    key_file = tmp_path / "root.key"
    seal = json.loads(create_key_file_seal(RootKey.generate(), key_file))
    wrapped = base64.b64decode(seal["wrapped"])
    for at in range(len(wrapped)):
        flipped = bytearray(wrapped)
        flipped[at] ^= 1
        seal["wrapped"] = base64.b64encode(flipped).decode()
        with pytest.raises(WrongPassphrase):
            open_with_key_file(json.dumps(seal).encode(), key_file)


def test_a_seal_that_names_another_root_key_than_it_holds_is_refused(tmp_path: Path) -> None:
    key_file = tmp_path / "root.key"
    seal = json.loads(create_key_file_seal(RootKey.generate(), key_file))
    seal["root_id"] = RootKey.generate().root_id
    with pytest.raises(SealUnusable):
        open_with_key_file(json.dumps(seal).encode(), key_file)


def test_a_seal_opens_with_its_own_kind_of_secret_only(tmp_path: Path) -> None:
    by_file = create_key_file_seal(RootKey.generate(), tmp_path / "root.key")
    by_passphrase = create_passphrase_seal(RootKey.generate(), b"x", **_CHEAP)
    with pytest.raises(SealUnusable):
        open_with_passphrase(by_file, b"x")
    with pytest.raises(SealUnusable):
        open_with_key_file(by_passphrase, tmp_path / "root.key")


@pytest.mark.parametrize(
    "damage",
    [
        {"memory_kib": 1 << 40},
        {"memory_kib": 1},
        {"memory_kib": "64"},
        {"iterations": 0},
        {"iterations": 1 << 30},
        {"iterations": 1.5},
        {"lanes": 0},
        {"lanes": 1 << 20},
        {"salt": "AAAA"},
        {"salt": 7},
        {"salt": "not base64"},
        {"name": "md5"},
    ],
)
def test_a_seal_that_asks_for_a_derivation_that_is_not_ours_is_refused_before_it_is_done(
    damage: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    seal = json.loads(create_passphrase_seal(RootKey.generate(), b"x", **_CHEAP))
    monkeypatch.setattr("subprocess.Popen", None)
    seal["kdf"] |= damage
    with pytest.raises(SealUnusable):
        open_with_passphrase(json.dumps(seal).encode(), b"x")


def test_a_stretching_process_that_fails_is_told_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    seal = create_passphrase_seal(RootKey.generate(), b"x", **_CHEAP)
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(SealUnusable, match="status 1"):
        open_with_passphrase(seal, b"x")


def test_a_root_key_has_no_text_form() -> None:
    root = RootKey(b"k" * 32)
    assert "kkkk" not in repr(root)
    assert "6b6b" not in repr(root)
    assert "kkkk" not in f"{root!s} {root} {[root]} {RootKey.__slots__}"
    for copied in (pickle.dumps, copy.copy, copy.deepcopy, json.dumps):
        with pytest.raises(TypeError):
            copied(root)


def test_the_stretching_process_shows_no_secret_in_its_arguments_or_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Looked at while it runs, once the passphrase was sent to it."""
    secret = b"a-very-secret-passphrase"
    monkeypatch.setenv("SOME_SECRET", "of-the-gateway")
    seen: dict[str, bytes] = {}

    class Watched(subprocess.Popen[bytes]):
        def communicate(self, input: bytes | None = None, timeout: float | None = None) -> tuple[bytes, bytes]:  # noqa: A002
            assert self.stdin is not None
            assert input is not None
            self.stdin.write(input)
            self.stdin.flush()  # it waits for the end of its input, which `communicate` gives
            process, deadline = Path(f"/proc/{self.pid}"), time.monotonic() + 30
            while not seen.get("cmdline") and time.monotonic() < deadline:  # empty for a moment after exec(2)
                seen["cmdline"] = process.joinpath("cmdline").read_bytes()
            try:
                seen["environ"] = process.joinpath("environ").read_bytes()
            except PermissionError:
                seen["environ"] = b""  # it forbade its cores, and with that shows nobody
            return super().communicate(None, timeout)

    monkeypatch.setattr("subprocess.Popen", Watched)
    root = RootKey(b"r" * 32)
    seal = create_passphrase_seal(root, secret, **_CHEAP)
    assert b"appliance.vault.kdf" in seen["cmdline"]
    for text in (seen["cmdline"], seen["environ"], seal):
        assert secret not in text
        assert b"rrrr" not in text
    assert b"SOME_SECRET" not in seen["environ"]


def test_the_stretching_process_leaves_no_core_and_loads_nothing_but_cryptography() -> None:
    script = (
        "import sys, resource, ctypes\n"
        "before = set(sys.modules)\n"
        "from appliance.vault import kdf\n"
        "kdf.main()\n"
        "loaded = {name.partition('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)\n"
        "limited = max(resource.getrlimit(resource.RLIMIT_CORE)) <= 1\n"
        "print(sorted(loaded), limited, ctypes.CDLL(None).prctl(3, 0, 0, 0, 0), file=sys.stderr)\n"
    )
    parameters = {"memory_kib": 64, "iterations": 1, "lanes": 1, "salt": "AAAAAAAAAAAAAAAAAAAAAA=="}
    done = subprocess.run(
        [sys.executable, "-I", "-c", script],
        input=json.dumps(parameters).encode() + b"\nsecret",
        capture_output=True,
        check=True,
        timeout=30,
    )
    assert len(done.stdout) == 32
    assert done.stderr.decode().strip() == "['_cffi_backend', '_openssl', 'appliance', 'cryptography'] True 0"


def test_a_process_that_only_forbids_its_cores_loads_the_standard_library_alone() -> None:
    script = (
        "import sys\n"
        "before = set(sys.modules)\n"
        "import appliance.vault.process\n"
        "print({name.partition('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names))\n"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=30)
    assert out.stdout.strip() == "{'appliance'}"


def test_stretching_is_done_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes 256 MiB: many at once would be the end of the machine."""
    seal = create_passphrase_seal(RootKey.generate(), b"x", **_CHEAP)
    running = most = 0

    class Counted(subprocess.Popen[bytes]):
        def communicate(self, input: bytes | None = None, timeout: float | None = None) -> tuple[bytes, bytes]:  # noqa: A002
            nonlocal running, most
            running += 1
            most = max(most, running)
            try:
                return super().communicate(input, timeout)
            finally:
                running -= 1

    monkeypatch.setattr("subprocess.Popen", Counted)
    opened: list[str] = []
    threads = [threading.Thread(target=lambda: opened.append(open_with_passphrase(seal, b"x").root_id)) for _ in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(opened) == 4
    assert most == 1


def test_a_process_that_forbids_cores_and_its_children_leave_none(tmp_path: Path) -> None:
    """The kernel says of an aborted child whether it dumped one, to a file or to a pipe."""
    script = (
        "import ctypes, os, resource, subprocess\n"
        "hard = resource.getrlimit(resource.RLIMIT_CORE)[1]\n"
        "resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))\n"
        "from appliance.vault.process import forbid_core_dumps\n"
        "forbid_core_dumps()\n"
        "child = os.posix_spawn('/bin/sh', ['sh', '-c', 'kill -ABRT $$'], {})\n"
        "_, status = os.waitpid(child, 0)\n"
        "print(os.WIFSIGNALED(status), os.WCOREDUMP(status), ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))\n"
        "print(max(resource.getrlimit(resource.RLIMIT_CORE)))\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=30
    )
    told, limit = out.stdout.splitlines()
    assert told == "True False 0"
    assert int(limit) <= 1
    assert list(tmp_path.iterdir()) == []


def test_swap_on_a_disk_is_named_and_encrypted_swap_is_not(tmp_path: Path) -> None:
    swaps, devices = tmp_path / "swaps", tmp_path / "block"
    swaps.write_text(
        "Filename Type Size Used Priority\n"
        "/dev/vdb1 partition 1 0 -2\n/dev/dm-0 partition 1 0 -2\n/dev/dm-1 partition 1 0 -2\n"
        "/dev/zram0 partition 1 0 -2\n/swapfile file 1 0 -2\n"
    )
    for name, uuid in (("dm-0", "CRYPT-LUKS2-0"), ("dm-1", "LVM-1")):
        (devices / name / "dm").mkdir(parents=True)
        (devices / name / "dm" / "uuid").write_text(uuid)
    assert plaintext_swap_devices(swaps, devices) == ["/dev/vdb1", "/dev/dm-1", "/swapfile"]


def test_swap_on_volumes_that_lie_on_encryption_altogether_is_encrypted(tmp_path: Path) -> None:
    """Debian's installer puts swap on a logical volume on LUKS, Ubuntu's in a file on one."""
    swaps, devices, numbered = tmp_path / "swaps", tmp_path / "block", tmp_path / "numbered"
    swapfile = tmp_path / "swapfile"
    swapfile.touch()
    swaps.write_text(
        "Filename Type Size Used Priority\n"
        "/dev/dm-1 partition 1 0 -2\n/dev/dm-2 partition 1 0 -2\n"
        "/dev/dm-3 partition 1 0 -2\n/dev/md0 partition 1 0 -2\n"
        f"{swapfile} file 1 0 -2\n"
    )
    below = {"dm-0": ["vda3"], "dm-1": ["dm-0"], "dm-2": ["dm-0", "vdb1"], "dm-3": ["dm-3"], "md0": ["dm-0"]}
    for name, lower in below.items():
        for device in lower:
            (devices / name / "slaves" / device).mkdir(parents=True)
    for name, uuid in (("dm-0", "CRYPT-LUKS2-0"), ("dm-1", "LVM-1"), ("dm-2", "LVM-2"), ("dm-3", "LVM-3")):
        (devices / name / "dm").mkdir()
        (devices / name / "dm" / "uuid").write_text(uuid)
    number = swapfile.stat().st_dev
    numbered.mkdir()
    backing = numbered / f"{os.major(number)}:{os.minor(number)}"
    backing.symlink_to(devices / "dm-1")
    assert plaintext_swap_devices(swaps, devices, numbered) == ["/dev/dm-2", "/dev/dm-3"]
    backing.unlink()
    assert plaintext_swap_devices(swaps, devices, numbered) == ["/dev/dm-2", "/dev/dm-3", str(swapfile)]


def test_a_mapping_that_only_checks_what_it_stores_is_not_encrypted(tmp_path: Path) -> None:
    swaps, devices = tmp_path / "swaps", tmp_path / "block"
    swaps.write_text("Filename Type Size Used Priority\n/dev/dm-0 partition 1 0 -2\n")
    (devices / "dm-0" / "dm").mkdir(parents=True)
    (devices / "dm-0" / "dm" / "uuid").write_text("CRYPT-INTEGRITY-swap")
    assert plaintext_swap_devices(swaps, devices) == ["/dev/dm-0"]


@pytest.mark.parametrize(
    ("limit", "rights", "lockable"),
    [(resource.RLIM_INFINITY, 0, None), (8 << 20, 1 << 14, None), (8 << 20, ~(1 << 14) & 0xFFFF, 8 << 20)],
)
def test_who_may_pin_memory_or_has_no_limit_locks_as_much_as_it_likes(
    limit: int, rights: int, lockable: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (0, limit))
    status = tmp_path / "status"
    status.write_text(f"Name:\tholdfast\nCapEff:\t{rights:016x}\n")
    assert lockable_bytes(status) == lockable


def test_no_swap_no_warning(tmp_path: Path) -> None:
    assert plaintext_swap_devices(tmp_path / "missing") == []
    assert swap_warning("refuse", []) is None


def test_plaintext_swap_is_a_warning_or_by_setting_a_refusal() -> None:
    warning = swap_warning("warn", ["/dev/vdb1"])
    assert warning is not None
    assert "/dev/vdb1" in warning
    with pytest.raises(PlaintextSwap, match=r"/dev/vdb1"):
        swap_warning("refuse", ["/dev/vdb1"])
