"""What `inside/connector/` relies on in vLLM's internals. A failure here means: read the new version before using it.

`StateConnector` was written against vLLM 0.32.0, whose scheduler

- asks `get_num_new_matched_tokens` of each waiting request that has computed nothing, after it has looked up its hits
  and before it allocates;
- asks the cache manager's `allocate_slots` for the blocks of every request, waiting or running, with all that their
  number depends on, by name but for the first two; None means that there are too few;
- calls `build_connector_meta` at the end of each step, before that step's tokens count as computed;
- calls `request_finished_all_groups` once for each request that ends, however it does, while it still holds its blocks.

The tests in test_leases_on_the_device.py hold that order.
"""

import dataclasses
import importlib
import importlib.metadata
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import vllm
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, SupportsHMA
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector
from vllm.plugins import ENDPOINT_PLUGINS_GROUP, PLATFORM_PLUGINS_GROUP
from vllm.plugins.endpoint_plugins.interface import EndpointPlugin
from vllm.v1.core import block_pool, kv_cache_utils
from vllm.v1.core.block_pool import BlockHashToBlockMap, BlockPool
from vllm.v1.core.kv_cache_coordinator import KVCacheCoordinator
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core import EngineCore, EngineCoreProc
from vllm.v1.engine.core_client import AsyncMPClient
from vllm.v1.kv_offload.cpu.manager import CPUOffloadingManager
from vllm.v1.kv_offload.cpu.policies.base import CachePolicy
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.manager import PendingPromotion, TieringOffloadingManager
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec
from vllm.v1.request import Request, RequestStatus
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from appliance.engine import plugin
from appliance.engine.inside.connector import (
    CopyingWorker,
    SessionChunks,
    StateConnector,
    TieredStateConnector,
    UnsupportedEngine,
    amendments,
    check_version,
)
from appliance.engine.protocol import CONNECTOR_MODULE, CONNECTOR_NAME, PLUGIN_NAME, TIERED_CONNECTOR_NAME, VLLM_VERSION
from tests.engine.in_process import BLOCK, EngineInProcess, words


def test_this_is_the_version_that_the_connector_was_written_for() -> None:
    assert VLLM_VERSION == "0.32.0"
    assert vllm.__version__.partition("+")[0] == VLLM_VERSION


@pytest.mark.parametrize("version", ["0.31.9", "0.32.1", "0.33.0", "0.32.0rc1", "0.32.0.dev3", "1.0", ""])
def test_the_plugin_refuses_any_other_version(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "__version__", version)
    with pytest.raises(UnsupportedEngine, match="written for vLLM"):
        plugin.register()


