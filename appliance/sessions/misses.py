"""Why a prompt's tokens had to be computed: an account of every turn, exact to the token.

A prompt is a row of positions. Those that the engine found are served; every other one has one cause. Seen from the
turn before: what is beyond its history is new; what lies where the two part is diverged; what they share can be found
again up to its last full block, and the rest of that block is its tail; what could have been found and was not was
lost, and that has a cause of its own.

Rules:

- Pure, and exact: what was served and what was computed for every cause add up to the prompt.
- What is not known is `UNKNOWN`. Nothing is called expired or evicted because it is missing.
- Of a message that changed it is told which, whose, and what kind of change; never a word of it.
- Two messages are the same if the model's template sees the same: `divergence_of` says what is certain of a place.
"""

import enum
import re
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Final, NamedTuple, Self

from pydantic_core import from_json

from appliance.sessions.harness_lines import without_harness_lines
from appliance.sessions.history import canonical_message
from appliance.sessions.turn import Message

# What counts, names a day or tells one run from another: digits, names of days and months, halves of a day, and words
# of hexadecimal digits with a digit among them, as in UUIDs and hashes.
_CHANGEABLE: Final = re.compile(
    r"\b[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\b|\b(?=[0-9a-f]*[0-9])[0-9a-f]{6,}\b|[0-9]+"
    r"|\b(?:mon|tues|wednes|thurs|fri|satur|sun)day\b|\b(?:mon|tue|wed|thu|fri|sat|sun)\b"
    r"|\b(?:january|february|march|april|may|june|july|august|september|october|november|december)\b"
    r"|\b(?:jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec)\b|\b[ap]m\b",
    re.IGNORECASE,
)
_ENOUGH_TO_KNOW: Final = 3  # messages that come again in the same order
_FAR: Final = 256  # how many messages are looked through for one that moved
_ENOUGH_TOKENS: Final = 8  # that come again in the same order
_MOST_COMPARED: Final = 65_536  # characters of lines that differ, of one message: a turn is not held up by more
_OFTEN: Final = 2  # turns of a session in which the same thing destroyed its prefix


class Cause(enum.StrEnum):
    """Why tokens of a prompt were computed."""

    FIRST_TURN = "first_turn"  # the session had none before
    NEW = "new"  # behind the history that the engine knew
    DIVERGED = "diverged"  # the history is not the one of the turn before
    BLOCK_TAIL = "block_tail"  # only full blocks can be found again
    MODEL_CHANGED = "model_changed"
    ENGINE_RESTARTED = "engine_restarted"
    OTHER_REPLICA = "other_replica"  # the turn before ran on another replica's engine
    ENDED = "ended"  # its client had said that the session was over
    SALT_CHANGED = "salt_changed"  # a session of its tree was forgotten
    CONCURRENT = "concurrent"  # the turn before still ran, and what could be found of it is not known
    EXPIRED = "expired"  # the turn came after its lease had run out, and what it had was gone by then
    EVICTED = "evicted"  # gone while its lease ran: others wanted the room
    QUOTA = "quota"  # more than its tenant or its session may keep
    TIER_FAULT = "tier_fault"  # a tier had it and could not give it back
    TEMPLATE_CHANGED = "template_changed"  # the same messages, written by another chat template
    UNKNOWN = "unknown"


class Change(enum.StrEnum):
    """What kind of change made two histories part."""

    NUMBERS = "numbers"  # the same text with another date, time, counter or id in it
    HARNESS_LINE = "harness_line"  # the same text but for a line that a harness writes anew for every call
    WHITESPACE = "whitespace"
    CONTENT = "content"
    TOOL_CALLS = "tool_calls"
    REASONING_DROPPED = "reasoning_dropped"
    REASONING_LEFT_OUT = "reasoning_left_out"  # it came back, and the template does not write it
    FIELDS = "fields"  # no message says anything else, but names or ids in one changed, which some templates write
    INSERTED = "inserted"
    REMOVED = "removed"
    REPLACED = "replaced"  # from there on the history is another one: compaction, an edit
    TOOLS_REORDERED = "tools_reordered"
    TOOLS_CHANGED = "tools_changed"
    PARAMETERS = "parameters"  # no message changed, but what else a template can read did
    SEVERAL = "several"  # more than one of those above, and it is not certain which of them is at that place
    PROMPT = "prompt"  # of a completion, which has no messages
    ANSWER_REWRITTEN = "answer_rewritten"  # the answer came back as other tokens than were generated
    TEMPLATE = "template"  # no message changed: the template writes the same messages otherwise


