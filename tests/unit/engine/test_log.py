"""What vLLM's processes write into their log, and what of their output the gateway passes on."""

import io
import json
import logging
import logging.config
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from appliance.engine.log import REQUEST_LOGGERS, SERVING_NAME, Sieve, logging_config, say_serving

NAMES = (*REQUEST_LOGGERS, "vllm", "vllm.entrypoints", "vllm.logging_utils.dump_input", "root-test")
MARK = "0123456789abcdef"
SECRET = "secret"  # what a request said: it stands in no function here


@dataclass
class Written:
    """The log of a process that was configured as vLLM's are."""

    out: io.StringIO
    serving: Path

    def text(self) -> str:
        return self.out.getvalue()


@pytest.fixture
def written(tmp_path: Path) -> Iterator[Written]:
    """A configured process; the test's own logging is put back."""
    log = Written(io.StringIO(), tmp_path / SERVING_NAME)
    root = logging.getLogger()
    before = (root.handlers[:], root.level)
    config = json.loads(json.dumps(logging_config(MARK, str(log.serving))))  # as it comes out of the file
    logging.config.dictConfig(config)
    for handler in {handler for name in ("", *NAMES) for handler in logging.getLogger(name).handlers}:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(log.out)
    yield log
    for name in NAMES:
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [], True
        logger.setLevel(logging.NOTSET)
    root.handlers, root.level = before


def fail(logger: logging.Logger) -> None:
    """An error with a cause, both of which quote a request."""
    try:
        try:
            raise KeyError(SECRET)
        except KeyError as error:
            raise ValueError(SECRET) from error
    except ValueError:
        logger.exception("the prompt was %s", SECRET)


@pytest.mark.parametrize("name", REQUEST_LOGGERS)
def test_a_logger_that_handles_requests_says_where_and_what_kind_and_no_more(name: str, written: Written) -> None:
    logger = logging.getLogger(f"{name}.serving")
    logger.warning("the prompt was %s", SECRET)
    assert written.text() == ""
    fail(logger)
    line = written.text()
    assert SECRET not in line
    assert f"ERROR {name}.serving[" in line
    assert "test_log:" in line
    assert "the prompt was %s; raised ValueError (test_log.py:" in line
    assert " < KeyError (test_log.py:" in line
    assert line.count("\n") == 1


def test_an_unknown_logger_is_treated_as_one_that_handles_requests(written: Written) -> None:
    logging.getLogger("root-test").error(f"{SECRET}")
    assert "message is withheld" in written.text()
    assert SECRET not in written.text()


def test_the_dump_of_running_requests_is_off(written: Written) -> None:
    logging.getLogger("vllm.logging_utils.dump_input").error("stop strings: secret")
    assert written.text() == ""


def test_what_explains_a_start_that_fails_is_written_whole(written: Written) -> None:
    try:
        raise RuntimeError("no room for the cache")
    except RuntimeError:
        logging.getLogger("vllm.v1.engine.core").exception("EngineCore failed to start.")
    text = written.text()
    assert "EngineCore failed to start." in text
    assert "\n    RuntimeError: no room for the cache" in text


def test_once_the_engine_serves_every_logger_says_where_and_what_kind_and_no_more(written: Written) -> None:
    logger = logging.getLogger("vllm.v1.engine.core")
    logger.info("loaded %s", "weights")
    assert "loaded weights" in written.text()
    written.serving.touch()
    fail(logger)
    logger.warning("%d " + SECRET, 1)
    logger.error(f"a line\nof {SECRET}")
    logger.error(ValueError(SECRET))
    logger.error("EngineCore encountered a fatal error.")
    _, *lines = written.text().splitlines()
    assert SECRET not in written.text()
    assert [line.startswith(MARK) for line in lines] == [True] * 5
    assert "the prompt was %s; raised ValueError (test_log.py:" in lines[0]
    assert [line.endswith("(the message is withheld: it may quote a request)") for line in lines[1:4]] == [True] * 3
    assert lines[4].endswith("EngineCore encountered a fatal error.")


@pytest.mark.parametrize("name", ["vllm.appliance.engine.inside.lessons", "vllm.v1.metrics.loggers"])
def test_loggers_that_count_are_read_whole_but_for_exceptions(name: str, written: Written) -> None:
    written.serving.touch()
    try:
        raise OSError(SECRET)
    except OSError:
        logging.getLogger(name).exception("Running: %d reqs", 3)
    assert "Running: 3 reqs; raised OSError (" in written.text()
    assert SECRET not in written.text()


def test_a_record_of_an_engine_that_serves_is_one_short_line(written: Written) -> None:
    written.serving.touch()
    logging.getLogger("vllm.v1.metrics.loggers").info("%s", "é\n" * 9000)
    line = written.text()
    assert line.count("\n") == 1
    assert len(line.encode()) <= 4096  # one piece in a pipe


def test_the_front_end_says_that_it_serves_beside_its_configuration(tmp_path: Path) -> None:
    say_serving({})
    say_serving({"VLLM_LOGGING_CONFIG_PATH": str(tmp_path / "logging.json")})
    assert [path.name for path in tmp_path.iterdir()] == [SERVING_NAME]


def ours(text: str) -> bytes:
    return f"{MARK}{text}\n".encode()


def sieve(*, serving: bool = True) -> Sieve:
    return Sieve(MARK, lambda: serving)


def test_until_the_engine_serves_all_of_its_output_is_passed_on_without_marks() -> None:
    starting = sieve(serving=False)
    kept = starting.pass_on(b"raw\n" + ours("said") + b"no end")
    assert kept + starting.end() == b"raw\nsaid\nno end"


def test_of_an_engine_that_serves_records_are_passed_on_and_nothing_else() -> None:
    serving = sieve()
    output = b"regex: " + ours("one") + b"secret\n" + ours("two") + b"secret"
    kept = b"".join(serving.pass_on(output[at : at + 1]) for at in range(len(output))) + serving.end()
    lines = kept.splitlines()
    assert b"secret" not in kept
    assert [line for line in lines if not line.startswith(b"Withheld")] == [b"one", b"two"]
    assert lines[-1].startswith(b"Withheld since the engine serves: 20 bytes ")


def test_what_was_withheld_is_told_as_it_doubles_and_not_line_by_line() -> None:
    serving = sieve()
    kept = b"".join(serving.pass_on(b"secret\n") for _ in range(10_000)) + serving.end()
    notes = kept.splitlines()
    assert 2 < len(notes) < 20
    assert b": 70000 bytes" in notes[-1]
    assert serving.end() == b""


@pytest.mark.parametrize("serving", [True, False])
def test_output_without_an_end_is_not_held(serving: bool) -> None:
    endless = sieve(serving=serving)
    kept = b"".join(endless.pass_on(b"x" * 10_000) for _ in range(100))
    assert len(endless._held) <= 1 << 16
    kept += endless.pass_on(ours("said"))
    if serving:
        assert b"x" * 10 not in kept
        assert b"\nsaid\n" in kept
    else:
        assert kept == b"x" * 1_000_000 + b"said\n"


def test_what_was_read_before_the_engine_served_and_has_no_end_is_withheld_with_its_end() -> None:
    states = iter([False, True])
    between = Sieve(MARK, lambda: next(states))
    assert between.pass_on(b"half a line") == b""
    assert b"line" not in between.pass_on(b" of it\n").replace(b"lines", b"")
    assert between.pass_on(ours("said")) == b"said\n"  # and nobody asked again
