"""The engine's log: nothing that a client sent stands in it, and nothing that the model said.

Rules:

- Standard library only; vLLM loads this module through `VLLM_LOGGING_CONFIG_PATH`, the gateway imports it.
- Until the engine serves there was no request: everything is written, so that a start which fails can be explained.
- From then on the gateway passes on what our formatter made, and nothing else: it marks its records with a word that is
  drawn at each start, that no client can know and that is never written down. C++ libraries, uncaught exceptions and
  whatever a child process prints have no mark, whatever descriptor they write to. Their bytes are counted.
- From then on a message is written where it is a constant of the code that logs it, never with its arguments. Of an
  exception the types are written and where it was raised, never its text. Two kinds of loggers are exempt, which have
  counts, names of our own files and kinds of errors to say: ours, and the one of vLLM's statistics.
- A logger that handles requests is so limited from the start, and writes errors only.
- vLLM's dump of the requests that were running when the engine failed is off: it holds their sampling parameters.
- The engine serves when `SERVING_NAME` stands beside the configuration. It is there before the first request is read;
  the front end makes it, and the gateway, in case another did not.
"""

import itertools
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, Final

SERVING_NAME: Final = "serving"
RAISED: Final = "; raised "  # then the types of an exception and of its causes, each with its place

# Packages and modules of vLLM, and servers around it, whose records may quote a request or an answer.
REQUEST_LOGGERS = (
    "asyncio",
    "uvicorn",
    "vllm.engine.protocol",
    "vllm.entrypoints.anthropic",
    "vllm.entrypoints.chat_utils",
    "vllm.entrypoints.generate",
    "vllm.entrypoints.logger",
    "vllm.entrypoints.openai",
    "vllm.entrypoints.pooling",
    "vllm.entrypoints.scale_out",
    "vllm.entrypoints.serve",
    "vllm.inputs",
    "vllm.multimodal",
    "vllm.parser",
    "vllm.reasoning",
    "vllm.renderers",
    "vllm.sampling_params",
    "vllm.tokenizers",
    "vllm.tool_parsers",
    "vllm.v1.engine.async_llm",
    "vllm.v1.engine.detokenizer",
    "vllm.v1.engine.input_processor",
    "vllm.v1.engine.output_processor",
    "vllm.v1.structured_output",
)
_DUMP_LOGGER = "vllm.logging_utils.dump_input"
# What they say is made of counts, of paths that an administrator chose and of kinds of errors.
_COUNTING_LOGGERS = ("vllm.appliance", "vllm.v1.metrics.loggers")
_FORMAT = "%(asctime)s %(levelname)s %(name)s[%(process)d]: %(message)s"
_MOST_RECORD_BYTES = 4000  # of a marked line: what is below PIPE_BUF is written in one piece (pipe(7))
_MOST_HELD_BYTES = 1 << 16  # of a line without an end
_MOST_CAUSES = 4
_MOST_PLACES = 6  # of one exception, the innermost


class Formatter(logging.Formatter):
    """One record as text, marked.

    Args:
        mark: what it begins with.
        serving: the file that says that the engine serves.
        withheld: whether its message may quote a request before that, too.
    """

    def __init__(self, mark: str, serving: str, *, withheld: bool = False) -> None:
        super().__init__(_FORMAT)
        self._mark = mark
        self._serving_file = serving
        self._serving = withheld

    def format(self, record: logging.LogRecord) -> str:
        """Whole, its lines kept together by indentation; once the engine serves, in one line and without a request."""
        if not self._serving:
            self._serving = os.path.exists(self._serving_file)  # noqa: PTH110 -- no object for each record
        if not self._serving:
            return self._mark + super().format(record).replace("\n", "\n    ")
        said = record.getMessage() if _is_of(record.name, _COUNTING_LOGGERS) else _constant(record.msg)
        error = record.exc_info[1] if record.exc_info else None
        message = f"{record.module}:{record.lineno} {said}{_raised(error)}"
        safe = logging.LogRecord(record.name, record.levelno, record.pathname, record.lineno, message, None, None)
        safe.created, safe.msecs = record.created, record.msecs
        line = " ".join((self._mark + super().format(safe)).splitlines())
        return line.encode("utf-8", "replace")[:_MOST_RECORD_BYTES].decode("utf-8", "ignore")


