"""Where KV lies in the machine's memory, and who copies it: memory without a name, locked, and in no core dump."""

import contextlib
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.kv_offload.base import CanonicalKVCaches, GPULoadStoreSpec, OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

from appliance.engine.inside.connector.recalling import RecallingManager
from appliance.engine.inside.connector.version import UnsupportedEngine
from appliance.engine.inside.private_memory import keep_private

logger = init_logger(f"vllm.{__name__}")


class TierSpec(TieringOffloadingSpec):  # type: ignore[misc]
    """vLLM's tiers, on a CPU too. The memory of the DRAM tier has no name once everybody has it open."""

    _manager: Any
    _worker: Any

    def get_manager(self) -> RecallingManager:
        if self._manager is None:
            made = super().get_manager()
            self._manager = RecallingManager(made.primary_tier, made.secondary_tiers)
            region = made.primary_tier._mmap_region
            keep_kv_private([region.base_tensor], "DRAM tier")
            # vLLM makes the workers' caches before the scheduler: whoever opens the memory last takes its name away, so
            # that no way of dying leaves it behind.
            with contextlib.suppress(FileNotFoundError):
                Path(region.mmap_path).unlink()
            region._creator = False
        manager: RecallingManager = self._manager
        return manager

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        if self._worker is None:
            self._worker = self.create_worker(kv_caches)
        return self._worker

    def create_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        if all(tensor.tensor.device.type != "cpu" for tensor in kv_caches.tensors):
            worker = super().create_worker(kv_caches)
            region = worker._mmap_region
        else:
            region = SharedOffloadRegion(
                engine_id=self._engine_id,
                num_chunks=self.num_chunks,
                rank=0 if self.replicated_layout else self.config.parallel.rank,
                kv_bytes_per_chunk=self.kv_bytes_per_chunk,
                cpu_page_size=self.cpu_page_size_per_worker,
            )
            worker = CopyingWorker(kv_caches, region, self.blocks_per_chunk)
        keep_kv_private([region.base_tensor], "DRAM tier")
        region._creator = False
        return worker


class CopyingWorker(OffloadingWorker):  # type: ignore[misc]
    """Moves chunks where the device is a CPU: a copy in memory, done when it was asked for."""

    def __init__(self, kv_caches: CanonicalKVCaches, region: SharedOffloadRegion, blocks_per_chunk: int) -> None:
        if blocks_per_chunk != 1:
            raise UnsupportedEngine("on a CPU a chunk is one block: leave block_size out of the connector's options")
        self._region: SharedOffloadRegion | None = region
        self._device = [tensor.tensor for tensor in kv_caches.tensors]
        self._dram = [region.create_next_worker_view(tensor.page_size_bytes) for tensor in kv_caches.tensors]
        # As much of each tensor's page as the group fills: behind it lies what another group's block left there.
        self._pages_of_group = [
            sorted({(ref.tensor_idx, ref.page_size_bytes) for ref in refs}) for refs in kv_caches.group_data_refs
        ]
        self._finished: list[TransferResult] = []

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: CPULoadStoreSpec) -> bool:
        return self._copy(job_id, self._device, src_spec.block_ids, self._dram, dst_spec.chunk_ids, src_spec)

    def submit_load(self, job_id: int, src_spec: CPULoadStoreSpec, dst_spec: GPULoadStoreSpec) -> bool:
        return self._copy(job_id, self._dram, src_spec.chunk_ids, self._device, dst_spec.block_ids, dst_spec)

    def get_finished(self) -> list[TransferResult]:
        finished, self._finished = self._finished, []
        return finished

    def wait(self, job_ids: set[int]) -> None:
        """Every copy is over when it was submitted."""

    def shutdown(self) -> None:
        self._device.clear()
        self._dram.clear()
        if self._region is not None:
            self._region.cleanup()
            self._region = None

    def _copy(
        self,
        job_id: int,
        sources: list[torch.Tensor],
        source_ids: Any,
        targets: list[torch.Tensor],
        target_ids: Any,
        groups: GPULoadStoreSpec,
    ) -> bool:
        started = time.perf_counter()
        copied_bytes = first = 0
        for pages, blocks in zip(self._pages_of_group, groups.group_sizes, strict=True):
            source = torch.from_numpy(source_ids[first : first + blocks].astype("int64"))
            target = torch.from_numpy(target_ids[first : first + blocks].astype("int64"))
            first += blocks
            for tensor, page_bytes in pages:
                copied = sources[tensor][:, :page_bytes].index_select(0, source)
                targets[tensor][:, :page_bytes].index_copy_(0, target, copied)
                copied_bytes += copied.nbytes
        self._finished.append(TransferResult(job_id, True, copied_bytes, time.perf_counter() - started))
        return True


def check_layout(layout: str | None, groups: int) -> None:
    """Refuse a layout of the device's KV of which vLLM copies more than a session's own.

    Where the layers of a block lie beside each other, vLLM copies the whole block, whichever group of layers it is of:
    what a smaller group does not fill holds the KV of whoever had the block before.

    Args:
        layout: its name, as vLLM has it; None: not resolved.
        groups: into how many groups the model's layers are parted.

    Raises:
        UnsupportedEngine: there is more than one group, in such a layout.
    """
    if groups > 1 and layout is not None and KVCacheLayout[layout].is_block_outermost:
        raise UnsupportedEngine(
            f"KV of this model cannot leave the device: vLLM lays the KV of its {groups} groups of layers out as "
            f"{layout}, and would copy into a session's tiers what others left in its blocks. Leave `tiers.dram_bytes` "
            "and `tiers.disk_bytes` out for this model."
        )


def keep_kv_private(tensors: Iterable[torch.Tensor], what: str) -> None:
    """Keep what tensors hold out of swap and of cores, where it is in this machine's memory; say so if it cannot be."""
    memories = {it.untyped_storage().data_ptr(): it.untyped_storage() for it in tensors if it.device.type == "cpu"}
    whys = {keep_private(address, memory.nbytes()) for address, memory in memories.items()} - {""}
    if whys:
        logger.warning(
            "KV of the %s (%d MiB) cannot be locked in memory and may be swapped: %s. `holdfast doctor` says where to.",
            what,
            sum(memory.nbytes() for memory in memories.values()) >> 20,
            "; ".join(whys),
        )
