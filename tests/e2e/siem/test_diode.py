"""Files for a data diode: what appears is whole and signed; what was changed, left out or brought again is found."""

import asyncio
import contextlib
import errno
import fcntl
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, NoEncryption, PrivateFormat

from appliance.audit.notes import NoteInvalid, SigningKey, VerifierKey, sign_note
from appliance.audit.siem.batches import BatchInvalid, Manifest, Taken, verify_batches
from appliance.audit.siem.diode import DiodeFiles, Limits
from appliance.audit.siem.leef import Leef
from appliance.audit.siem.shipper import try_out
from appliance.audit.siem.transport import ExportUnreachable, ExportUnusable
from appliance.cli import holdfast
from tests.e2e.siem.shipping import Shipped, messages, until
from tests.unit.audit.making import KEY, ORIGIN

pytestmark = pytest.mark.anyio
QUICK = Limits(max_events=100, max_age_s=0.05, first_age_s=0.05)
SLOW = Limits(max_events=100, max_age_s=60.0, first_age_s=60.0)


def key_file(folder: Path) -> Path:
    path = folder / "diode.key"
    if not path.exists():
        pem = Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        path.write_bytes(pem)
        path.chmod(0o600)
    return path


def transport(folder: Path, limits: Limits = QUICK) -> DiodeFiles:
    (folder / "out").mkdir(exist_ok=True)
    return DiodeFiles(folder / "out", key_file(folder), name="diode.vault", limits=limits)


def public_key(folder: Path) -> VerifierKey:
    return VerifierKey.parse((folder / "out" / "batches.vkey").read_text().strip())


def visible(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "out").iterdir() if path.name.startswith("batch-"))


async def batches_of(folder: Path, count: int) -> list[Path]:
    """Some batches of 100 events in `out`."""
    connection = await transport(folder, SLOW).connect()
    for first in range(0, 100 * count, 100):
        await connection.send(messages(100, first))
    assert connection.acknowledged == 100 * count
    await connection.close()
    return [path for path in visible(folder) if path.suffix == ".log"]


async def test_what_is_in_the_folder_is_the_log(tmp_path: Path) -> None:
    shipped = Shipped(tmp_path, transport(tmp_path), form=Leef())
    await shipped.until_delivered()
    found = verify_batches(tmp_path / "out", public_key(tmp_path))
    assert shipped.check(list(found.lines())).repeated == 0
    [(first, last)] = found.numbers.values()
    assert (first, last) == (1, len(found.paths))
    assert len(found.paths) >= 3  # 256 events at once, and the checkpoint
    assert not [path for path in (tmp_path / "out").iterdir() if path.suffix in (".new", ".ready")]


async def test_a_folder_is_verified_by_the_command(tmp_path: Path) -> None:
    await Shipped(tmp_path, transport(tmp_path), form=Leef()).until_delivered()
    command = ["audit", "verify-export", str(tmp_path / "out"), "--key", str(KEY.verifier())]
    outcome = CliRunner().invoke(holdfast, [*command, "--batch-key", str(public_key(tmp_path))])
    assert outcome.exit_code == 0, outcome.output
    assert "entries 0 to 599 are proved" in outcome.output
    known = [*command, "--known", str(tmp_path / "known")]
    assert CliRunner().invoke(holdfast, known).exit_code == 0
    outcome = CliRunner().invoke(holdfast, known)  # the same batches once more
    assert (outcome.exit_code, "brought again" in outcome.output) == (6, True)
    _altered([path for path in visible(tmp_path) if path.suffix == ".log"])
    outcome = CliRunner().invoke(holdfast, command)
    assert outcome.exit_code != 0
    assert "000000000002.log does not hold" in outcome.output


async def test_a_batch_is_closed_by_its_age_and_counts_from_then(tmp_path: Path) -> None:
    connection = await transport(tmp_path).connect()
    await connection.send(messages(3))
    assert (connection.acknowledged, visible(tmp_path)) == (0, [])
    await until(lambda: connection.acknowledged == 3)
    assert [path.suffix for path in visible(tmp_path)] == [".log", ".manifest"]
    await connection.send(messages(3, 3))
    await until(lambda: connection.acknowledged == 6)
    await connection.close()
    assert list(verify_batches(tmp_path / "out", public_key(tmp_path)).lines())[5] == '{"number":5}'


async def test_a_batch_is_closed_by_its_size(tmp_path: Path) -> None:
    connection = await transport(tmp_path, Limits(max_bytes=100, max_age_s=60, first_age_s=60)).connect()
    await connection.send(messages(4))
    assert connection.acknowledged == 0
    await connection.send(messages(4, 4))
    assert connection.acknowledged == 8
    await connection.close()


