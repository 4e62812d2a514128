"""What of vLLM's own is done otherwise: salts in blocks' hashes, tiles and seeds on a CPU, full pools and resets."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from vllm.platforms import current_platform
from vllm.v1.core import block_pool, kv_cache_utils
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.request import Request

from appliance.engine.inside.range_salt import BlockSalt, salt_of_block, shared_prefix

_RANGE_SALTED = "holdfast_range_salted"
_DRAWS_WHAT_COUNTS = "holdfast_draws_what_counts"


def salt_by_range() -> None:
    """Have the hashes of blocks take the salts that `range_salt` says. Without this, all of a prompt is its session's.

    vLLM asks one function for what else than tokens goes into a block's hash, by its name in two modules.
    """
    unsalted = kv_cache_utils.generate_block_hash_extra_keys
    if hasattr(unsalted, _RANGE_SALTED):
        return

    def extra_keys(
        request: Request, start_token_idx: int, end_token_idx: int, start_mm_idx: int
    ) -> tuple[tuple[Any, ...] | None, int]:
        salt = salt_of_block(_shared_prefix_of(request), start_token_idx, end_token_idx)
        own = request.cache_salt
        if salt is BlockSalt.SHARED:
            request.cache_salt = _shared_prefix_of(request).salt
        try:
            keys, next_mm_idx = unsalted(request, start_token_idx, end_token_idx, start_mm_idx)
        finally:
            request.cache_salt = own
        if salt is BlockSalt.OWN:
            keys = (*(keys or ()), ("cache_salt", own))
        return keys, next_mm_idx

    setattr(extra_keys, _RANGE_SALTED, True)
    for module in (kv_cache_utils, block_pool):
        module.generate_block_hash_extra_keys = extra_keys


def _shared_prefix_of(request: Request) -> Any:
    """Found out once for each request, when it is made: its first blocks are hashed then."""
    try:
        return request.holdfast_shared_prefix
    except AttributeError:
        found = shared_prefix(request.kv_transfer_params, request.cache_salt, request.prompt_token_ids)
        request.holdfast_shared_prefix = found
        return found


def ask_for_tiles() -> None:
    """Have Linux let this process use the tile registers (AMX) of its CPU, where it has them.

    Who uses them unasked is killed (`ARCH_REQ_XCOMP_PERM`, Documentation/arch/x86/xstate.rst). vLLM leaves the asking
    to oneDNN's first large matrix product, and its attention on tiles may come before that: in an engine whose first
    prompt was found on the disk nearly whole.
    """
    if current_platform.is_cpu() and torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()


def draw_only_for_tokens_that_count() -> None:
    """On a CPU, have a request's seed drawn from only where its token is kept. Safe to call more than once.

    vLLM samples for every request of a step, for one whose prompt goes on in the next step too. It discards that token,
    and then puts the request's generator back by its offset, which a CPU's generator does not have: the engine ends.
    So such a request's generator is kept from the step.
    """
    if not current_platform.is_cpu():
        return
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner  # which the front end's process never imports

    if hasattr(CPUModelRunner, _DRAWS_WHAT_COUNTS):
        return

    def with_those_that_count(part: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(part)
        def of_a_step(self: CPUModelRunner, *arguments: Any, **named: Any) -> Any:
            generators = self.input_batch.generators
            discarded = self.discard_request_mask.np[: self.input_batch.num_reqs].nonzero()[0].tolist()
            kept_back = {index: generators.pop(index) for index in discarded if index in generators}
            try:
                return part(self, *arguments, **named)
            finally:
                generators.update(kept_back)

        return of_a_step

    CPUModelRunner._sample = with_those_that_count(CPUModelRunner._sample)
    CPUModelRunner._bookkeeping_sync = with_those_that_count(CPUModelRunner._bookkeeping_sync)
    setattr(CPUModelRunner, _DRAWS_WHAT_COUNTS, True)


def release_leases_before_reset(kv_cache_manager: KVCacheManager, release_all: Callable[[], None]) -> None:
    """A reset of the prefix cache fails while anything is referenced; leases must not be what stops it."""
    reset_prefix_cache = kv_cache_manager.reset_prefix_cache

    def reset() -> bool:
        release_all()
        done: bool = reset_prefix_cache()
        return done

    kv_cache_manager.reset_prefix_cache = reset


def make_room_where_there_is_none(kv_cache_manager: KVCacheManager, leases: Any) -> None:
    """vLLM asks one function for the blocks of every request, waiting or running: where it has none, leases yield.

    Where it is asked from is many places, each with a reckoning of its own (watermarks, what a load must leave, prompts
    let in whole or in parts): nothing of that is foreseen here.

    Args:
        leases: whose `make_room` takes what `allocate_slots` takes, and says whether it is worth asking again.
    """
    allocate = kv_cache_manager.allocate_slots

    def allocate_slots(request: Request, num_new_tokens: int, **how: Any) -> Any:
        blocks = allocate(request, num_new_tokens, **how)
        if blocks is None and leases.make_room(request, num_new_tokens, **how):
            blocks = allocate(request, num_new_tokens, **how)
        return blocks

    kv_cache_manager.allocate_slots = allocate_slots
