"""What retention learned outlives the engine, and a file that is damaged costs only that."""

import logging
import stat
from pathlib import Path

import pytest

from appliance.engine.inside.lessons import WRITE_EVERY_S, Lessons
from appliance.engine.inside.retention import RetentionPolicy


def learned() -> RetentionPolicy:
    policy = RetentionPolicy()
    for turn in range(50):
        policy.arrived(session="s", now=20.0 * turn)
        policy.finished(session="s", now=20.0 * turn + 1, stop="tool_use", prompt_tokens=1, output_tokens=1)
    return policy


def test_the_next_life_knows_what_the_last_one_learned(tmp_path: Path) -> None:
    path, policy = tmp_path / "lessons.json", learned()
    Lessons(path, policy, 0.0).write()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.stat().st_size < 20_000
    again = RetentionPolicy()
    Lessons(path, again, 0.0)
    assert again.lessons() == policy.lessons()
    assert list(tmp_path.iterdir()) == [path]


def test_lessons_are_written_now_and_then(tmp_path: Path) -> None:
    path = tmp_path / "lessons.json"
    lessons = Lessons(path, learned(), 0.0)
    lessons.write_if_due(WRITE_EVERY_S - 1)
    assert not path.exists()
    lessons.write_if_due(WRITE_EVERY_S)
    assert path.exists()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'{"edges_s": 1}', b"\xff\xfe", b"[" * 100_000])
def test_a_damaged_file_is_ignored_and_named(
    content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    path = tmp_path / "lessons.json"
    path.write_bytes(content)
    policy = RetentionPolicy()
    Lessons(path, policy, 0.0)
    assert policy.lessons() == RetentionPolicy().lessons()
    assert str(path) in caplog.text


def test_a_folder_that_cannot_be_written_is_named_and_costs_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    Lessons(tmp_path / "missing" / "lessons.json", learned(), 0.0).write()
    assert "missing/lessons.json" in caplog.text
