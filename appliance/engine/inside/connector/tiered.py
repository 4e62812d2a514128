"""Leases before a connector with tiers, and the canary: restored equals recomputed."""

import itertools
import math
import secrets
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from vllm import SamplingParams
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector
from vllm.logger import init_logger
from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype
from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec
from vllm.v1.kv_offload.base import ReqContext, get_offload_group_idx
from vllm.v1.metrics.cache_hit_source import CacheHitSource
from vllm.v1.request import Request, RequestStatus

from appliance.engine.inside.canary import MOST_TOKENS, Canary, Place, Sample
from appliance.engine.inside.connector.device import LeaseRetention
from appliance.engine.inside.connector.memory import check_layout
from appliance.engine.inside.connector.recalling import Expectations, RecallingManager
from appliance.engine.inside.connector.sessions import Released, owner_of, session_of
from appliance.engine.inside.pictures import Holder, disk_picture
from appliance.engine.inside.quotas import Owner
from appliance.engine.picture import CanaryPicture, KvPicture, TierPicture
from appliance.engine.protocol import Lease, LeaseReport, TurnAccount, TurnEnd, lease_params

logger = init_logger(f"vllm.{__name__}")

_CANARY = ("holdfast", "canary")  # a tenant's label is longer
_REMEDY = (
    "Find the cause (memory, the disk, a driver), stop the gateway, remove the folder of the tier on disk if there is "
    "one, and start it again: docs/kv.md, Quarantine."
)