REMEDIES: Final[Mapping[Change | Cause, str]] = {
    Change.NUMBERS: "A date, a time, a counter or an id changes within the message: put it at the end of the "
    "conversation, or leave it out.",
    Change.HARNESS_LINE: "The agent's harness writes a line of its own accounting into the message, another one for "
    "every call: have it leave that out, or allow the tenant to have it taken out (`holdfast tenant set NAME "
    "--take-out-harness-lines on`).",
    Change.WHITESPACE: "The message comes back with other spaces or line ends: send it exactly as before.",
    Change.CONTENT: "The message comes back changed: append what is new instead of rewriting what was said.",
    Change.TOOL_CALLS: "Tool calls come back changed: send the answer's `tool_calls` back as they were.",
    Change.REASONING_DROPPED: "Answers come back without their reasoning: send `reasoning` back, or use a template "
    "that keeps it out of the history from the start.",
    Change.REASONING_LEFT_OUT: "The model's chat template leaves the reasoning of earlier answers out: use a template "
    "that keeps it, or ask for less reasoning in long sessions.",
    Change.FIELDS: "Fields of the message come and go: send the same ones every time.",
    Change.INSERTED: "A message is put in between: append it instead.",
    Change.REMOVED: "A message is taken out: keep it, or begin a new session.",
    Change.REPLACED: "The history is rewritten (compaction, an edit). Do it seldom and much at a time.",
    Change.TOOLS_REORDERED: "The same tools come in another order: send them in a fixed one.",
    Change.TOOLS_CHANGED: "The list of tools changes: keep it the same through a session.",
    Change.PARAMETERS: "What a chat template can read beside the messages changes (`reasoning_effort`, "
    "`response_format`, `tool_choice`): keep it the same through a session.",
    Change.SEVERAL: "Tools, parameters or earlier messages change together: keep all of them as they were, and append.",
    Change.PROMPT: "The prompt does not begin as the one before: append to it.",
    Change.ANSWER_REWRITTEN: "Answers come back as other tokens than were generated. If a client trims or reformats "
    "them, send them back as they were.",
    Change.TEMPLATE: "The model's chat template writes earlier messages otherwise once others follow; another template "
    "does not.",
    Cause.CONCURRENT: "The session is asked again before its last turn is over: wait for it, or begin a session for "
    "each of what runs at once.",
    Cause.EXPIRED: "The session pauses for longer than its idle timeout. While a lease runs, what a session has "
    "outranks what others had: a longer `sessions.idle_timeout_s` may keep it, as far as there is room.",
    Cause.EVICTED: "Others wanted the room while the session was due: give the engine more room, or run fewer "
    "sessions.",
    Cause.QUOTA: "The tenant, or the session, had more than it may keep: raise its quota, or run fewer sessions.",
    Cause.TIER_FAULT: "A tier could not give back what it had: `holdfast kv status` says which, and what is wrong.",
    Cause.TEMPLATE_CHANGED: "The model's chat template was changed between two turns: change it while no session is "
    "due to go on.",
    Cause.ENDED: "The client says that the session is over and goes on with it: say so with its last call only.",
    Cause.SALT_CHANGED: "A session of the same tree was forgotten, and what the tree had on the engine with it.",
    Cause.ENGINE_RESTARTED: "The engine was started again, and nothing on the device survives that.",
    Cause.OTHER_REPLICA: "The session's turns go to several replicas, and each has what it computed itself: have what "
    "stands before them send a session to the same one.",
    Cause.MODEL_CHANGED: "The session changed its model: what one computed is of no use to another.",
}
"""What can be done about what destroys prefixes."""