async def test_the_folders_group_can_read_batches_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        await batches_of(tmp_path, 1)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in visible(tmp_path)} == {0o640}
    assert (tmp_path / "out" / "batches.vkey").stat().st_mode & 0o777 == 0o640


async def test_what_is_open_is_kept_in_good_order_and_else_dropped(tmp_path: Path) -> None:
    for in_good_order in (False, True):
        connection = await transport(tmp_path, SLOW).connect()
        await connection.send(messages(3))
        await connection.close(in_good_order=in_good_order)
        assert bool(visible(tmp_path)) == in_good_order
    assert not list((tmp_path / "out").glob(".*.new"))


async def test_a_destination_is_tried_beside_the_export(tmp_path: Path) -> None:
    connection = await transport(tmp_path, SLOW).connect()
    await connection.send(messages(3))
    await try_out(Leef(), transport(tmp_path), origin=ORIGIN, wall_ms=1)
    await connection.close(in_good_order=True)
    found = verify_batches(tmp_path / "out", public_key(tmp_path))
    assert list(found.numbers.values()) == [(1, 2)]
    assert "audit.export.test" in next(found.lines())


def _altered(paths: list[Path]) -> None:
    content = bytearray(paths[1].read_bytes())
    content[500] ^= 1
    paths[1].write_bytes(content)


def _cut(paths: list[Path]) -> None:
    os.truncate(paths[1], 500)


def _missing(paths: list[Path]) -> None:
    paths[1].unlink()


def _missing_with_its_manifest(paths: list[Path]) -> None:
    paths[1].unlink()
    paths[1].with_suffix(".manifest").unlink()


def _without_its_manifest(paths: list[Path]) -> None:
    paths[1].with_suffix(".manifest").unlink()


def _exchanged(paths: list[Path]) -> None:
    shutil.copy(paths[0], paths[1])
    shutil.copy(paths[0].with_suffix(".manifest"), paths[1].with_suffix(".manifest"))


def _renamed(paths: list[Path]) -> None:
    for suffix in (".log", ".manifest"):
        path = paths[-1].with_suffix(suffix)
        path.rename(path.with_name(path.name.replace("000000000004", "000000000005")))


def _forged(paths: list[Path]) -> None:
    text = paths[1].with_suffix(".manifest").read_text().partition("\n\n")[0] + "\n"
    forger = SigningKey("diode.vault", b"f" * 32)
    paths[1].with_suffix(".manifest").write_text(sign_note(text, forger))


def _signature_of_another(paths: list[Path]) -> None:
    one, other = (path.with_suffix(".manifest").read_text() for path in paths[1:3])
    paths[1].with_suffix(".manifest").write_text(one.partition("\n\n")[0] + "\n\n" + other.partition("\n\n")[2])


def _fifo(paths: list[Path]) -> None:
    paths[1].unlink()
    os.mkfifo(paths[1])


def _garbage(paths: list[Path]) -> None:
    paths[1].with_suffix(".manifest").write_bytes(b"\xff\0" * 1000)