@pytest.mark.parametrize("version", ["0.32.0", "0.32.0+cpu", "0.32.0+cu130"])
def test_a_local_build_of_the_version_is_accepted(version: str) -> None:
    check_version(version)


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (KVConnectorBase_V1.__init__, ["self", "vllm_config", "role", "kv_cache_config"]),
        (KVConnectorBase_V1.bind_kv_cache_manager, ["self", "kv_cache_manager"]),
        (KVConnectorBase_V1.on_new_request, ["self", "request"]),
        (KVConnectorBase_V1.get_num_new_matched_tokens, ["self", "request", "num_computed_tokens"]),
        (KVConnectorBase_V1.build_connector_meta, ["self", "scheduler_output"]),
        (KVConnectorBase_V1.update_state_after_alloc, ["self", "request", "blocks", "num_external_tokens"]),
        (KVConnectorBase_V1.reset_cache, ["self"]),
        (KVConnectorBase_V1.start_load_kv, ["self", "forward_context", "kwargs"]),
        (KVConnectorBase_V1.wait_for_layer_load, ["self", "layer_name"]),
        (KVConnectorBase_V1.save_kv_layer, ["self", "layer_name", "kv_layer", "attn_metadata", "kwargs"]),
        (KVConnectorBase_V1.wait_for_save, ["self"]),
        (SupportsHMA.request_finished_all_groups, ["self", "request", "block_ids"]),
        (BlockPool.touch, ["self", "blocks"]),
        (BlockPool.free_blocks, ["self", "ordered_blocks"]),
        (BlockPool.evict_blocks, ["self", "block_ids"]),
        (BlockPool.get_num_free_blocks, ["self"]),
        (BlockHashToBlockMap.get_one_block, ["self", "key"]),
        (KVConnectorBase_V1.shutdown, ["self"]),
        (EngineCore.shutdown, ["self"]),
        (KVCacheManager.get_blocks, ["self", "request_id"]),
        (
            KVCacheManager.allocate_slots,
            [
                "self",
                "request",
                "num_new_tokens",
                "num_new_computed_tokens",
                "new_computed_blocks",
                "num_lookahead_tokens",
                "num_external_computed_tokens",
                "delay_cache_blocks",
                "num_encoder_tokens",
                "full_sequence_must_fit",
                "reserved_blocks",
                "has_scheduled_reqs",
                "skip_zeroing_group_ids",
            ],
        ),
        (KVCacheManager.reset_prefix_cache, ["self"]),
        (
            KVCacheCoordinator.get_num_blocks_to_allocate,
            [
                "self",
                "request_id",
                "num_tokens",
                "new_computed_blocks",
                "num_encoder_tokens",
                "total_computed_tokens",
                "num_local_computed_tokens",
                "num_tokens_main_model",
                "apply_admission_cap",
                "prefill_end",
            ],
        ),
        (OffloadingConnector.get_external_cache_hit_sources, ["self", "request", "num_external_tokens"]),
        (TieringOffloadingManager.__init__, ["self", "primary_tier", "secondary_tiers"]),
        (TieringOffloadingManager.lookup, ["self", "key", "req_context", "exclude_tier_idx"]),
        (TieringOffloadingManager.prepare_store, ["self", "keys", "req_context"]),
        (TieringOffloadingManager._initiate_promotion, ["self", "tier_idx", "key", "req_context"]),
        (TieringOffloadingManager.complete_store, ["self", "keys", "req_context", "success"]),
        (TieringOffloadingManager.complete_load, ["self", "keys", "req_context"]),
        (TieringOffloadingManager.on_request_finished, ["self", "req_context", "exclude_tier_idx"]),
        (TieringOffloadingManager.on_schedule_end, ["self", "context"]),
        (CPUOffloadingManager._free_chunk, ["self", "chunk"]),
        (CPUOffloadingManager._get_num_free_chunks, ["self"]),
        (CachePolicy.insert, ["self", "key", "chunk"]),
        (CachePolicy.evict, ["self", "n", "protected"]),
        (TieringOffloadingSpec.create_worker, ["self", "kv_caches"]),
        (TieringOffloadingSpec.get_manager, ["self"]),
        (
            SharedOffloadRegion.__init__,
            [
                "self",
                "engine_id",
                "num_chunks",
                "rank",
                "kv_bytes_per_chunk",
                "cpu_page_size",
                "barrier",
                "creator_memory_check",
                "populate_only_on_creator",
            ],
        ),
        (Scheduler.get_kv_connector, ["self"]),
        (kv_cache_utils.get_request_block_hasher, ["hash_block_size", "caching_hash_fn"]),
        (
            kv_cache_utils.generate_block_hash_extra_keys,
            ["request", "start_token_idx", "end_token_idx", "start_mm_idx"],
        ),
        (AsyncMPClient.call_utility_async, ["self", "method", "args"]),
    ],
    ids=lambda value: value.__qualname__ if callable(value) else "",
)
def test_a_function_takes_what_it_took(function: Callable[..., Any], parameters: list[str]) -> None:
    assert list(inspect.signature(function).parameters) == parameters


def test_every_abstract_method_of_a_connector_is_ours() -> None:
    assert not inspect.isabstract(StateConnector)
    assert not inspect.isabstract(TieredStateConnector)
    assert not inspect.isabstract(SessionChunks)
    assert not inspect.isabstract(CopyingWorker)


