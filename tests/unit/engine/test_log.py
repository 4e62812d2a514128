"""What vLLM's processes write into their log, and what they may not."""

import io
import json
import logging
import logging.config
from collections.abc import Iterator

import pytest

from appliance.engine.log import REQUEST_LOGGERS, logging_config

NAMES = (*REQUEST_LOGGERS, "vllm", "vllm.entrypoints", "vllm.logging_utils.dump_input", "root-test")


@pytest.fixture
def written() -> Iterator[io.StringIO]:
    """The log of a process that was configured as vLLM's are; the test's own logging is put back."""
    out = io.StringIO()
    root = logging.getLogger()
    before = (root.handlers[:], root.level)
    config = json.loads(json.dumps(logging_config()))  # as it comes out of the file
    logging.config.dictConfig(config)
    for handler in {handler for name in ("", *NAMES) for handler in logging.getLogger(name).handlers}:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(out)
    yield out
    for name in NAMES:
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [], True
        logger.setLevel(logging.NOTSET)
    root.handlers, root.level = before


@pytest.mark.parametrize("name", REQUEST_LOGGERS)
def test_a_logger_that_handles_requests_says_where_and_what_kind_and_no_more(name: str, written: io.StringIO) -> None:
    logger = logging.getLogger(f"{name}.serving")
    logger.warning("the prompt was %s", "secret")
    assert written.getvalue() == ""
    try:
        try:
            raise KeyError("secret")
        except KeyError as error:
            raise ValueError("secret") from error
    except ValueError:
        logger.exception("the prompt was %s", "secret")
    line = written.getvalue()
    assert "secret" not in line
    assert f"ERROR {name}.serving[" in line
    assert "test_log:" in line
    assert "ValueError < KeyError" in line
    assert line.count("\n") == 1


def test_an_unknown_logger_is_treated_as_one_that_handles_requests(written: io.StringIO) -> None:
    logging.getLogger("root-test").error("secret")
    assert "message is withheld" in written.getvalue()
    assert "secret" not in written.getvalue()


def test_the_dump_of_running_requests_is_off(written: io.StringIO) -> None:
    logging.getLogger("vllm.logging_utils.dump_input").error("stop strings: secret")
    assert written.getvalue() == ""


def test_what_explains_a_start_that_fails_is_written_whole(written: io.StringIO) -> None:
    try:
        raise RuntimeError("no room for the cache")
    except RuntimeError:
        logging.getLogger("vllm.v1.engine.core").exception("EngineCore failed to start.")
    text = written.getvalue()
    assert "EngineCore failed to start." in text
    assert "\n    RuntimeError: no room for the cache" in text
