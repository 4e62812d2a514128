"""A receiver that moves away what it checked goes on from what it knows: nothing is left out at a seam."""

import asyncio
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner

from appliance.audit.entry import Entry
from appliance.audit.reading import LogReader
from appliance.audit.siem.formats import CheckpointEvent, Disclosed, Withheld
from appliance.audit.siem.known import Known, KnownInvalid
from appliance.audit.siem.ocsf import Ocsf
from appliance.audit.siem.opening import KeyOpener
from appliance.audit.siem.verify_export import ExportDiffers, ExportVerified, verify_export
from appliance.audit.tree import Frontier, leaf_hash
from appliance.cli import holdfast
from tests.unit.audit.making import KEY, ORIGIN, Keys, drafts, open_log, sign

CHECKPOINTS = (100, 250, 400)
ENTRIES = 450  # the last 50 are under no checkpoint


class Sent:
    """What a log of `ENTRIES` entries sends: an event a line, each checkpoint behind what it names."""

    def __init__(self, directory: Path) -> None:
        log = open_log(directory)
        notes = {}
        for size in CHECKPOINTS:
            log.append(drafts(range(log.size, size)))
            log.publish(sign)
            notes[size] = LogReader(directory).note
        log.append(drafts(range(log.size, ENTRIES)))
        log.close()
        reader = LogReader(directory)
        frames = [reader.frame(sequence) for sequence in range(ENTRIES)]
        edge, start, form = Frontier(), 0, Ocsf()
        self.disclosed = asyncio.run(KeyOpener(Keys()).open(frames))
        self.lines: list[str] = []
        self.at: dict[int, int] = {}  # where in `lines` each entry is
        peaks = edge.peaks
        for sequence, disclosed in enumerate(self.disclosed):
            self.at[sequence] = len(self.lines)
            self.lines.append(form.entry(ORIGIN, disclosed).payload.decode())
            edge.append(leaf_hash(disclosed.packed))
            if edge.size in notes:
                event = CheckpointEvent(notes[edge.size], start, edge.size, peaks)
                self.lines.append(form.checkpoint(ORIGIN, event, 1).payload.decode())
                start, peaks = edge.size, edge.peaks

    def part(self, first: int, end: int) -> list[str]:
        """The lines from one entry on, to before another."""
        return self.lines[self.at[first] : self.at.get(end, len(self.lines))]


@pytest.fixture(scope="module")
def sent(tmp_path_factory: pytest.TempPathFactory) -> Sent:
    return Sent(tmp_path_factory.mktemp("sent") / "audit")


def check(lines: Sequence[str], known: Known | None = None) -> ExportVerified:
    found = verify_export(lines, KEY.verifier(), known=known)
    assert found.shortcomings() == []
    return found


def known_of(lines: Sequence[str]) -> Known:
    known = check(lines).goes_on
    assert known is not None
    return known


@pytest.mark.parametrize("seams", [(130,), (100, 250), (1, 99, 101, 260, 300, 449), tuple(range(1, ENTRIES, 7))])
def test_parts_that_are_checked_one_after_the_other_are_proved_like_the_whole(
    sent: Sent, seams: tuple[int, ...], tmp_path: Path
) -> None:
    file, first = tmp_path / "known", 0
    proved: list[tuple[int, int]] = []
    for end in (*seams, ENTRIES):
        if end < CHECKPOINTS[0]:
            continue  # before the first checkpoint nothing is proved: it stays with what follows
        found = check(sent.part(first, end), Known.load(file, ORIGIN))
        assert found.goes_on is not None
        found.goes_on.save(file)
        proved += found.proved
        first = end
    assert [start for start, _ in proved] == [0, *(end for _, end in proved[:-1])]
    known = Known.load(file, ORIGIN)
    assert known is not None
    assert (proved[-1][1], known.edge.size, known.end) == (CHECKPOINTS[-1], CHECKPOINTS[-1], ENTRIES)


def test_what_comes_again_is_compared_and_counted(sent: Sent) -> None:
    known = known_of(sent.part(0, 300))
    found = check(sent.part(120, ENTRIES), known)
    assert (found.first, found.proved, found.end) == (250, [(250, 400)], ENTRIES)
    assert found.repeated == 180
    altered = [*sent.part(300, ENTRIES), _other_entry(sent, 120)]
    with pytest.raises(ExportDiffers, match="entry 120 came twice"):
        check(altered, known)


def _other_entry(sent: Sent, sequence: int) -> str:
    """Another event under that number, as whoever has the keys could make it."""
    entry = Entry.unpack(sent.disclosed[sequence].packed)
    packed = entry._replace(wall_ns=entry.wall_ns + 1).pack()
    return Ocsf().entry(ORIGIN, Disclosed.without(packed, Withheld.TOO_LONG)).payload.decode()