def test_the_objects_have_what_is_read_of_them(engine: EngineInProcess) -> None:
    manager = engine.scheduler.kv_cache_manager
    assert isinstance(manager, KVCacheManager)
    assert manager.block_pool is engine.pool
    assert isinstance(engine.pool, BlockPool)
    assert isinstance(manager.coordinator, KVCacheCoordinator)
    for name in ("watermark_blocks", "max_model_len", "retained_hit_group_ids", "empty_kv_cache_blocks"):
        assert hasattr(manager, name), name
    for name in ("blocks", "num_gpu_blocks", "hash_block_size"):
        assert hasattr(engine.pool, name), name
    for name in ("block_id", "ref_cnt", "block_hash", "block_hash_num_tokens", "is_null", "pool"):
        assert hasattr(engine.pool.blocks[1], name), name
    assert engine.pool.null_block is engine.pool.blocks[0]


def test_a_request_has_what_is_read_of_it(engine: EngineInProcess) -> None:
    engine.submit([1, 2, 3], session="session")
    (request,) = engine.scheduler.requests.values()
    assert isinstance(request, Request)
    assert (request.num_tokens, request.num_prompt_tokens, request.num_computed_tokens) == (3, 3, 0)
    assert request.status == RequestStatus.WAITING
    assert request.kv_transfer_params is not None
    assert {RequestStatus.RUNNING, RequestStatus.PREEMPTED} <= set(RequestStatus)


def test_a_request_wants_a_block_only_beyond_those_that_it_has(engine: EngineInProcess) -> None:
    manager = engine.scheduler.kv_cache_manager
    (of_attention,) = manager.coordinator.single_type_managers
    assert type(of_attention).get_num_blocks_to_allocate is SingleTypeKVCacheManager.get_num_blocks_to_allocate
    name = engine.submit(words(1, BLOCK + 1), max_tokens=2)
    engine.step()
    (request,) = engine.scheduler.requests.values()
    wanted = [
        manager.coordinator.get_num_blocks_to_allocate(
            request.request_id, num_tokens, manager.empty_kv_cache_blocks.blocks, 0, BLOCK + 1, BLOCK + 1, num_tokens
        )
        for num_tokens in (BLOCK + 2, 2 * BLOCK, 2 * BLOCK + 1)
    ]
    assert wanted == [0, 0, 1]
    engine.cancel(name)


def test_a_block_that_is_freed_last_is_evicted_last_and_one_that_is_not_cached_first() -> None:
    pool = BlockPool(num_gpu_blocks=5, enable_caching=True, hash_block_size=32)
    blocks = pool.get_new_blocks(4)
    for number, block in enumerate(blocks[:3]):
        block.set_block_hash(bytes([number]) * 36, num_tokens=32)
    pool.touch(blocks)
    assert [block.ref_cnt for block in blocks] == [2, 2, 2, 2]
    pool.free_blocks(reversed(blocks))
    assert pool.get_num_free_blocks() == 0
    pool.free_blocks(reversed(blocks))
    assert pool.free_block_queue.get_all_free_blocks() == [blocks[3], blocks[2], blocks[1], blocks[0]]


def test_a_content_is_found_wherever_a_copy_of_it_is_until_the_last_is_evicted() -> None:
    pool = BlockPool(num_gpu_blocks=4, enable_caching=True, hash_block_size=32)
    content, copies = bytes(36), pool.get_new_blocks(2)
    for block in copies:
        pool._insert_block_hash(content, block, 32)
    cached = pool.cached_block_hash_to_block
    while (block := cached.get_one_block(content)) is not None:
        assert block in copies
        assert block.block_hash == content
        pool.evict_blocks({block.block_id})
        copies.remove(block)
    assert not copies
    assert cached.get_one_block(None) is None


def test_only_one_pool_owns_a_block() -> None:
    pool = BlockPool(num_gpu_blocks=2, enable_caching=True, hash_block_size=32)
    assert isinstance(pool.blocks[1], KVCacheBlock)
    assert pool.blocks[1].pool is pool


def test_the_engine_core_answers_what_the_front_end_asks() -> None:
    plugin.register()
    plugin.register()
    for name in ("holdfast_lease_report", "holdfast_lease_tick"):
        assert callable(getattr(EngineCore, name))
        assert callable(getattr(EngineCoreProc, name))
    assert "engine_core" in inspect.getsource(AsyncLLM.__init__)


