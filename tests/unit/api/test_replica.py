"""What tells one replica from another: drawn once, and not known rather than made up."""

from pathlib import Path

import pytest

from api.replica import REPLICA_FILE, replica_of


def test_a_replica_that_is_started_again_is_the_same_one_and_another_is_another(tmp_path: Path) -> None:
    one = replica_of(tmp_path)
    assert one is not None
    assert replica_of(tmp_path) == one
    (other := tmp_path / "other").mkdir()
    assert replica_of(other) not in (None, one)
    assert (tmp_path / REPLICA_FILE).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("content", [b"", b"another thing\n", b"\xff", None])
def test_a_replica_that_cannot_be_read_is_not_known(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes | None
) -> None:
    path = tmp_path / REPLICA_FILE
    path.mkdir() if content is None else path.write_bytes(content)
    assert replica_of(tmp_path) is None
    assert "which replica this is is not known" in caplog.text
    assert content is None or path.read_bytes() == content