@pytest.mark.parametrize(
    ("attack", "told"),
    [
        (lambda lines: lines[1:], "entry 300 is missing"),
        (lambda lines: lines[:20] + lines[21:], "entry 320 is missing"),
        (lambda lines: lines[:70], None),  # a tail that has not come yet is no error
        (lambda lines: [lines[0].replace('"prompt_bytes":300', '"prompt_bytes":301'), *lines[1:]], "line 1"),
    ],
    ids=["first", "middle", "tail", "altered"],
)
def test_what_is_wanting_at_the_seam_is_found(
    sent: Sent, attack: Callable[[list[str]], list[str]], told: str | None
) -> None:
    known = known_of(sent.part(0, 300))
    lines = attack(sent.part(300, ENTRIES))
    if told is None:
        assert check(lines, known).proved == []
    else:
        with pytest.raises(ExportDiffers, match=told):
            check(lines, known)


def test_another_history_behind_what_is_known_is_found(sent: Sent, tmp_path: Path) -> None:
    """The log's key, in the wrong hands, signs a fork: by itself it holds."""
    log = open_log(tmp_path / "audit")
    log.append(drafts(range(1000, 1000 + ENTRIES)))
    log.publish(sign)
    log.close()
    reader = LogReader(tmp_path / "audit")
    fork = asyncio.run(KeyOpener(Keys()).open([reader.frame(sequence) for sequence in range(ENTRIES)]))
    lines = [Ocsf().entry(ORIGIN, each).payload.decode() for each in fork]
    lines.append(Ocsf().checkpoint(ORIGIN, CheckpointEvent(reader.note, 0, ENTRIES, ()), 1).payload.decode())
    check(lines)
    known = known_of(sent.part(0, 400))
    with pytest.raises(ExportDiffers, match="one of the entries 400 to 449 is not the log's"):
        check(lines[known.end :], known)
    with pytest.raises(ExportDiffers, match="came twice"):
        check(lines, known)


def test_what_came_before_all_leaves_that_are_known_is_a_shortcoming(
    sent: Sent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("appliance.audit.siem.verify_export.KEPT", 50)
    known = known_of(sent.part(0, 300))
    assert (known.first, known.end) == (200, 300)
    found = verify_export(sent.part(190, ENTRIES), KEY.verifier(), known=known)
    assert found.shortcomings() == ["10 entries came again from before what is known of them"]


def test_a_part_from_the_middle_is_gone_on_from_too(sent: Sent) -> None:
    found = verify_export(sent.part(90, 300), KEY.verifier(), asked_from=100)
    assert found.goes_on is not None
    assert check(sent.part(300, ENTRIES), found.goes_on).proved == [(250, 400)]


@pytest.mark.parametrize(
    "damage",
    [
        lambda said: said.pop("peaks"),
        lambda said: said["peaks"].pop(),
        lambda said: said.update(first=-1),
        lambda said: said.update(first=300),
        lambda said: said.update(format=2),
        lambda said: said["leaves"].append("00"),
        lambda said: said.update(batches={"x": 1}),
        lambda said: said.update(origin="another"),
        lambda said: said.update(proved=1 << 80),
    ],
)
def test_a_file_that_is_no_such_knowledge_is_refused(
    sent: Sent, damage: Callable[[dict[str, object]], object], tmp_path: Path
) -> None:
    file = tmp_path / "known"
    assert Known.load(file, ORIGIN) is None
    known_of(sent.part(0, 300)).save(file)
    said = json.loads(file.read_text())
    damage(said)
    file.write_text(json.dumps(said))
    with pytest.raises(KnownInvalid):
        Known.load(file, ORIGIN)


def test_the_command_goes_on_and_keeps_what_it_knew_where_something_is_wanting(sent: Sent, tmp_path: Path) -> None:
    part, known = tmp_path / "part", tmp_path / "known"

    def run(lines: list[str], *words: str) -> tuple[int, str]:
        part.write_text("\n".join(lines) + "\n")
        command = ["audit", "verify-export", str(part), "--key", str(KEY.verifier()), "--known", str(known), *words]
        outcome = CliRunner().invoke(holdfast, command)
        return outcome.exit_code, outcome.output

    status, told = run(sent.part(0, 300), "--from", "0")
    assert (status, "entries 0 to 249 are proved" in told) == (0, True)
    before = known.read_text()
    status, told = run(sent.part(301, ENTRIES))
    assert (status, "entry 300 is missing" in told, known.read_text()) == (6, True, before)
    assert run(sent.part(300, ENTRIES), "--from", "300")[0] == 2
    status, told = run(sent.part(300, 390))
    assert (status, "no more is proved than was known" in told) == (0, True)
    status, told = run([*sent.part(390, ENTRIES), "x" * (9 << 20)])
    assert (status, "it has more than 4194304 characters" in told) == (6, True)
    status, told = run(sent.part(390, ENTRIES))
    assert (status, "entries 250 to 399 are proved" in told, "before entry 250 is known" in told) == (0, True, True)
