"""A log that is written while it is verified holds, at any moment; what somebody changes in it is found as ever."""

import asyncio
import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from appliance.audit import verify
from appliance.audit.files import read_file
from appliance.audit.launch import Launcher
from appliance.audit.log import CHECKPOINT, JOURNAL, WITNESSED, AuditLog
from appliance.audit.notes import Algorithm, SigningKey, cosign
from appliance.audit.recorder import Recorder
from appliance.audit.verify import LogTampered, Verified, verify_log
from tests.unit.audit.making import KEY, Keys, drafts, event, open_log, sign

VERIFIER = KEY.verifier()


def _verify_meanwhile(directory: Path, act: Callable[[], None], *, after: int = 256) -> Verified:
    """Verify, and have something done once, when so many entries are checked."""
    done = False

    def progress(checked: int, _of: int) -> None:
        nonlocal done
        if checked >= after and not done:
            done = True
            act()

    found = verify_log(directory, VERIFIER, progress=progress)
    assert done
    return found


def _grow(log: AuditLog, size: int, *, publications: int = 1) -> None:
    step = -(-(size - log.size) // publications)
    while log.size < size:
        log.append(drafts(range(log.size, min(size, log.size + step))))
        log.publish(sign)


async def _verify_under_load(directory: Path, verifications: int) -> list[int]:
    run_dir = directory / "run"
    run_dir.mkdir(mode=0o700)
    log, launcher = directory / "audit", Launcher(directory / "audit", run_dir)
    recorder = Recorder(Keys, system_scope="system", versions={"holdfast": "0"})
    running = asyncio.create_task(recorder.run(launcher.connect))
    sizes: list[int] = []
    over = asyncio.Event()

    async def write() -> None:
        while not over.is_set():
            await recorder.record(event(1), event(2), event(3))

    async def publish() -> None:
        while not over.is_set():
            await recorder.checkpoint()

    async def verify() -> None:
        try:
            while len(sizes) < verifications:
                sizes.append((await asyncio.to_thread(verify_log, log, VERIFIER)).size)
        finally:
            over.set()

    try:
        await recorder.sign_with(KEY.to_bytes())
        await recorder.record(event(0))
        await recorder.checkpoint()
        async with asyncio.TaskGroup() as group:
            for each in (verify, publish, *[write] * 32):
                group.create_task(each())
    finally:
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running
        await launcher.stop()
    return sizes


@pytest.mark.timeout(120)
def test_a_log_to_which_a_real_appender_appends_at_full_speed_holds(tmp_path: Path) -> None:
    sizes = asyncio.run(_verify_under_load(tmp_path, 40))
    assert sizes == sorted(sizes)
    assert sizes[-1] > sizes[0] + 1000


@pytest.mark.parametrize("size", [601, 700, 768, 1024, 6000])
def test_parts_that_wider_ones_replaced_hold(tmp_path: Path, size: int) -> None:
    log = open_log(tmp_path)
    _grow(log, 600)
    found = _verify_meanwhile(tmp_path, lambda: _grow(log, size, publications=3))
    assert (found.size, found.unsigned) == (600, 0)
    log.close()


def test_a_log_is_whole_at_every_step_of_a_publication(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = open_log(tmp_path)
    _grow(log, 600)
    sizes: set[int] = set()

    def looked_at(real: Callable[..., object]) -> Callable[..., object]:
        def step(*arguments: object, **named: object) -> object:
            with monkeypatch.context() as unpatched:
                for name, original in reals.items():
                    unpatched.setattr(f"os.{name}", original)
                sizes.add(verify_log(tmp_path, VERIFIER).size)
            return real(*arguments, **named)

        return step

    reals = {name: getattr(os, name) for name in ("open", "pwrite", "fsync", "replace", "unlink", "rmdir")}
    with monkeypatch.context() as patched:
        for name, real in reals.items():
            patched.setattr(os, name, looked_at(real))
        _grow(log, 1100, publications=4)
        log.publish(sign)
    assert sizes == {600, 725, 850, 975, 1100}
    log.close()


def test_a_part_that_is_missing_without_a_newer_checkpoint_is_found(tmp_path: Path) -> None:
    """Something wider is there, but nobody signed it."""
    log = open_log(tmp_path)
    _grow(log, 600)
    log.append(drafts(range(600, 700)))
    publication = log.prepare()
    log.close()
    for name, content in publication.parts.items():
        (tmp_path / name).write_bytes(content)
    assert verify_log(tmp_path, VERIFIER).size == 600
    (tmp_path / "tile/entries/002.p/88").unlink()
    with pytest.raises(LogTampered, match="entry 512 is missing"):
        verify_log(tmp_path, VERIFIER)


@pytest.mark.parametrize("name", ["tile/entries/001", "record/001", "tile/0/001"])
@pytest.mark.parametrize("change", ["remove", "flip"])
def test_what_is_changed_while_the_log_grows_is_found(tmp_path: Path, name: str, change: str) -> None:
    log = open_log(tmp_path)
    _grow(log, 600)

    def tamper() -> None:
        _grow(log, 6000, publications=3)
        if change == "remove":
            (tmp_path / name).unlink()
        else:
            content = bytearray((tmp_path / name).read_bytes())
            content[40] ^= 1
            (tmp_path / name).write_bytes(content)

    with pytest.raises(LogTampered) as found:
        _verify_meanwhile(tmp_path, tamper)
    assert found.value.sequence in (256, 257)
    log.close()


def test_a_journal_that_is_begun_anew_behind_the_checkpoint_that_was_read_is_no_tampering(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = open_log(tmp_path)
    _grow(log, 600)

    def read(path: Path) -> bytes:
        content = read_file(path)
        if path.name == CHECKPOINT and log.size == 600:
            _grow(log, 6000)
        return content

    monkeypatch.setattr(verify, "read_file", read)
    assert verify_log(tmp_path, VERIFIER).size == 6000
    log.close()


def test_an_append_that_is_being_written_is_waited_for(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    _grow(log, 600)
    whole = log._journal.length
    log.append(drafts(range(600, 620)))
    middle, end = whole + 150, log._journal.length
    content = (tmp_path / JOURNAL).read_bytes()
    (tmp_path / JOURNAL).write_bytes(content[:middle] + bytes(len(content) - middle))
    waits = 0

    def pause() -> None:
        nonlocal waits
        waits += 1
        if waits == 3:
            (tmp_path / JOURNAL).write_bytes(content[: end + 40] + b"next" + content[end + 44 :])

    assert verify_log(tmp_path, VERIFIER, pause=pause).unsigned == 20
    assert waits == 3
    log.close()


def test_an_append_that_never_becomes_whole_is_found(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    _grow(log, 600)
    begin = log._journal.length
    log.append(drafts(range(600, 620)))
    content = bytearray((tmp_path / JOURNAL).read_bytes())
    content[begin + 50] ^= 1
    (tmp_path / JOURNAL).write_bytes(content)
    waits = []
    with pytest.raises(LogTampered, match="journal is damaged at entry 600"):
        verify_log(tmp_path, VERIFIER, pause=lambda: waits.append(1))
    assert 1 < len(waits) < 100
    log.close()


def test_a_witness_that_comes_while_the_checkpoint_moves_on_is_no_tampering(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = open_log(tmp_path)
    _grow(log, 600)
    witness = SigningKey("witness.example", b"w" * 32, Algorithm.COSIGNATURE)
    folder = tmp_path / WITNESSED
    folder.mkdir()
    (folder / ".600.new").write_text("half of a checkpoint")
    real = Path.iterdir

    def listed(path: Path) -> object:
        if path == folder:
            _grow(log, 700)
            note = (tmp_path / CHECKPOINT).read_text()
            (folder / "700").write_text(note + cosign(note, witness, 5))
        return real(path)

    monkeypatch.setattr(Path, "iterdir", listed)
    found = verify_log(tmp_path, VERIFIER, witnesses=[witness.verifier()])
    assert found.witnessed == {"witness.example": (700, 5)}
    log.close()
