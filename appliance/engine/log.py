"""What vLLM's processes may write into their log: nothing that a client sent, nothing that the model said.

Rules:

- Standard library only; vLLM loads this module through `VLLM_LOGGING_CONFIG_PATH`.
- A logger that handles requests writes errors only, and of an error only where it happened and its type: messages and
  exception texts quote prompts, stop strings, schemas and answers.
- vLLM's dump of the requests that were running when the engine failed is off: it holds their sampling parameters.
- Every other logger writes as usual, so that a start which fails can be explained.
"""

import logging
from typing import Any

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
_FORMAT = "%(asctime)s %(levelname)s %(name)s[%(process)d]: %(message)s"


class Formatter(logging.Formatter):
    """One record, its lines kept together by indentation."""

    def __init__(self) -> None:
        super().__init__(_FORMAT)

    def format(self, record: logging.LogRecord) -> str:
        """The record as text."""
        return super().format(record).replace("\n", "\n    ")


class WithheldFormatter(Formatter):
    """Where a record was written and the types of its exceptions; its message is withheld."""

    def format(self, record: logging.LogRecord) -> str:
        """The record's place, without a word of its message."""
        kinds: list[str] = []
        error = record.exc_info[1] if record.exc_info else None
        while error is not None and len(kinds) < 8:
            kinds.append(type(error).__name__)
            error = error.__cause__ or error.__context__
        place = f"{record.module}:{record.lineno}"
        withheld = logging.LogRecord(
            record.name,
            record.levelno,
            record.pathname,
            record.lineno,
            f"{place} {' < '.join(kinds) or 'error'} (the message is withheld: it may quote a request)",
            None,
            None,
        )
        withheld.created, withheld.msecs = record.created, record.msecs
        return super().format(withheld)


def logging_config() -> dict[str, Any]:
    """The configuration for `logging.config.dictConfig`, in vLLM's processes."""
    withheld = {"handlers": ["withheld"], "level": "ERROR", "propagate": False}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {
            "plain": {"()": f"{__name__}.{Formatter.__name__}"},
            "withheld": {"()": f"{__name__}.{WithheldFormatter.__name__}"},
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
