"""The tier on disk as one of vLLM's secondary tiers. What decides, encrypts or touches a file is in `inside/disk/`."""

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import vllm
from vllm.logger import init_logger
from vllm.v1.kv_offload.base import LookupResult, Medium, ReqContext, RequestOffloadingContext
from vllm.v1.kv_offload.file_mapper import FileMapper
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager, TransferJob

from appliance.engine.inside.chunks import Worth
from appliance.engine.inside.connector.sessions import Ahead, is_stored, lease_of, owner_of, withheld
from appliance.engine.inside.disk.channel import KeyAsker
from appliance.engine.inside.disk.files import Owner as DiskOwner
from appliance.engine.inside.disk.fingerprint import fingerprint
from appliance.engine.inside.disk.jobs import Piece
from appliance.engine.inside.disk.store import DiskStore, Presence
from appliance.engine.inside.quotas import Quota
from appliance.engine.tier_keys import inherited_socket

logger = init_logger(f"vllm.{__name__}")


class DiskTier(SecondaryTierManager):  # type: ignore[misc]
    """The tier on disk as vLLM asks for it. What is stored and read has a session, whose key encrypts it.

    Args:
        root_dir: where its files are.
        capacity_bytes: the most that they take.
        ttl_s: for how long a session's may be unused.
    """

    medium = Medium.STORAGE

    def __init__(
        self,
        offloading_spec: Any,
        primary_kv_view: memoryview,
        tier_type: str,
        root_dir: str,
        capacity_bytes: int,
        ttl_s: float,
        backpressure_detector: Any = None,
    ) -> None:
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        self._memory = primary_kv_view.cast("B")
        self._worth: Worth | None = None
        self._clock: Callable[[], float] = time.monotonic
        self._asker = KeyAsker(inherited_socket(os.environ))
        self.store = DiskStore(
            Path(root_dir),
            fingerprint=_fingerprint(offloading_spec, self._block_size_bytes),
            chunk_bytes=self._block_size_bytes,
            capacity_bytes=capacity_bytes,
            ttl_s=ttl_s,
            keys=self._asker.keys,
            worth=self._worth_of,
        )
        status = self.store.status()
        if not status.on:
            logger.warning("The KV tier on disk is off, and tried again every minute: %s.", status.last_error)

    def order_by(self, worth: Worth, clock: Callable[[], float]) -> None:
        """Say what decides which sessions leave first."""
        self._worth, self._clock = worth, clock

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        owner = owner_of(req_context)
        if owner is not None and is_stored(req_context):
            self.store.expect(DiskOwner(*owner))  # so that its key is there when it is looked up
            self.store.used([DiskOwner(*owner)])
        return RequestOffloadingContext()

    def lookup(self, key: bytes, req_context: ReqContext) -> LookupResult:
        owner = owner_of(req_context)
        found = Presence.ABSENT if owner is None else self.store.find(key, owner[0])
        if found is Presence.WITHHELD:
            withheld(req_context, key)
        return _LOOKED_UP[found]

    def submit_store(self, job_metadata: TransferJob) -> None:
        context: ReqContext = job_metadata.req_context
        lease, owner = lease_of(context), owner_of(context)
        pieces = self._pieces(job_metadata) if owner is not None and is_stored(context) else []
        quota = Quota() if lease is None else Quota.of(lease)
        self.store.store(job_metadata.job_id, DiskOwner(*(owner or ("", ""))), pieces, quota)

    def submit_load(self, job_metadata: TransferJob) -> None:
        owner = owner_of(job_metadata.req_context)
        tenant = owner[0] if owner is not None else ""
        ahead = job_metadata.req_context.get_state(Ahead) is not None
        self.store.load(job_metadata.job_id, tenant, self._pieces(job_metadata), ahead=ahead)

    def get_finished_jobs(self) -> Iterable[JobResult]:
        return [
            JobResult(done.job, done.whole, None if done.whole else done.keys, done.seconds, done.moved_bytes)
            for done in self.store.finished()
        ]

    def drain_jobs(self) -> None:
        self.store.drain()

    def shutdown(self) -> None:
        self.store.close()
        self._asker.close()
        self._memory.release()

    def _pieces(self, job: TransferJob) -> list[Piece]:
        size = self._block_size_bytes
        return [
            Piece(
                key, job.req_context.get_offload_key_position(key) or 0, self._memory[chunk * size : (chunk + 1) * size]
            )
            for key, chunk in zip(job.keys, map(int, job.chunk_ids), strict=True)
        ]

    def _worth_of(self, owner: DiskOwner) -> float:
        if self._worth is None:
            return 0.0
        return self._worth(session=tuple(owner), now=self._clock(), position=0, abandoned=False)


_LOOKED_UP = {
    Presence.HERE: LookupResult.HIT,
    Presence.ABSENT: LookupResult.MISS,
    Presence.WITHHELD: LookupResult.MISS,
    Presence.ASK_AGAIN: LookupResult.RETRY,
}


def _fingerprint(spec: Any, chunk_bytes: int) -> bytes:
    """What the KV of this engine is made by, and how it lies in a chunk."""
    made_with = FileMapper.from_offloading_spec("", spec, spec.blocks_per_chunk).get_run_config()
    return fingerprint(
        Path(spec.config.model.name), {**made_with, "vllm": vllm.__version__, "chunk_bytes": chunk_bytes}
    )
