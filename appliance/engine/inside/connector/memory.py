"""Where KV lies in the machine's memory, and who copies it: memory without a name, locked, and in no core dump.

Rules:

- What leaves a device that is a CPU is copied at a pace, for nobody waits for it: what a step has no time for is copied
  in the next ones. vLLM keeps a block as it is until its copy is over, or waits for it.
- What comes back is copied at once: a request waits for it.
"""

import contextlib
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import repeat
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
from appliance.engine.inside.pace import Pace
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


@dataclass(slots=True)
class _Copying:
    """Attributes: chunks: from where to where, and of which group of layers; done: how many of them are there."""

    chunks: Sequence[tuple[int, int, int]]
    done: int = 0
    copied_bytes: int = 0
    seconds: float = 0.0


class CopyingWorker(OffloadingWorker):  # type: ignore[misc]
    """Moves chunks where the device is a CPU: a copy in memory."""

    clock: Callable[[], float] = staticmethod(time.perf_counter)

    def __init__(self, kv_caches: CanonicalKVCaches, region: SharedOffloadRegion, blocks_per_chunk: int) -> None:
        if blocks_per_chunk != 1:
            raise UnsupportedEngine("on a CPU a chunk is one block: leave block_size out of the connector's options")
        self._region: SharedOffloadRegion | None = region
        self._device = [tensor.tensor.numpy() for tensor in kv_caches.tensors]
        self._dram = [region.create_next_worker_view(tensor.page_size_bytes).numpy() for tensor in kv_caches.tensors]
        # As much of each tensor's page as the group fills: behind it lies what another group's block left there.
        self._pages_of_group = [
            sorted({(ref.tensor_idx, ref.page_size_bytes) for ref in refs}) for refs in kv_caches.group_data_refs
        ]
        self._bytes_of_group = [sum(page_bytes for _, page_bytes in pages) for pages in self._pages_of_group]
        self._leaving: OrderedDict[int, _Copying] = OrderedDict()  # the oldest first
        self._pace = Pace(self.clock)
        self._finished: list[TransferResult] = []

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: CPULoadStoreSpec) -> bool:
        self._leaving[job_id] = _Copying(_chunks(src_spec.block_ids, dst_spec.chunk_ids, src_spec))
        return True

    def submit_load(self, job_id: int, src_spec: CPULoadStoreSpec, dst_spec: GPULoadStoreSpec) -> bool:
        job = _Copying(_chunks(src_spec.chunk_ids, dst_spec.block_ids, dst_spec))
        self._copy(job, self._dram, self._device, len(job.chunks))
        self._is_over(job_id, job)
        return True

    def get_finished(self) -> list[TransferResult]:
        """The copies that are over; vLLM asks once a step, and what has time in it is copied first."""
        self._pace.step()
        while self._leaving:
            job_id, job = next(iter(self._leaving.items()))
            while job.done < len(job.chunks) and self._pace.goes_on(self._bytes_of_group[job.chunks[job.done][2]]):
                self._copy(job, self._device, self._dram, 1)
            if job.done < len(job.chunks):
                break
            self._is_over(job_id, self._leaving.pop(job_id))
        finished, self._finished = self._finished, []
        return finished

    def wait(self, job_ids: set[int]) -> None:
        """Copy what is left of these at once: their blocks are wanted."""
        for job_id in job_ids:
            if (job := self._leaving.pop(job_id, None)) is not None:
                self._copy(job, self._device, self._dram, len(job.chunks) - job.done)
                self._is_over(job_id, job)

    def shutdown(self) -> None:
        self._leaving.clear()
        self._device.clear()
        self._dram.clear()
        if self._region is not None:
            self._region.cleanup()
            self._region = None

    def _copy(
        self,
        job: _Copying,
        sources: Sequence[Any],
        targets: Sequence[Any],
        n: int,
    ) -> None:
        """Copy so many chunks more."""
        started = time.perf_counter()
        for source, target, group in job.chunks[job.done : job.done + n]:
            for tensor, page_bytes in self._pages_of_group[group]:
                targets[tensor][target, :page_bytes] = sources[tensor][source, :page_bytes]
            job.copied_bytes += self._bytes_of_group[group]
        job.done += n
        job.seconds += time.perf_counter() - started

    def _is_over(self, job_id: int, job: _Copying) -> None:
        self._finished.append(TransferResult(job_id, True, job.copied_bytes, job.seconds))


def _chunks(source_ids: Any, target_ids: Any, groups: GPULoadStoreSpec) -> list[tuple[int, int, int]]:
    """From where each chunk is copied, to where, and of which group of layers it is."""
    of_groups = (number for group, size in enumerate(groups.group_sizes) for number in repeat(group, size))
    return list(zip(map(int, source_ids), map(int, target_ids), of_groups, strict=True))


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
