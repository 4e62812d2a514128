"""Ends a writer of batches at each of its calls in turn, as a kill does, and prints how many there were.

Run by `test_diode`, in a process of its own that has one thread: each writer is a fork of it. After each the folder is
looked at as it was left, then the next writer goes on in it.
"""

import os
import sys
from pathlib import Path

from appliance.audit.siem import diode
from appliance.audit.siem.batches import verify_batches
from tests.e2e.siem.shipping import messages
from tests.unit.audit.making import KEY

SEEN: dict[str, bytes] = {}
CALLS = ("open", "write", "fsync", "rename", "unlink")


def main() -> int:
    """Until a writer comes through without being ended."""
    folder = Path(sys.argv[1])
    events = iter(range(0, 10**6, 2))
    _write(folder, next(events))
    ended, published = 0, _look(folder)
    while True:
        first, left = next(events), ended
        child = os.fork()
        if child == 0:
            _end_after(left)
            _write(folder, first)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        _look(folder)
        if status == 0:
            break
        ended += 1
        before, published = published, _look(folder)
        assert before <= published <= before + 2, (before, published)  # its own, and what the one before had numbered
    _write(folder, next(events))
    found = verify_batches(folder, KEY.verifier())
    assert not list(folder.glob(".*.new")) + list(folder.glob(".*.ready"))
    assert all(line.startswith('{"number":') for line in found.lines())
    print(ended)  # noqa: T201
    return 0


def _write(folder: Path, first: int) -> None:
    room = diode._Room(folder, KEY, os.urandom)
    room.prepare()
    batch = room.batch()
    batch.write(messages(2, first))
    room.publish(batch)
    batch.drop()


def _end_after(calls: int) -> None:
    left = [calls]
    for name in CALLS:
        real = getattr(os, name)

        def ending(*arguments: object, real: object = real, **named: object) -> object:
            if left[0] == 0:
                os._exit(9)
            left[0] -= 1
            return real(*arguments, **named)  # type: ignore[operator]

        setattr(os, name, ending)


def _look(folder: Path) -> int:
    """How many batches others see: each is whole and stays as it is, and only the last may wait for its manifest."""
    waiting = [path for path in folder.glob("batch-*.log") if not path.with_suffix(".manifest").exists()]
    assert len(waiting) <= 1, waiting
    assert not [path for path in folder.glob("batch-*.manifest") if not path.with_suffix(".log").exists()]
    for path in folder.glob("batch-*.log"):
        content = path.read_bytes()
        assert content.count(b"\n") == 2, path
        assert SEEN.setdefault(path.name, content) == content, path
    seen = len(list(folder.glob("batch-*.log")))
    if seen and not waiting:
        [(first, last)] = verify_batches(folder, KEY.verifier()).numbers.values()
        assert (first, last) == (1, seen)
    return seen


if __name__ == "__main__":
    sys.exit(main())