def test_a_promotion_that_we_submit_is_taken_like_one_of_the_managers_own() -> None:
    flushed = inspect.getsource(TieringOffloadingManager._flush_pending_promotions)
    assert "submit_load" in flushed
    assert "is_promotion=True" in flushed
    assert [field.name for field in dataclasses.fields(PendingPromotion)] == ["req_context", "keys", "chunk_ids"]
    assert list(inspect.signature(TieringOffloadingManager._complete_promotion).parameters)[1:] == [
        "job_metadata",
        "completed_job",
    ]
    assert "_flush_pending_promotions" in inspect.getsource(TieringOffloadingManager.on_schedule_end)
    assert "bool(self._jobs)" in inspect.getsource(TieringOffloadingManager.has_pending_work)


def test_a_salt_is_in_the_first_blocks_hash_and_only_there(engine: EngineInProcess) -> None:
    engine.submit([1] * 96, salt="own")
    (request,) = engine.scheduler.requests.values()
    keys = [kv_cache_utils.generate_block_hash_extra_keys(request, 32 * n, 32 * n + 32, 0)[0] for n in range(3)]
    assert keys == [(("cache_salt", "own"),), None, None]
    assert len(request.block_hashes) == 3


def test_what_goes_into_a_hash_is_asked_of_one_function_in_the_modules_that_we_put_ours_into() -> None:
    callers = {
        path.stem
        for path in Path(vllm.__file__).parent.rglob("*.py")
        if "generate_block_hash_extra_keys" in path.read_text(encoding="utf-8")
    }
    assert callers == {"kv_cache_utils", "block_pool", "manager"}, "the last one is simple_kv_offload's, not used"
    asked = kv_cache_utils.generate_block_hash_extra_keys
    assert block_pool.generate_block_hash_extra_keys is asked
    assert asked.__module__ == amendments.__name__
    plugin.register()
    assert kv_cache_utils.generate_block_hash_extra_keys is asked


def test_a_cpus_runner_draws_in_the_two_parts_of_a_step_that_we_keep_generators_from(engine: EngineInProcess) -> None:
    runner = engine.core.model_executor.driver_worker.worker.model_runner
    assert type(runner) is CPUModelRunner
    assert runner.input_batch._make_sampling_metadata().generators is runner.input_batch.generators
    assert runner.discard_request_mask.np.dtype == bool
    source = inspect.getsource(GPUModelRunner)
    assert "gen.set_offset(gen.get_offset() - 4)" in source, "vLLM puts seeds back otherwise: is our mend still needed?"
    assert source.count("input_batch.generators") == 1
    for part in ("_sample", "_bookkeeping_sync"):
        assert source.count(f"self.{part}(") == 1
        assert getattr(CPUModelRunner, part).__module__ == GPUModelRunner.__module__
        assert getattr(CPUModelRunner, part).__wrapped__ is getattr(GPUModelRunner, part)


def test_the_endpoint_plugin_is_what_vllm_expects() -> None:
    (entry_point,) = importlib.metadata.entry_points(group=ENDPOINT_PLUGINS_GROUP, name=PLUGIN_NAME)
    endpoint_plugin = entry_point.load()()
    assert isinstance(endpoint_plugin, EndpointPlugin)
    assert endpoint_plugin.name == PLUGIN_NAME


def test_naming_our_plugin_alone_leaves_the_platforms_that_vllm_brings() -> None:
    # VLLM_PLUGINS filters every group: a platform that came as a plugin would not be loaded.
    assert not importlib.metadata.entry_points(group=PLATFORM_PLUGINS_GROUP)


def test_the_connector_is_where_vllm_is_told_to_look() -> None:
    module = importlib.import_module(CONNECTOR_MODULE)
    assert getattr(module, CONNECTOR_NAME) is StateConnector
    assert getattr(module, TIERED_CONNECTOR_NAME) is TieredStateConnector


def test_a_process_can_ask_for_the_tile_registers_of_its_cpu() -> None:
    assert torch.cpu._init_amx() == torch.cpu._is_amx_tile_supported()