@pytest.mark.parametrize(
    ("attack", "told"),
    [
        (_altered, r"batch-\w+-000000000002\.log does not hold"),
        (_cut, r"batch-\w+-000000000002\.log does not hold"),
        (_missing, r"batch-\w+-000000000002\.log does not hold: No such file"),
        (_missing_with_its_manifest, r"batch-\w+-000000000002 does not hold: it is missing"),
        (_without_its_manifest, r"batch-\w+-000000000002\.manifest does not hold: No such file"),
        (_exchanged, r"batch-\w+-000000000002\.manifest does not hold: it is the manifest of batch-\w+-000000000001"),
        (_renamed, r"000000000005\.manifest does not hold: it is the manifest of batch-\w+-000000000004"),
        (_forged, r"000000000002\.manifest does not hold: diode\.vault did not sign it"),
        (_signature_of_another, r"000000000002\.manifest does not hold: the signature of diode\.vault does not belong"),
        (_fifo, r"batch-\w+-000000000002\.log does not hold: it is no file"),
        (_garbage, r"000000000002\.manifest does not hold: it is not UTF-8"),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)
async def test_what_was_done_to_a_batch_is_found(
    attack: Callable[[list[Path]], None], told: str, tmp_path: Path
) -> None:
    paths = await batches_of(tmp_path, 4)
    key = public_key(tmp_path)
    assert len(list(verify_batches(tmp_path / "out", key).lines())) == 400
    attack(paths)
    with pytest.raises(BatchInvalid, match=told):
        verify_batches(tmp_path / "out", key)


async def test_a_batch_that_is_brought_again_is_found(tmp_path: Path) -> None:
    paths = await batches_of(tmp_path, 4)
    key = public_key(tmp_path)
    found = verify_batches(tmp_path / "out", key)
    [(series, last)] = found.taken.items()
    assert found.numbers == {series: (1, last.number)} == {series: (1, 4)}
    second = Manifest.parse(paths[1].with_suffix(".manifest").read_text().partition("\n\n")[0] + "\n")
    known = {series: Taken(2, second.digest)}
    with pytest.raises(BatchInvalid, match="brought again"):
        verify_batches(tmp_path / "out", key, known=found.taken)
    for path in paths[:2]:
        path.unlink()
        path.with_suffix(".manifest").unlink()
    assert verify_batches(tmp_path / "out", key, known=known).numbers == {series: (3, 4)}
    with pytest.raises(BatchInvalid, match="000000000002 does not hold: it is missing"):
        verify_batches(tmp_path / "out", key, known={series: Taken(1, second.previous)})
    with pytest.raises(BatchInvalid, match="000000000003 does not hold: it does not follow from the batch before it"):
        verify_batches(tmp_path / "out", key, known={series: Taken(2, last.digest)})
    with pytest.raises(BatchInvalid, match="there is no batch"):
        verify_batches(tmp_path, key)


async def test_a_batch_of_a_fork_is_found(tmp_path: Path) -> None:
    """A copy of the sender's state goes on elsewhere: its batch has the right number, and is signed."""
    await batches_of(tmp_path, 1)
    (tmp_path / "fork").mkdir()
    shutil.copytree(tmp_path / "out", tmp_path / "fork" / "out")
    shutil.copy(key_file(tmp_path), tmp_path / "fork" / "diode.key")
    connection = await transport(tmp_path / "fork", SLOW).connect()
    await connection.send(messages(100, 7000))
    await connection.close()
    paths = await batches_of(tmp_path, 2)
    for suffix in (".log", ".manifest"):
        path = paths[1].with_suffix(suffix)
        shutil.copy(tmp_path / "fork" / "out" / path.name, path)
    with pytest.raises(BatchInvalid, match="000000000003 does not hold: it does not follow from the batch before it"):
        verify_batches(tmp_path / "out", public_key(tmp_path))


async def test_another_series_begins_when_the_state_is_lost_and_is_named(tmp_path: Path) -> None:
    await batches_of(tmp_path, 2)
    (tmp_path / "out" / ".state").unlink()
    await batches_of(tmp_path, 1)
    found = verify_batches(tmp_path / "out", public_key(tmp_path))
    assert sorted(found.numbers.values()) == [(1, 1), (1, 2)]


async def test_the_series_goes_on_when_batches_were_carried_away(tmp_path: Path) -> None:
    for path in await batches_of(tmp_path, 2):
        path.unlink()
        path.with_suffix(".manifest").unlink()
    await batches_of(tmp_path, 1)
    assert list(verify_batches(tmp_path / "out", public_key(tmp_path)).numbers.values()) == [(3, 3)]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("call", ["open", "write", "fsync", "rename"])
async def test_a_disk_that_fails_at_any_call_delays_and_nothing_else(
    call: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk fails at the first call, in another folder at the second, and so on, until none is left to fail."""
    fails_at = 0
    while True:
        fails_at += 1
        folder = tmp_path / str(fails_at)
        folder.mkdir()
        fault = _Fault(getattr(os, call), folder / "out", number, fails_at)
        to = transport(folder, SLOW)
        with monkeypatch.context() as patched:
            patched.setattr(os, call, fault)
            errors = await _deliver(to, 250)
        found = verify_batches(folder / "out", public_key(folder))
        assert {int(line[10:-1]) for line in found.lines()} == set(range(250))
        assert all(path.read_bytes().endswith(b"\n") for path in found.paths)
        assert not [path for path in (folder / "out").iterdir() if path.suffix in (".new", ".ready")]
        assert len(errors) == fault.failed
        assert all(os.strerror(number) in error for error in errors)
        if not fault.failed:
            break
    assert fails_at > 6


async def _deliver(to: DiodeFiles, count: int) -> list[str]:
    """Send events until all are acknowledged, again from there after an error; the errors."""
    errors: list[str] = []
    done = 0
    while done < count:
        try:
            connection = await to.connect()
        except ExportUnreachable as error:
            errors.append(str(error))
            continue
        begun = done
        try:
            for first in range(begun, count, 50):
                await connection.send(messages(min(50, count - first), first))
        except ExportUnreachable as error:
            errors.append(str(error))
            done = begun + connection.acknowledged
            await connection.close()
        else:
            await connection.close(in_good_order=True)
            done = begun + connection.acknowledged
            if done < count:
                errors.append(f"closing: {os.strerror(errno.ENOSPC)} {os.strerror(errno.EIO)}")
    return errors


class _Fault:
    """A call that fails once, at its n-th time on a file of the folder; a write has written half then."""

    def __init__(self, real: Callable[..., object], folder: Path, number: int, fails_at: int) -> None:
        self.real, self.folder, self.number, self.fails_at = real, str(folder), number, fails_at
        self.calls = self.failed = 0

    def __call__(self, where: int | str | os.PathLike[str], *arguments: object, **named: object) -> object:
        path = str(Path(f"/proc/self/fd/{where}").readlink()) if isinstance(where, int) else os.fspath(where)
        if path.startswith(self.folder) and not path.endswith(".lock"):
            self.calls += 1
            if self.calls == self.fails_at:
                self.failed += 1
                if arguments and isinstance(arguments[0], bytes):
                    self.real(where, arguments[0][: len(arguments[0]) // 2])
                raise OSError(self.number, os.strerror(self.number), path)
        return self.real(where, *arguments, **named)


async def test_what_appears_was_on_the_disk_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file is synced after it was written, before it is renamed; the folder after that, before it is acknowledged."""
    connection = await transport(tmp_path, SLOW).connect()
    dirty: set[str] = set()
    write, fsync, rename = os.write, os.fsync, os.rename

    def name_of(descriptor: int) -> str:
        return Path(f"/proc/self/fd/{descriptor}").readlink().name

    def writing(descriptor: int, content: bytes) -> int:
        dirty.add(name_of(descriptor))
        return write(descriptor, content)

    def syncing(descriptor: int) -> None:
        fsync(descriptor)
        dirty.discard(name_of(descriptor))

    def renaming(old: Path, new: Path) -> None:
        assert Path(old).name not in dirty
        rename(old, new)
        dirty.add("out")

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", writing)
        patched.setattr(os, "fsync", syncing)
        patched.setattr(os, "rename", renaming)
        await connection.send(messages(100))
    assert connection.acknowledged == 100
    assert not dirty
    await connection.close()


async def test_a_full_disk_is_told_with_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    connection = await transport(tmp_path, SLOW).connect()
    fault = _Fault(os.write, tmp_path / "out", errno.ENOSPC, 1)
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", fault)
        with pytest.raises(ExportUnreachable, match="No space left on device") as caught:
            await connection.send(messages(10))
    assert str(tmp_path / "out") in caught.value.message
    await connection.close(in_good_order=True)
    assert visible(tmp_path) == []
    assert not list((tmp_path / "out").glob(".*.new"))


async def test_a_folder_that_goes_away_is_told_and_gone_on_with(tmp_path: Path) -> None:
    to = transport(tmp_path, SLOW)
    connection = await to.connect()
    await connection.send(messages(10))
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(ExportUnreachable, match="No such file"):
        await connection.send(messages(100, 10))
    assert connection.acknowledged == 0
    await connection.close()
    with pytest.raises(ExportUnusable, match="it is no folder"):
        await to.connect()
    assert await _deliver(transport(tmp_path, SLOW), 110) == []
    assert len(list(verify_batches(tmp_path / "out", public_key(tmp_path)).lines())) == 110


def test_a_writer_that_is_killed_at_any_call_leaves_whole_batches(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-m", "tests.e2e.siem.diode_killed", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 20


async def test_a_folder_that_does_not_answer_is_given_up_and_gone_on_with(tmp_path: Path) -> None:
    out = transport(tmp_path)
    first = DiodeFiles(tmp_path / "out", key_file(tmp_path), name="diode.vault", limits=SLOW, deadline_s=0.2)
    connection = await first.connect()
    await connection.send(messages(50))
    descriptor = os.open(tmp_path / "out" / ".lock", os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # who waits for it waits like for a disk that is gone
        with pytest.raises(ExportUnreachable, match=r"did not answer within 0\.2 s"):
            await connection.send(messages(50, 50))
        with pytest.raises(ExportUnreachable, match=r"did not answer within 0\.2 s"):
            await first.connect()
        before = set(threading.enumerate())
        for _ in range(3):
            with pytest.raises(ExportUnreachable, match=r"did not answer within 0\.2 s"):
                await first.connect()
        for thread in set(threading.enumerate()) - before:
            thread.join(10)  # one that has said what it had to may be about to end
            assert not thread.is_alive()
        with contextlib.suppress(ExportUnreachable):
            await connection.close()
        assert visible(tmp_path) == []
    finally:
        os.close(descriptor)
    shipped = Shipped(tmp_path, out)
    await shipped.until_delivered()
    verify_batches(tmp_path / "out", public_key(tmp_path))


@pytest.mark.parametrize("call", ["open", "write", "fsync", "rename", "unlink"])
async def test_of_a_batch_that_a_late_disk_held_up_nothing_is_left(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, answers, real = str(tmp_path / "out"), threading.Event(), getattr(os, call)

    def late(where: int | str | os.PathLike[str], *arguments: object, **named: object) -> object:
        path = str(Path(f"/proc/self/fd/{where}").readlink()) if isinstance(where, int) else os.fspath(where)
        if path.startswith(f"{out}/") and path.endswith(".new"):
            answers.wait()
        return real(where, *arguments, **named)

    connection = await transport(tmp_path, SLOW).connect()
    room = connection._room
    room._deadline_s = 0.05
    with monkeypatch.context() as patched:
        patched.setattr(os, call, late)
        with pytest.raises(ExportUnreachable, match=r"did not answer within 0\.05 s"):
            await connection.send(messages(100))
        await connection.close()
        answers.set()
        await until(lambda: room._working is not None and room._working.done() and not _open_in(out))
    assert not list((tmp_path / "out").glob(".*.new"))
    assert await _deliver(transport(tmp_path, SLOW), 100) == []


def _open_in(folder: str) -> list[str]:
    """The files there that this process has open."""
    links = []
    for each in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # it was closed
            links.append(str(each.readlink()))
    return [link for link in links if link.startswith(folder)]


async def test_a_key_that_is_none_or_that_others_can_read_is_refused(tmp_path: Path) -> None:
    to = transport(tmp_path)
    path = key_file(tmp_path)
    pem, private = Encoding.PEM, PrivateFormat.PKCS8
    other = generate_private_key(SECP256R1()).private_bytes(pem, private, NoEncryption())
    locked = Ed25519PrivateKey.generate().private_bytes(pem, private, BestAvailableEncryption(b"x"))
    for content, told in ((other, "it is no Ed25519 key"), (locked, "passphrase|encrypted"), (b"x", "diode.key")):
        path.write_bytes(content)
        with pytest.raises(ExportUnusable, match=told):
            await to.connect()
    path.chmod(0o644)
    with pytest.raises(ExportUnusable, match="its mode is 0644"):
        await to.connect()
    path.unlink()
    with pytest.raises(ExportUnusable, match="No such file"):
        await to.connect()


async def test_a_link_that_somebody_laid_is_not_followed(tmp_path: Path) -> None:
    to = transport(tmp_path)
    (tmp_path / "out" / ".lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ExportUnreachable, match=r"\.lock: Too many levels of symbolic links"):
        await to.connect()
    assert not (tmp_path / "elsewhere").exists()


async def test_a_send_that_is_cancelled_leaves_nothing_half_written(tmp_path: Path) -> None:
    connection = await transport(tmp_path).connect()
    sending = asyncio.create_task(connection.send(messages(50)))
    await asyncio.sleep(0)
    sending.cancel()
    await asyncio.gather(sending, return_exceptions=True)
    await connection.send(messages(3))
    await until(lambda: connection.acknowledged == 3)
    await connection.close()
    found = verify_batches(tmp_path / "out", public_key(tmp_path))
    assert list(found.lines())[-3:] == ['{"number":0}', '{"number":1}', '{"number":2}']


def test_a_manifest_is_no_checkpoint_and_a_checkpoint_is_not_signed_as_a_note() -> None:
    manifest = Manifest("0" * 16, 1, 5, "a" * 64, 1, f"{ORIGIN}/0", f"{ORIGIN}/0", "0" * 64)
    assert Manifest.parse(manifest.text) == manifest
    for text in (manifest.text + "x", manifest.text[:-1], manifest.text.replace("bytes 5", "bytes 05"), "", "\n" * 8):
        with pytest.raises(NoteInvalid):
            Manifest.parse(text)
    checkpoint = f"{ORIGIN}\n0\n47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=\n"
    with pytest.raises(NoteInvalid, match="its text is a checkpoint"):
        sign_note(checkpoint, KEY)
