"""What one request may and must find of another's prompt on the engine. Pure.

Both prompts are the same text: system messages, then a user's message.
"""

import enum
from collections.abc import Mapping
from typing import Final, NamedTuple

from appliance.identity import Isolation


class Pair(enum.StrEnum):
    """Who asks for a prompt that another request asked for before."""

    SAME_SESSION = "same session"
    SIBLING = "sibling in the tree"
    SAME_TENANT = "same tenant"  # another session of the same principal
    OTHER_KEY = "other key"  # another principal of the tenant
    OTHER_TENANT = "other tenant"
    FORGOTTEN = "after forgetting"  # the same session, which was forgotten


class Reach(enum.Enum):
    """How far into the prompt it finds blocks."""

    NOTHING = enum.auto()
    SYSTEM = enum.auto()  # the tools and the system messages, and no block that holds anything else
    AT_MOST_SYSTEM = enum.auto()  # that, or less
    EVERYTHING = enum.auto()


_OF_A_TREE: Final = {Pair.SAME_SESSION: Reach.EVERYTHING, Pair.SIBLING: Reach.EVERYTHING}
_ELSEWHERE: Final = {Pair.OTHER_TENANT: Reach.NOTHING, Pair.FORGOTTEN: Reach.NOTHING}
REACH: Final[Mapping[Isolation, Mapping[Pair, Reach]]] = {
    Isolation.SESSION: {
        **_OF_A_TREE,
        Pair.SAME_TENANT: Reach.NOTHING,
        Pair.OTHER_KEY: Reach.NOTHING,
        **_ELSEWHERE,
    },
    Isolation.TENANT_PREFIX: {
        **_OF_A_TREE,
        Pair.SAME_TENANT: Reach.SYSTEM,
        Pair.OTHER_KEY: Reach.SYSTEM,
        **_ELSEWHERE,
        Pair.FORGOTTEN: Reach.AT_MOST_SYSTEM,
    },
    Isolation.TENANT: {
        **_OF_A_TREE,
        Pair.SAME_TENANT: Reach.EVERYTHING,
        Pair.OTHER_KEY: Reach.EVERYTHING,
        **_ELSEWHERE,
    },
}


class Bounds(NamedTuple):
    """How many tokens must be found, and how many may be."""

    least: int
    most: int


def bounds(reach: Reach, *, system_tokens: int, prompt_tokens: int, block_size: int) -> Bounds:
    """What `reach` means for a prompt.

    Args:
        system_tokens: how many of its first tokens any prompt with these system messages has.
        block_size: tokens; only whole blocks are found, and of a whole prompt the last one may be computed again.
    """
    if reach is Reach.NOTHING:
        return Bounds(0, 0)
    if reach is Reach.EVERYTHING:
        return Bounds((prompt_tokens - 1) // block_size * block_size - block_size, prompt_tokens)
    most = system_tokens // block_size * block_size
    return Bounds(0 if reach is Reach.AT_MOST_SYSTEM else most - block_size, most)
