"""A file that is carried elsewhere is whole under its name, or not there, wherever its writing fails."""

import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from api import carried_files
from api.carried_files import FileNotWritten, carried_file, write_carried
from api.private_files import sync_folder
from appliance.audit.witnessing import make_request
from appliance.cli import Console, holdfast
from tests.unit.audit.making import KEY, make_log


def test_a_new_file_has_what_was_written_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    write_carried(tmp_path / "proof", b"whole")
    write_carried(tmp_path / "proof", b"another")
    assert (tmp_path / "proof").read_bytes() == b"another"
    assert os.listdir(tmp_path) == ["proof"]  # noqa: PTH208


def test_what_was_written_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    synced, renamed, folder = os.fsync, Path.replace, sync_folder

    def told(step: str, does: Callable[..., Any]) -> Callable[..., Any]:
        def doing(*given: Any) -> Any:
            steps.append(step)
            return does(*given)

        return doing

    monkeypatch.setattr(os, "fsync", told("sync", synced))
    monkeypatch.setattr(Path, "replace", told("rename", renamed))
    monkeypatch.setattr(carried_files, "sync_folder", told("folder", folder))
    write_carried(tmp_path / "proof", b"whole")
    assert steps[:3] == ["sync", "rename", "folder"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("before", [None, b"what was there"])
def test_wherever_it_fails_what_was_there_before_is_there_still(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, before: bytes | None
) -> None:
    path = tmp_path / "proof"
    if before is not None:
        path.write_bytes(before)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if step == "fsync":
        monkeypatch.setattr(os, "fsync", full)
    else:
        monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(FileNotWritten) as refused:
        write_carried(path, b"half")
    assert refused.value.cause == "No space left on device"
    assert [each.read_bytes() for each in tmp_path.iterdir()] == ([] if before is None else [before])


def test_one_that_is_broken_off_leaves_nothing(tmp_path: Path) -> None:
    def pieces() -> Iterator[bytes]:
        yield b"half"
        assert not (tmp_path / "events").exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), carried_file(tmp_path / "events") as into:
        into.writelines(pieces())
    assert list(tmp_path.iterdir()) == []


def test_a_link_stays_one_and_a_pipe_is_written_to(tmp_path: Path) -> None:
    target, link, pipe = tmp_path / "target", tmp_path / "link", tmp_path / "pipe"
    target.write_bytes(b"before")
    link.symlink_to(target)
    write_carried(link, b"after")
    assert (link.is_symlink(), target.read_bytes()) == (True, b"after")
    os.mkfifo(pipe)
    read: list[bytes] = []
    reading = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reading.start()
    write_carried(pipe, b"through it")
    reading.join()
    assert (read, pipe.is_fifo()) == ([b"through it"], True)


def test_a_folder_that_cannot_be_synced_is_no_failure_and_one_that_fails_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, fails in ((errno.EINVAL, False), (errno.EIO, True)):

        def sync(_: Path, number: int = number) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(carried_files, "sync_folder", sync)
        if fails:
            with pytest.raises(FileNotWritten):
                write_carried(tmp_path / "proof", b"whole")
        else:
            write_carried(tmp_path / "proof", b"whole")


def _fails(*words: str) -> None:
    done = CliRunner().invoke(holdfast, [*words])
    assert isinstance(done.exception, SystemExit), done.output
    assert "was not written" in done.output
    assert "No space left on device" in done.output


def test_no_command_leaves_half_a_file_under_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, out = tmp_path / "log", tmp_path / "out"
    out.mkdir()
    make_log(log, 300)
    key = str(KEY.verifier())
    request = tmp_path / "request"

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    request.write_bytes(asked := make_request(log, old_size=0))
    answered = SimpleNamespace(request=asked.decode(), size=300, public_key=key)
    admin = SimpleNamespace(audit_witness_request=lambda **_: answered)
    monkeypatch.setattr(Console, "admin", lambda *_, **__: admin)
    monkeypatch.setattr(os, "fsync", full)
    proof, state = str(out / "proof"), str(tmp_path / "witness")
    _fails("audit", "prove", "7", "--log", str(log), "--output", proof)
    _fails("audit", "witness", "export", str(out / "request"))
    monkeypatch.undo()
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda *given: full() if given[1].parent == out else replace(*given))
    _fails("audit", "witness", "cosign", str(request), str(out / "reply"), "--state", state, "--key", key)
    assert list(out.iterdir()) == []
