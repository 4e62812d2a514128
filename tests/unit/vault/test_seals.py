"""The root key's seals, and what a process that holds keys does about its memory."""

import json
import os
import pickle
import subprocess
import sys
import threading
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
from appliance.vault.process import plaintext_swap_devices, swap_warning

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


def test_a_key_file_that_others_can_read_is_refused_with_the_command_that_mends_it(tmp_path: Path) -> None:
    key_file = tmp_path / "root.key"
    seal = create_key_file_seal(RootKey.generate(), key_file)
    key_file.chmod(0o640)
    with pytest.raises(SealUnusable) as caught:
        open_with_key_file(seal, key_file)
    assert caught.value.remedy == f"chmod 600 {key_file}"


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


def test_every_flipped_digit_of_a_wrapped_root_key_is_found() -> None:
    seal = json.loads(create_passphrase_seal(RootKey.generate(), b"x", **_CHEAP))
    seal["wrapped"] = "A" * 8 + seal["wrapped"][8:]
    with pytest.raises(WrongPassphrase):
        open_with_passphrase(json.dumps(seal).encode(), b"x")


def test_a_seal_that_asks_for_all_the_memory_there_is_is_refused() -> None:
    seal = json.loads(create_passphrase_seal(RootKey.generate(), b"x", **_CHEAP))
    seal["kdf"]["memory_kib"] = 1 << 40
    with pytest.raises(SealUnusable):
        open_with_passphrase(json.dumps(seal).encode(), b"x")


def test_a_root_key_has_no_text_form() -> None:
    root = RootKey(b"k" * 32)
    assert "kkkk" not in repr(root)
    assert "6b6b" not in repr(root)
    with pytest.raises(TypeError):
        pickle.dumps(root)


def test_the_stretching_process_shows_no_secret_in_its_arguments_or_environment() -> None:
    """A child that waits for its input is looked at as another user would."""
    secret = b"a-very-secret-passphrase"
    child = subprocess.Popen(
        [sys.executable, "-I", "-m", "appliance.vault.kdf"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={}
    )
    try:
        assert child.stdin is not None
        parameters = {"memory_kib": 64, "iterations": 1, "lanes": 1, "salt": "AAAAAAAAAAAAAAAAAAAAAA=="}
        child.stdin.write(json.dumps(parameters).encode() + b"\n" + secret)
        child.stdin.flush()
        process = Path(f"/proc/{child.pid}")
        assert secret not in process.joinpath("cmdline").read_bytes()
        assert secret not in process.joinpath("environ").read_bytes()
        key, _ = child.communicate(timeout=30)
        assert len(key) == 32
    finally:
        child.kill()
        child.wait()


def test_stretching_is_done_one_at_a_time() -> None:
    seal = create_passphrase_seal(RootKey.generate(), b"x", **_CHEAP)
    opened: list[str] = []
    threads = [threading.Thread(target=lambda: opened.append(open_with_passphrase(seal, b"x").root_id)) for _ in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(opened) == 4


def test_a_process_that_forbids_cores_and_its_children_leave_none() -> None:
    script = (
        "import resource, subprocess, sys\n"
        "from appliance.vault.process import forbid_core_dumps\n"
        "forbid_core_dumps()\n"
        "own = resource.getrlimit(resource.RLIMIT_CORE)\n"
        "look = 'import resource; print(resource.getrlimit(resource.RLIMIT_CORE))'\n"
        "child = subprocess.run([sys.executable, '-c', look], capture_output=True, text=True).stdout.strip()\n"
        "import ctypes; print(own, child, ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))\n"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=30)
    assert out.stdout.split("\n")[0] == "(0, 0) (0, 0) 0"


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


def test_no_swap_no_warning(tmp_path: Path) -> None:
    assert plaintext_swap_devices(tmp_path / "missing") == []
    assert swap_warning("refuse", []) is None


def test_plaintext_swap_is_a_warning_or_by_setting_a_refusal() -> None:
    warning = swap_warning("warn", ["/dev/vdb1"])
    assert warning is not None
    assert "/dev/vdb1" in warning
    with pytest.raises(PlaintextSwap, match=r"/dev/vdb1"):
        swap_warning("refuse", ["/dev/vdb1"])