class TieredRetention(LeaseRetention):
    """Leases before a connector with tiers: the two go by one policy, and end together."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._canary = Canary(self.clock)
        self._dtype = kv_cache_dtype_str_to_dtype(vllm_config.cache_config.cache_dtype, vllm_config.model_config)
        groups = kv_cache_config.kv_cache_groups
        self._comparable = frozenset(number for number, group in enumerate(groups) if self._is_comparable(group))
        if role == KVConnectorRole.SCHEDULER:
            check_layout(vllm_config.cache_config.kv_cache_layout, len(groups))
            alone = len(groups) == 1
            filling = (number for number, group in enumerate(groups) if alone or self._fills_its_rows(group))
            self._tiers.fill_rows(frozenset(filling))
            self._tiers.order_by(lambda **of: self._table.worth_behind(**of), self.clock)
            self._tiers.on_stored = self._compare
            if self._tiers.quarantined:
                self._canary.quarantined = True
                logger.error(
                    "An engine before found that KV which came back from a tier is not what the model computes: "
                    "nothing is restored. Sessions are computed again. %s",
                    _REMEDY,
                )
            self._tiers.recall_for(
                Expectations(self._waiting, self._expected, lambda session: self._table.tokens_of(session))
            )

    @property
    def _tiers(self) -> RecallingManager:
        manager: RecallingManager = self.connector_scheduler.manager  # type: ignore[attr-defined]
        return manager

    def report(
        self, release: Iterable[str] = (), awaited: Sequence[tuple[str, str]] = (), *, every: bool = False
    ) -> LeaseReport:
        labels = frozenset(release)
        if awaited:
            self._tiers.look_now()
            self._tiers.wanted(awaited)
        report = super().report(labels, awaited, every=every)
        self._drop_canary_of(labels)
        if labels:
            for owner in self._tiers.release(labels):
                self.policy.closed(session=owner, now=self.clock())
        return report

    def demote(self, tier: str, labels: Collection[str]) -> list[str]:
        sizes = itertools.chain.from_iterable(holder.sizes() for holder in self.holders().values())
        demoted = []
        for session in {session for session, _ in sizes if session[1] in labels}:
            if self._table.is_active(session) or not self._tiers.has_all(tier, session, self._table.tokens_of(session)):
                continue
            self._apply(self._table.demote(session))
            self._forget(self._tiers._chunks.order.keys_of(session), frozenset())  # where no lease says what is there
            if tier == "disk":
                self._tiers.demote(session)
            demoted.append(session[1])
        return demoted

    def update_state_after_alloc(self, request: Request, blocks: Any, num_external_tokens: int) -> None:
        super().update_state_after_alloc(request, blocks, num_external_tokens)
        self._tiers.admitted(request.request_id)

    def tick(self) -> float | None:
        if self._canary.expire():
            self._tiers.release(frozenset({_CANARY[1]}))
        due = (super().tick(), self._canary.next_expiry_in_s(), self._tiers.recall_ahead())
        return min((due_in_s for due_in_s in due if due_in_s is not None), default=None)

    def turns_ended(self, ends: Iterable[TurnEnd]) -> list[TurnAccount | None]:
        ends = list(ends)
        accounts = super().turns_ended(ends)
        for end in ends:
            session = end.tenant, end.session
            if end.returns_soon and not self._table.is_active(session):
                self._tiers.hinted(session)
        return accounts

    def on_new_request(self, request: Request) -> None:
        super().on_new_request(request)
        lease = self._leases_asked.get(request.request_id)
        if lease is not None:
            self._tiers.arrived(session_of(lease))
            if lease.parent:
                self._tiers.wanted([(lease.tenant, lease.parent)])
            if lease.strict:
                self._drop_canary_of({lease.session})

    def tiers(self, leased_blocks: int) -> list[TierPicture]:
        return [*super().tiers(leased_blocks), *self._tiers.pictures()]

    def holders(self) -> dict[str, Holder]:
        return {**super().holders(), **self._tiers.holders()}

    def picture(self, most_sessions: int, of: tuple[str, str] | None = None) -> KvPicture:
        canary, disk = self._canary, self._tiers.disk()
        return replace(
            super().picture(most_sessions, of),
            disk=None if disk is None else disk_picture(disk),
            canary=CanaryPicture(
                canary.compared_total,
                canary.worst if math.isfinite(canary.worst) else None,
                self._tiers.quarantined,
                canary.compared_age_s(),
                canary.dropped_total,
            ),
            recall=self._tiers.recalled(),
        )

    def _waiting(self) -> list[Owner]:
        """The sessions whose request was not begun, the oldest first."""
        return [
            session_of(lease)
            for name, lease in self._leases_asked.items()
            if (request := self._requests[name]).status == RequestStatus.WAITING and not request.num_computed_tokens
        ]

    def _expected(self, now: float, most: int) -> list[tuple[Owner, float]]:
        return cast("list[tuple[Owner, float]]", self.policy.expected(now=now, most=most))

    def _asked_lease(self, request: Request) -> Lease | None:
        lease = super()._asked_lease(request)
        return None if lease is not None and session_of(lease) == _CANARY else lease

    def _tier_tokens(self, request: Request, external_tokens: int) -> tuple[int, int]:
        if not external_tokens:
            return 0, 0
        sources: dict[CacheHitSource, int] = self.get_external_cache_hit_sources(  # type: ignore[attr-defined]
            request, external_tokens
        )
        if self._canary.is_due():
            self._note(request)
        dram_tokens = sources.get(CacheHitSource.HOST, 0)
        return dram_tokens, sum(sources.values()) - dram_tokens

    def _why_missed(self, request: Request, reason: str, found_tokens: int) -> str:
        lease = self._leases_asked[request.request_id]
        if lease.strict:
            return reason  # nothing of it was anywhere else
        if self._tiers.is_withheld(self._context_of(request), found_tokens):
            return "tier_fault"
        if self._tiers.is_lost(session_of(lease), found_tokens + self._block_size):
            return "quota"
        # A quota on the device cost nothing where a tier behind it had room.
        return "" if reason == "quota" else reason

    def _context_of(self, request: Request) -> ReqContext:
        return self._status_of(request).req_context

    def _status_of(self, request: Request) -> Any:
        """What vLLM's connector remembers of a request."""
        return self.connector_scheduler._req_status[request.request_id]  # type: ignore[attr-defined]

    # Restored equals recomputed.

    def canary(self) -> Request | None:
        """A request that computes a restored prompt's beginning again; None: there is none to compute now.

        Its answer goes nowhere: the front end knows no such request. Its KV is stored like that of any session,
        compared when it is in DRAM, and released.
        """
        sample = self._canary.take(idle=all(request.is_finished() for request in self._requests.values()))
        if sample is None:
            return None
        request = Request(
            request_id=f"canary-{secrets.token_hex(8)}",
            prompt_token_ids=list(sample.tokens),
            sampling_params=SamplingParams(temperature=0, max_tokens=1),
            pooling_params=None,
            cache_salt=secrets.token_hex(32),
            block_hasher=self._block_hasher,
        )
        request.kv_transfer_params = lease_params(Lease(_CANARY[1], _CANARY[0], 0.0))
        return request

    def _note(self, request: Request) -> None:
        """Keep what comes back for the beginning of a prompt of plain tokens, as it comes back."""
        if request.lora_request is not None or request.mm_features or request.prompt_token_ids is None:
            return
        lease = self._leases_asked[request.request_id]
        status = self._status_of(request)
        if status.req_context.get_state(Released) is not None:
            return
        most = min(MOST_TOKENS, len(request.prompt_token_ids) // self._block_size * self._block_size)
        restored = [
            (Place(group, end_token), row.numpy().tobytes())
            for _, end_token, key in status.load_key_ranges
            if (group := get_offload_group_idx(key)) in self._comparable
            and end_token <= most
            and (row := self._tiers.row(key)) is not None
        ]
        if restored:
            self._block_hasher = request._block_hasher
            tokens = request.prompt_token_ids[: max(place.end_token for place, _ in restored)]
            self._canary.note(Sample(session_of(lease), tuple(tokens), tuple(restored)))

    def _drop_canary_of(self, sessions: Collection[str]) -> None:
        if self._canary.released(sessions):
            self._tiers.release(frozenset({_CANARY[1]}))

    def _is_comparable(self, group: Any) -> bool:
        """Whether a group's chunks are the KV of its tokens, of one type, and nothing beside.

        What a sliding window or a recurrent state leaves for a token depends on the way to it.
        """
        spec = group.kv_cache_spec
        of_one_type = type(spec) in (FullAttentionSpec, MLAAttentionSpec) and spec.dtype == self._dtype
        return of_one_type and self._fills_its_rows(group)

    def _fills_its_rows(self, group: Any) -> bool:
        """Whether a group's chunks are as large as those of the largest, so that each fills its row in DRAM."""
        spec = group.kv_cache_spec
        is_padded = getattr(spec, "page_size_padded", None) is not None
        return not is_padded and spec.page_size_bytes * len(group.layer_names) == self._block_bytes

    def _compare(self, context: ReqContext) -> None:
        """The canary's KV is in DRAM: compare it."""
        if owner_of(context) != _CANARY:
            return
        keys = {
            Place(get_offload_group_idx(key), context.get_offload_key_position(key) or 0): key
            for key in self._tiers._chunks.order.keys_of(_CANARY)
        }
        places = self._canary.places()
        if any((key := keys.get(place)) is None or self._tiers.row(key) is None for place in places):
            return  # it is stored step by step

        def error_of(place: Place, restored: bytes) -> float | None:
            key = keys.get(place)
            computed = None if key is None else self._tiers.row(key)
            if computed is None:
                return None
            expected = computed.view(self._dtype).float()
            came_back = torch.frombuffer(bytearray(restored), dtype=torch.int8).view(self._dtype).float()
            return float((came_back - expected).norm() / expected.norm())

        agreed = self._canary.judge(error_of)
        self._tiers.release(frozenset({_CANARY[1]}))
        if not agreed and not self._tiers.quarantined:
            self._tiers.quarantine()
            logger.error(
                "KV that came back from a tier is not what the model computes (error %.3g): nothing is restored any "
                "more. Sessions go on and are computed again. %s",
                self._canary.worst,
                _REMEDY,
            )


class TieredStateConnector(TieredRetention, OffloadingConnector):  # type: ignore[misc]
    """What vLLM loads with tiers: leases on the device, and vLLM's own connector behind them."""
