"""What `holdfast up` says while it waits."""

from pathlib import Path

from api.launch import _Waiting, last_lines


def test_what_is_waited_for_is_said_once_and_then_now_and_then_with_what_the_engine_says() -> None:
    said: list[str] = []
    clock = [0.0]
    waiting = _Waiting(said.append, lambda: "loading weights", now=lambda: clock[0])
    for second in range(25):
        clock[0] = float(second)
        waiting.for_parts(None)
    assert said == [
        "     0 s  the gateway starts",
        "    11 s  still: the gateway starts (loading weights)",
        "    22 s  still: the gateway starts (loading weights)",
    ]


def test_the_last_lines_are_those_of_this_start(tmp_path: Path) -> None:
    log = tmp_path / "gateway.log"
    assert last_lines(log, 2) == []
    log.write_text("before\n")
    began_at = log.stat().st_size
    with log.open("a") as file:
        file.write("one\ntwo\nthree\n")
    assert last_lines(log, 2, not_before=began_at) == ["two", "three"]
    assert last_lines(log, 9, not_before=began_at) == ["one", "two", "three"]
    log.write_text("")
    assert last_lines(log, 2, not_before=began_at) == []