def logging_config(mark: str, serving: str) -> dict[str, Any]:
    """The configuration for `logging.config.dictConfig`, in vLLM's processes; for the arguments see `Formatter`."""
    withheld = {"handlers": ["withheld"], "level": "ERROR", "propagate": False}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {
            name: {
                "()": f"{__name__}.{Formatter.__name__}",
                "mark": mark,
                "serving": serving,
                "withheld": name == "withheld",
            }
            for name in ("plain", "withheld")
        },
        "handlers": {
            name: {"class": "logging.StreamHandler", "formatter": name, "stream": "ext://sys.stdout"}
            for name in ("plain", "withheld")
        },
        "loggers": {
            "vllm": {"handlers": ["plain"], "level": "INFO", "propagate": False},
            "vllm.entrypoints": {"handlers": ["plain"], "level": "WARNING", "propagate": False},
            **dict.fromkeys(REQUEST_LOGGERS, withheld),
            _DUMP_LOGGER: {"handlers": [], "level": "CRITICAL", "propagate": False},
        },
        "root": {"handlers": ["withheld"], "level": "ERROR"},
    }


def say_serving(environment: Mapping[str, str]) -> None:
    """Say, in vLLM's front end, that requests may come; nothing where vLLM was not told how to log."""
    if configuration := environment.get("VLLM_LOGGING_CONFIG_PATH"):
        Path(configuration).with_name(SERVING_NAME).touch(mode=0o600)


class Sieve:
    """What of an engine's output may be kept, the mark taken off: one for each of its lives. No I/O but `serving`.

    Args:
        mark: how the records of our formatter begin.
        serving: whether the engine serves; not asked again once it did.
    """

    def __init__(self, mark: str, serving: Callable[[], bool]) -> None:
        self._mark = mark.encode()
        self._ask = serving
        self._serving = False
        self._held = b""  # of a line whose end has not come
        self._withheld_bytes = 0
        self._told_bytes = 0

    def pass_on(self, output: bytes) -> bytes:
        """What of the lines that end in this output may be kept.

        What is withheld is told when it is the first, whenever it has doubled, and at the `end`: never line by line.
        """
        self._serving = self._serving or self._ask()  # after it was read: whatever quotes a request comes behind this
        *lines, held = (self._held + output).split(b"\n")
        kept = b"".join(self._sift(line + b"\n") for line in lines)
        if len(held) > _MOST_HELD_BYTES:
            # A record of ours that has not come to its end is in what is held on to: it is shorter.
            kept += self._sift(held[:-_MOST_RECORD_BYTES])
            held = held[-_MOST_RECORD_BYTES:]
        self._held = held
        return kept + (self._note() if self._withheld_bytes > 2 * self._told_bytes else b"")

    def end(self) -> bytes:
        """What may be kept of a last line without an end, and how much was withheld in all."""
        held, self._held = self._held, b""
        kept = self._sift(held)
        return kept + (self._note() if self._withheld_bytes > self._told_bytes else b"")

    def _sift(self, text: bytes) -> bytes:
        if not self._serving:
            return text.replace(self._mark, b"")
        foreign, _, ours = text.partition(self._mark)
        self._withheld_bytes += len(foreign)
        return ours

    def _note(self) -> bytes:
        self._told_bytes = self._withheld_bytes
        return (
            f"Withheld since the engine serves: {self._withheld_bytes} bytes that it wrote past its log;"
            " they may quote a request\n"
        ).encode()


def _is_of(name: str, loggers: tuple[str, ...]) -> bool:
    return any(name == logger or name.startswith(f"{logger}.") for logger in loggers)


def _constant(message: object) -> str:
    """The message, its placeholders not filled in, where it is written so in the code that is logging it."""
    if isinstance(message, str) and any(message in code.co_consts for code in _running()):
        return message
    return "(the message is withheld: it may quote a request)"


def _running() -> Iterator[CodeType]:
    """The code of each function that waits for this one, the innermost first."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        yield frame.f_code
        frame = frame.f_back


def _raised(error: BaseException | None) -> str:
    """The types of an exception and of what caused it, each with its place; nothing of what they say."""
    told: list[str] = []
    while error is not None and len(told) < _MOST_CAUSES:
        told.append(f"{type(error).__name__}{_places(error)}")
        error = error.__cause__ or error.__context__
    return f"{RAISED}{' < '.join(told)}" if told else ""


def _places(error: BaseException) -> str:
    lines: list[str] = []
    step = error.__traceback__
    while step is not None:
        lines.append(f"{Path(step.tb_frame.f_code.co_filename).name}:{step.tb_lineno}")
        step = step.tb_next
    return f" ({', '.join(itertools.islice(reversed(lines), _MOST_PLACES))})" if lines else ""