LOST_FOR: Final[Mapping[str, Cause]] = {
    cause.value: cause for cause in (Cause.EVICTED, Cause.EXPIRED, Cause.QUOTA, Cause.TIER_FAULT)
}
"""What the engine may say of why blocks of earlier turns were not there."""


class Served(NamedTuple):
    """From where the engine had the tokens of a prompt that it did not compute.

    Attributes:
        lost_for: why what earlier turns left was not all there: one of `LOST_FOR`; empty: it was, or nobody knows.
    """

    device_tokens: int
    dram_tokens: int
    disk_tokens: int
    lost_for: str = ""

    def by_tier(self) -> dict[str, int]:
        """The tokens, by the tiers' names."""
        return {"device": self.device_tokens, "dram": self.dram_tokens, "disk": self.disk_tokens}


@dataclass(frozen=True, slots=True)
class Circumstances:
    """What held on the engine when a turn ran. None: not known.

    Attributes:
        block_size: tokens.
        engine: tells one life of the engine from another.
        idle_timeout_s: of the session's lease.
        epoch: of the session's tree, which its salt is made with.
        was_over: its client had said that the session was over.
        served_known: the engine said how much of the prompt it found; not of a turn that was broken off.
        template: tells one chat template from another.
        served: from where, where that is certain.
        paused_s: since the turn before was over, by a clock that nobody sets; negative: it still ran.
        replica: tells the replica whose engine it was from others that share the database.
        first_token_s: from when the engine was to be asked until the first token came; not of an answer in one piece.
    """

    block_size: int | None = None
    engine: str | None = None
    idle_timeout_s: float | None = None
    epoch: int | None = None
    was_over: bool = False
    served_known: bool = True
    template: str | None = None
    served: Served | None = None
    paused_s: float | None = None
    replica: str | None = None
    first_token_s: float | None = None

    def to_wire(self) -> list[Any]:
        """As it is written down with a turn."""
        return [
            self.block_size,
            self.engine,
            self.idle_timeout_s,
            self.epoch,
            self.was_over,
            self.served_known,
            self.template,
            None if self.served is None else list(self.served),
            self.paused_s,
            self.replica,
            self.first_token_s,
        ]

    @classmethod
    def from_wire(cls, said: Sequence[Any] | None) -> Self:
        """As it was written down; nothing is known of turns that were written down without it, or without a part."""
        if said is None:
            return cls()
        known = dict(zip(_CIRCUMSTANCES, said, strict=False))
        served = known.get("served")
        return cls(**known | {"served": None if served is None else Served(*served)})


_CIRCUMSTANCES: Final = tuple(field.name for field in fields(Circumstances))


@dataclass(frozen=True, slots=True)
class Ran:
    """A turn as the engine saw it.

    Attributes:
        token_ids: of the prompt, then those generated.
        prompt_tokens: how many of them are the prompt's.
        cached_tokens: of the prompt, found on the engine; None: it did not get to say.
        started_at, ended_at: epoch seconds.
    """

    model: str
    token_ids: "array[int]"
    prompt_tokens: int
    cached_tokens: int | None
    started_at: float
    ended_at: float
    circumstances: Circumstances


@dataclass(frozen=True, slots=True)
class Divergence:
    """Where a history parted from the one before.

    Attributes:
        token: of the prompt, counted from 0.
        message: counted from 1; None: it is in no message.
        role: of that message.
    """

    token: int
    message: int | None
    role: str | None
    change: Change


@dataclass(frozen=True, slots=True)
class Account:
    """What became of a prompt's tokens.

    Attributes:
        served_tokens: 0 also where it is not known how many.
        diverged_at: the first token that is not that of the turn before; None: all of that was continued.
        served: from where; None: that is not certain.
        repeated_tokens: of the prompt's beginning, those that the turn before had as well; 0 also where none is known.
        divergence: what is at `diverged_at`; None also where nobody looked.
    """

    prompt_tokens: int
    served_tokens: int
    computed: Mapping[Cause, int]
    diverged_at: int | None = None
    served: Served | None = None
    repeated_tokens: int = field(default=0, compare=False)
    divergence: Divergence | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that destroyed a session's prefix again and again.

    Attributes:
        what: a change, or a cause.
        turns: in which it did.
        tokens: that were computed for it.
    """

    what: Change | Cause
    message: int | None
    role: str | None
    turns: Sequence[int]
    tokens: int
    remedy: str


@dataclass(frozen=True, slots=True)
class ExplainedTurn:
    """One turn's account, where its history parted from the one before, if it did, and what it took.

    Attributes:
        first_token_s: as in its `Circumstances`.
    """

    number: int
    started_at: float
    account: Account
    divergence: Divergence | None = field(default=None)
    first_token_s: float | None = None


def account_of(
    before: Ran | None,
    now: Ran,
    *,
    shared: int | None = None,
    first: bool = True,
    history_came_again: bool = False,
) -> Account:
    """The account of the turn `now`.

    Args:
        before: the turn before it in its session; None: there was none, or nothing is known of it.
        shared: how many tokens both begin with, where the caller knows.
        first: without `before`: there was none.
        history_came_again: every message of the turn before, its answer too, came again as it was.
    """
    account = _account(before, now, shared=shared, first=first, history_came_again=history_came_again)
    served = now.circumstances.served
    if served is None or now.cached_tokens is None or sum(served.by_tier().values()) != account.served_tokens:
        return account
    return replace(account, served=served)


def _account(before: Ran | None, now: Ran, *, shared: int | None, first: bool, history_came_again: bool) -> Account:
    prompt, served = now.prompt_tokens, min(now.cached_tokens or 0, now.prompt_tokens)
    if before is None or not before.token_ids or len(now.token_ids) < prompt:
        is_first = before is None and first and now.cached_tokens is not None
        return Account(prompt, served, _counted([(Cause.FIRST_TURN if is_first else Cause.UNKNOWN, prompt)], served))
    known = len(before.token_ids)
    if before.model != now.model:
        # Nothing that one model computed is of use to another: where the two histories part does not matter.
        cause = Cause.UNKNOWN if now.cached_tokens is None else Cause.MODEL_CHANGED
        return Account(prompt, served, _counted([(cause, min(known, prompt)), (Cause.NEW, prompt)], served))
    if shared is None:
        shared = shared_tokens(before.token_ids, now.token_ids)
    shared = min(shared, prompt)
    parted = shared < known and shared < prompt
    block_size = now.circumstances.block_size
    # The engine computes the last token of a prompt in any case, and never the last one that it generated.
    has_kv = known - 1 if known > before.prompt_tokens else known
    most = max(0, min(shared, has_kv, prompt - 1))
    findable = most // block_size * block_size if block_size else served
    templates = before.circumstances.template, now.circumstances.template
    rewritten = history_came_again and None not in templates and templates[0] != templates[1]
    ranges = [
        (_lost(before, now), findable),
        (Cause.BLOCK_TAIL if block_size else Cause.UNKNOWN, shared),
        (Cause.TEMPLATE_CHANGED if rewritten else Cause.DIVERGED, min(known, prompt) if parted else shared),
        (Cause.NEW, prompt),
    ]
    diverged_at = shared if parted and not rewritten else None
    return Account(prompt, served, _counted(ranges, served), diverged_at, repeated_tokens=shared)


def shared_tokens(left: "array[int]", right: "array[int]") -> int:
    """The length of the beginning that two rows of token ids have in common."""
    low, high = 0, min(len(left), len(right))
    if left[:high] == right[:high]:
        return high
    while low < high:
        middle = (low + high + 1) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def divergence_of(
    account: Account,
    before: tuple[Sequence[Message], Mapping[str, Any], int],
    now: tuple[Sequence[Message], Mapping[str, Any]],
    *,
    same_messages: int = 0,
    token_ids: "tuple[array[int], array[int]] | None" = None,
) -> Divergence | None:
    """Where, in which message and how a turn parted from the one before it; None: it did not.

    The place is exact, for it is read from the tokens. What is there is told from what both turns sent, which is
    certain in these cases:

    - The place is in the tokens that were generated: all that had been sent came again as it was. It is the answer that
      changed, or else its text became other tokens than were generated.
    - Before that: the first message that differs in what a template sees is named where it is all that changed, or
      earlier messages are the same and only later ones changed too. Where tools or parameters changed as well, or a
      template need not have written what changed first, it is `Change.SEVERAL`, and no message is named.
    - Nothing of that changed, and no name and no id: it is the template.

    Args:
        before: the messages of the turn before with its answer, its parameters, the length of its prompt in tokens.
        now: the messages and the parameters.
        same_messages: so many messages at the beginning are known to be the same in both.
        token_ids: of the turn before, prompt and answer, and of the prompt now.
    """
    if account.diverged_at is None:
        return None
    old, old_parameters, old_prompt = before
    new, parameters = now
    token = account.diverged_at
    if not new or "prompt" in old_parameters:
        return Divergence(token, None, None, Change.PROMPT)
    if token >= old_prompt:
        at = len(old) - 1
        if at < len(new) and _alike(old[at], new[at]):
            if _reasoning(old[at]) and token_ids is not None and _is_left_out(*token_ids, token):
                return Divergence(token, at + 1, _role(new[at]), Change.REASONING_LEFT_OUT)
            return Divergence(token, None, None, Change.ANSWER_REWRITTEN)
        return _message_divergence(token, old, new, at)
    both = min(len(old), len(new))
    at = next((place for place in range(same_messages, both) if not _alike(old[place], new[place])), both)
    differs = at < len(old)
    beside = _beside_messages(old_parameters, parameters)
    if differs and (beside or _is_unsure(old, new, at)):
        return Divergence(token, None, None, Change.SEVERAL)
    if differs:
        return _message_divergence(token, old, new, at)
    if beside:
        return Divergence(token, None, None, beside)
    at = next((place for place in range(same_messages, both) if _names(old[place]) != _names(new[place])), both)
    if at < both:
        return Divergence(token, at + 1, _role(new[at]), Change.FIELDS)
    if any(map(_reasoning, old)) and token_ids is not None and _is_left_out(*token_ids, token):
        return Divergence(token, None, None, Change.REASONING_LEFT_OUT)
    return Divergence(token, None, None, Change.TEMPLATE)


def findings_of(turns: Sequence[ExplainedTurn]) -> list[Finding]:
    """What destroyed the prefix in several turns, what cost most first."""
    places: dict[tuple[Change | Cause, int | None, str | None], list[tuple[int, int]]] = {}
    for turn in turns:
        for what, message, role, tokens in _destroyers(turn):
            places.setdefault((what, message, role), []).append((turn.number, tokens))
    found = [
        Finding(what, message, role, [turn for turn, _ in where], sum(tokens for _, tokens in where), REMEDIES[what])
        for (what, message, role), where in places.items()
        if len(where) >= _OFTEN
    ]
    return sorted(found, key=lambda finding: -finding.tokens)


def _destroyers(turn: ExplainedTurn) -> Iterator[tuple[Change | Cause, int | None, str | None, int]]:
    computed = turn.account.computed
    if turn.divergence is not None:
        where = turn.divergence
        fixed = where.role in ("system", "developer")  # another one each time is not the same thing again
        tokens = computed.get(Cause.DIVERGED, 0)
        yield where.change, where.message if fixed else None, where.role, tokens
    for cause in (
        Cause.CONCURRENT,
        Cause.EXPIRED,
        Cause.EVICTED,
        Cause.QUOTA,
        Cause.TIER_FAULT,
        Cause.ENGINE_RESTARTED,
        Cause.OTHER_REPLICA,
        Cause.MODEL_CHANGED,
        Cause.TEMPLATE_CHANGED,
        Cause.ENDED,
        Cause.SALT_CHANGED,
    ):
        if tokens := computed.get(cause, 0):
            yield cause, None, None, tokens


def _lost(before: Ran, now: Ran) -> Cause:
    """Why what could have been found was not."""
    if now.cached_tokens is None:
        return Cause.UNKNOWN
    here, there = now.circumstances, before.circumstances
    said = Cause.UNKNOWN if here.served is None else LOST_FOR.get(here.served.lost_for, Cause.UNKNOWN)
    if said is Cause.TIER_FAULT:
        return said  # it was there, whatever happened to the device's
    if here.engine is None or there.engine is None:
        return Cause.UNKNOWN
    if here.replica != there.replica and None not in (here.replica, there.replica):
        return Cause.OTHER_REPLICA
    if here.engine != there.engine:
        return Cause.ENGINE_RESTARTED if here.replica == there.replica else Cause.UNKNOWN
    if here.was_over:
        return Cause.ENDED
    if here.epoch != there.epoch:
        return Cause.SALT_CHANGED
    # What two gateways ran one after the other, only the wall clock can tell.
    paused_s = now.started_at - before.ended_at if here.paused_s is None else here.paused_s
    if paused_s < 0:
        return Cause.CONCURRENT
    if said is not Cause.UNKNOWN:
        return said
    if there.idle_timeout_s is None:
        return Cause.UNKNOWN
    return Cause.EXPIRED if paused_s > there.idle_timeout_s else Cause.EVICTED


def _counted(ranges: Sequence[tuple[Cause, int]], served: int) -> dict[Cause, int]:
    """How many tokens each cause has, of ranges that follow one another, each with its end; `served` of them first."""
    counts: Counter[Cause] = Counter()
    begin = served
    for cause, end in ranges:
        if end > begin:
            counts[cause] += end - begin
            begin = end
    return dict(counts)


def _beside_messages(old: Mapping[str, Any], new: Mapping[str, Any]) -> Change | None:
    """What changed of that which the engine hands to a template beside the messages (`api/openai/fields.py` has what
    passes; vLLM's `build_chat_params` what of it a template gets)."""
    old_tools, new_tools = old.get("tools") or [], new.get("tools") or []
    tools = _tools_change(old_tools, new_tools)
    names = ["reasoning_effort", "response_format"]
    if old_tools and new_tools:
        names.append("tool_choice")  # without tools it is not looked at
    if all(old.get(name) == new.get(name) for name in names):
        return tools
    return Change.SEVERAL if tools else Change.PARAMETERS


def _tools_change(old: Sequence[Any], new: Sequence[Any]) -> Change | None:
    if old == new:
        return None
    return Change.TOOLS_REORDERED if sorted(map(repr, old)) == sorted(map(repr, new)) else Change.TOOLS_CHANGED


def _alike(one: Message, other: Message) -> bool:
    """Whether a template sees the same in both."""
    if one is other or one == other:
        return True
    if one.get("role") != other.get("role"):
        return False
    said, says = one.get("content"), other.get("content")
    if isinstance(said, str) and isinstance(says, str) and said != says:
        return False  # by far the most of those that differ
    return _said(one) == _said(other) and _reasoning(one) == _reasoning(other)


def _said(message: Message) -> bytes:
    """What every template sees of a message; the engine reads a call's arguments before a template sees them."""
    content = message.get("content")
    if isinstance(content, list):
        content = [{"text": _part_text(part)} for part in content]
    calls = [_read_call(call) for call in message.get("tool_calls") or ()]
    return canonical_message({"role": message.get("role"), "content": content, "tool_calls": calls})


def _part_text(part: Any) -> Any:
    return part.get("text", part.get("refusal")) if isinstance(part, dict) else part


def _read_call(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        return call
    try:
        arguments = from_json(function.get("arguments") or "{}")
    except ValueError:
        arguments = {}
    return {"function": {"name": function.get("name"), "arguments": arguments if isinstance(arguments, dict) else {}}}


def _reasoning(message: Message) -> Any:
    given = message.get("reasoning")
    return (message.get("reasoning_content") if given is None else given) or ""


def _is_left_out(old: "array[int]", new: "array[int]", at: int) -> bool:
    """Whether what `new` has from `at` on stands further on in `old`: something in between was left out."""
    wanted, within, size = new[at : at + _ENOUGH_TOKENS].tobytes(), old[at + 1 :].tobytes(), old.itemsize
    if len(wanted) < _ENOUGH_TOKENS * size:
        return False
    found = within.find(wanted)
    while found >= 0 and found % size:
        found = within.find(wanted, found + 1)
    return found >= 0


def _names(message: Message) -> list[Any]:
    """What some templates write of a message beside what it says."""
    calls = message.get("tool_calls") or ()
    ids = [call.get("id") if isinstance(call, dict) else None for call in calls]
    return [message.get("name"), message.get("tool_call_id"), ids]


def _is_unsure(old: Sequence[Message], new: Sequence[Message], at: int) -> bool:
    """Whether a later message may be the one: at `at` it is only reasoning, which many templates leave out."""
    if at >= len(new) or _said(old[at]) != _said(new[at]):
        return False
    both = min(len(old), len(new))
    return both < len(old) or any(_said(old[place]) != _said(new[place]) for place in range(at + 1, both))


def _message_divergence(token: int, old: Sequence[Message], new: Sequence[Message], at: int) -> Divergence:
    return Divergence(token, at + 1, _role(new[at] if at < len(new) else old[at]), _message_change(old, new, at))


def _role(message: Message) -> str | None:
    role = message.get("role")
    return None if role is None else str(role)[:32]


def _message_change(old: Sequence[Message], new: Sequence[Message], at: int) -> Change:
    if at >= len(new):
        return Change.REMOVED
    was, is_now = old[at], new[at]
    if any(_come_again(old, place, new, at) for place in range(at + 1, min(len(old), at + 1 + _FAR))):
        return Change.REMOVED
    if any(_come_again(old, at, new, place) for place in range(at + 1, min(len(new), at + 1 + _FAR))):
        return Change.INSERTED
    if was.get("role") != is_now.get("role") or len(new) < len(old):
        return Change.REPLACED
    if _said({"content": was.get("content")}) != _said({"content": is_now.get("content")}):
        return _text_change(_text(was.get("content")), _text(is_now.get("content")))
    if _said(was) != _said(is_now):
        return Change.TOOL_CALLS
    return Change.REASONING_DROPPED if not _reasoning(is_now) else Change.CONTENT


def _come_again(old: Sequence[Message], old_at: int, new: Sequence[Message], new_at: int) -> bool:
    """Whether the messages of `old` from one place on, enough of them to know, are those of `new` from another."""
    count = min(_ENOUGH_TO_KNOW, len(old) - old_at)
    if len(new) - new_at < count:
        return False
    return all(_alike(old[old_at + further], new[new_at + further]) for further in range(count))


def _text(content: Any) -> str:
    if isinstance(content, list):
        return "\n".join(str(_part_text(part) or "") for part in content)
    return "" if content is None else str(content)


def _text_change(before: str, after: str) -> Change:
    if "".join(before.split()) == "".join(after.split()):
        return Change.WHITESPACE
    if without_harness_lines(before)[0] == without_harness_lines(after)[0]:
        return Change.HARNESS_LINE
    return Change.NUMBERS if _same_but_for_numbers(before, after) else Change.CONTENT


def _same_but_for_numbers(before: str, after: str) -> bool:
    """Whether only what may change differs. Nothing of that has a line end in it, so lines are compared one by one."""
    lines, others = before.split("\n"), after.split("\n")
    if len(lines) != len(others):
        return False
    left = _MOST_COMPARED
    for line, other in zip(lines, others, strict=True):
        if line == other:
            continue
        left -= max(len(line), len(other))
        if left < 0 or _CHANGEABLE.sub("0", line) != _CHANGEABLE.sub("0", other):
            return False
    return True
