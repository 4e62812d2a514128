"""The proof: asks as made-up tenants, and compares what was found on the engine with what had to be.

Rules:

- It fails when anything is shared that must not be, and as well when something is not shared that should be: a proof
  that passes on an engine that caches nothing proves nothing.
- In the tiers behind the device too, and in each: controls show what a tier had (`judgement`).
- What cannot be told, or was not looked at, is `UNKNOWN`, with the reason, and a tier that is not configured is said to
  be that. Neither is a pass.
- Everything asked is made up and differs from anything asked before. The tenants are throwaways: they are removed
  whatever happens, at the next start if not before.
- Times are compared by a test with a stated error: see `_timing`.
"""

import asyncio
import random
import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

from pydantic_core import from_json, to_json

from api.app import create_app
from api.engine_leases import release
from api.forgetting import forget_session
from api.openai.prefixes import RENDER_PATH
from api.proving.added import Added, GrowingLog
from api.proving.asking import TIERS, Asker, Said
from api.proving.expectations import REACH, Bounds, Pair, bounds
from api.proving.judgement import Verdict, judged, shows
from api.proving.statistics import mann_whitney_p, shift
from api.services import Services
from api.trail import actor_of
from appliance.audit import Event
from appliance.audit.events import KEY_CREATED, TENANT_CREATED, TENANT_REMOVED, EventClass
from appliance.audit.reading import LogReader
from appliance.audit.search import Query, search
from appliance.errors import Fault, HoldfastError
from appliance.identity import Caller, Isolation, Principal, Role, Scopes, Tenant
from appliance.sessions import Session, SessionHints, Turn, TurnKind

ALPHA: Final = 0.01
ROUNDS: Final = 24
_PROMPT_TOKENS: Final = 1024
_LEAST_BLOCKS: Final = 8  # of a prompt: half of them system, half of them a user's
_PROMPTS_IN_POOL: Final = 6  # have to fit into the pool at once
_ANSWER_TOKENS: Final = 24
_ATTEMPTS: Final = 3
_ASK_AGAIN_S: Final = 0.05  # whether a tier has what was asked for
_STORED_WITHIN_S: Final = 30.0
_LOGS: Final = ("gateway", "engine")
_MOST_EVENTS: Final = 100_000


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at.

    Attributes:
        mode: of the tenants that asked; empty: of every mode.
        tier: of the engine; empty: of none, or of all together.
        expected, found: in words, with units.
    """

    name: str
    verdict: Verdict
    expected: str
    found: str
    mode: str = ""
    tier: str = ""


class TooBusyToProve(HoldfastError):
    """Too much else runs, or the engine has too little room: whatever was found could be due to that."""

    code: ClassVar[str] = "too_busy_to_prove"
    fault: ClassVar[Fault] = Fault.UNAVAILABLE


@dataclass(frozen=True, slots=True)
class _Text:
    """A made-up prompt."""

    system: str
    user: str

    @property
    def messages(self) -> list[dict[str, str]]:
        return [{"role": "system", "content": self.system}, {"role": "user", "content": self.user}]


@dataclass(frozen=True, slots=True)
class _Party:
    """A throwaway tenant, one of its principals, and a way to ask as that."""

    tenant: Tenant
    caller: Caller
    asker: Asker
    secret: str


@dataclass(frozen=True, slots=True)
class _Prompts:
    """What is asked for in one mode to be found in one tier: a prompt for each pair, and the controls' two.

    Attributes:
        one: who asks for everything first.
        other: another principal of the same tenant.
        stranger: of another tenant.
        controls: asked for just before the others, and just after.
        asked: the sessions that asked for them first, by what their prompts are called.
    """

    mode: Isolation
    one: _Party
    other: _Party
    stranger: _Party
    of_pairs: Mapping[Pair, _Text]
    controls: tuple[_Text, _Text]
    asked: dict[str, Session] = field(default_factory=dict)


async def prove_isolation(services: Services, administrator: Caller, *, rounds: int = ROUNDS) -> list[Check]:
    """Every check, on the system as it runs.

    Args:
        rounds: how often each of the three times is taken.

    Raises:
        TooBusyToProve: nothing could be told now.
        HoldfastError: a request of the proof failed.
    """
    proof = _Proof(services, administrator)
    try:
        await proof.prepare()
        return [
            *await proof.pairs(),
            *await proof.other_tiers(),
            *await proof.timing(rounds),
            *await proof.crossing(),
            *await proof.words(),
        ]
    finally:
        removing = asyncio.create_task(proof.remove())
        try:
            await asyncio.shield(removing)
        finally:
            await asyncio.wait((removing,))  # another proof may begin when this one is over: not before


class _Proof:
    def __init__(self, services: Services, administrator: Caller) -> None:
        self._services = services
        self._administrator = administrator
        self._app = create_app(services)
        self._model = ""
        self._block_size = 0
        self._words = 0  # of a text of half a prompt
        self._parties: list[_Party] = []
        self._texts: list[str] = []
        self._began_ns = int(services.now() * 1e9)
        self._logs: dict[str, GrowingLog] = {}
        self._forgotten: list[str] = []  # sessions that the engine was not told of

    # Before and after

    async def prepare(self) -> None:
        services = self._services
        folder = services.settings.state_dir / "log"
        for name in _LOGS:  # before anything is asked
            self._logs[name] = await asyncio.to_thread(GrowingLog, folder / f"{name}.log")
        if not services.watch.ready or not services.watch.models:
            raise _too_busy("the engine does not serve", "`holdfast status` says why; prove it again when it does")
        report = await services.engine.leases()
        at_once = max(1, services.settings.engine.max_num_seqs // 2)
        if len(services.lifecycle.turns) >= at_once:
            raise _too_busy(f"{len(services.lifecycle.turns)} turns run", "Prove it again when less is asked")
        card = services.watch.models[0]
        self._model, self._block_size = card.id, report.block_size
        room = (report.free_blocks + report.leased_blocks) // _PROMPTS_IN_POOL
        wanted = min(_PROMPT_TOKENS, (card.max_model_len or _PROMPT_TOKENS) // 2) // self._block_size
        blocks = min(wanted, room)
        if blocks < _LEAST_BLOCKS:
            raise _too_busy(
                f"{_PROMPTS_IN_POOL} prompts of {_LEAST_BLOCKS} blocks must fit, and {report.free_blocks} of "
                f"{report.total_blocks} blocks are free",
                "Prove it again when less is asked, or give the engine more room",
            )
        probe = _made_up(8)
        per_word = len(await self._rendered(_Text(probe, probe))) / 16
        self._words = max(1, int(blocks * self._block_size / 2 / per_word))
        await self._remove_all()

    async def remove(self) -> None:
        services = self._services
        for log in self._logs.values():
            log.close()
        for party in self._parties:
            if party.caller.key is not None:
                await services.identity.revoke_key(party.caller.key.key_id)
        await self._release(self._parties)
        await self._remove_all()

    async def _labels(self, parties: Sequence[_Party]) -> list[str]:
        """What the engine calls the sessions of the parties' tenants, those that were forgotten too."""
        labels = list(self._forgotten)
        for tenant_id in {party.tenant.tenant_id for party in parties}:
            known = await self._services.sessions.summaries(self._administrator, tenant_id=tenant_id, limit=1000)
            labels += [each.lease_label for each in known]
        return labels

    async def _release(self, parties: Sequence[_Party]) -> None:
        """Have the engine let go of what the parties' tenants have: nobody asks for it any more."""
        await release(self._services, await self._labels(parties))
        self._forgotten.clear()

    async def _remove_all(self) -> None:
        removed = await self._services.throwaways.remove_all()
        for tenant_id in removed:
            self._services.ledger.forget_tenant(tenant_id)
            self._services.metrics.forget_tenant(tenant_id)
        if removed:
            await self._record(*(self._for_proof(TENANT_REMOVED, ("tenant", each), each) for each in removed))
            await self._services.throwaways.recorded(removed)

    async def _record(self, *events: Event) -> None:
        await self._services.audit.record(*events, privileged=True)

    def _for_proof(self, kind: EventClass, target: tuple[str, str], tenant_id: str) -> Event:
        """Something that is done because the administrator asked for a proof."""
        return Event(kind, actor_of(self._administrator), tenant_id=tenant_id, target=target)

    async def _tenant(self, mode: Isolation, *, idle_timeout_s: float | None = None) -> Tenant:
        name = f"proof {secrets.token_hex(8)}"
        tenant = await self._services.throwaways.create_tenant(
            self._services.identity, name, isolation=mode, idle_timeout_s=idle_timeout_s
        )
        await self._record(self._for_proof(TENANT_CREATED, ("tenant", tenant.tenant_id), tenant.tenant_id))
        return tenant

    async def _party(self, tenant: Tenant, principal: Principal | None = None) -> _Party:
        identity = self._services.identity
        if principal is None:
            principal = await identity.create_principal(tenant, f"proof {secrets.token_hex(4)}", Role.CLIENT)
        key, secret = await identity.create_key(principal, Scopes())
        await self._record(self._for_proof(KEY_CREATED, ("key", key.key_id), tenant.tenant_id))
        host = self._services.settings.gateway.allowed_hosts[0]
        party = _Party(tenant, Caller(principal, tenant, key), Asker(self._app, host, secret, self._model), secret)
        self._parties.append(party)
        return party

    # Texts

    def _text(self, words: int | None = None) -> _Text:
        text = _Text(_made_up(words or self._words), _made_up(words or self._words))
        self._texts += [text.system, text.user]
        return text

    async def _rendered(self, text: _Text) -> list[int]:
        body = to_json({"model": self._model, "messages": text.messages})
        _, answer = await self._services.engine.call(RENDER_PATH, body, request_id=secrets.token_hex(8))
        token_ids: list[int] = from_json(answer)["token_ids"]
        return token_ids

    async def _system_tokens(self, text: _Text) -> int:
        """How many tokens begin every prompt with the system message of `text`, whatever its user says."""
        one, other = await self._rendered(text), await self._rendered(_Text(text.system, _made_up(self._words)))
        return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))

    # What hits, and what does not

    async def pairs(self) -> list[Check]:
        checks = []
        for mode in Isolation:
            checks += await self._pairs_of(mode)
        return checks

    async def _pairs_of(self, mode: Isolation) -> list[Check]:
        tenant = await self._tenant(mode)
        one, other = await self._party(tenant), await self._party(tenant)
        stranger = await self._party(await self._tenant(mode))
        text = self._text()
        system_tokens = await self._system_tokens(text)
        first = await one.asker.ask(text.messages, session="one")
        checks = [_check("nobody before", mode, first, Bounds(0, 0), TIERS[0], was_there=True)]
        # What was asked for a moment ago is on the device, unless its own session finds it in a tier behind.
        was_there = True
        asked = (
            (Pair.SAME_SESSION, one, "one", None),
            (Pair.SIBLING, one, "child", "one"),
            (Pair.SAME_TENANT, one, "two", None),
            (Pair.OTHER_KEY, other, "three", None),
            (Pair.OTHER_TENANT, stranger, "one", None),
            (Pair.FORGOTTEN, one, "one", None),
        )
        for pair, party, session, parent in asked:
            if pair is Pair.FORGOTTEN:
                await self._forget(one, "one")
            said = await party.asker.ask(text.messages, session=session, parent=parent)
            if pair is Pair.SAME_SESSION:
                was_there = said.cached_tokens == said.from_tier(TIERS[0])
            wanted = self._wanted(mode, pair, said, system_tokens)
            checks.append(_check(pair.value, mode, said, wanted, TIERS[0], was_there=was_there))
        return checks

    def _wanted(self, mode: Isolation, pair: Pair, said: Said, system_tokens: int) -> Bounds:
        return bounds(
            REACH[mode][pair],
            system_tokens=system_tokens,
            prompt_tokens=said.prompt_tokens,
            block_size=self._block_size,
        )

    async def _forget(self, party: _Party, named: str) -> None:
        """Forget a session of the party's, as an administrator would."""
        found = await self._session(party, named)
        self._forgotten.append(found.lease_label)
        await forget_session(self._services, self._administrator, found.session_id)

    async def other_tiers(self) -> list[Check]:
        """The same pairs, of prompts that have left the device; and the disk's, of prompts that have left DRAM too."""
        seen = await self._services.kv.look()
        rooms = {} if seen is None else {tier.tier: tier for tier in seen.picture.tiers}
        checks = []
        for tier in TIERS[1:]:
            if seen is None:
                checks.append(
                    Check("every pair", Verdict.UNKNOWN, "", "the engine does not say what it has", tier=tier)
                )
            elif tier not in rooms or rooms[tier].capacity_blocks == 0:
                found = "the engine keeps no blocks there"
                checks.append(Check("every pair", Verdict.NOT_CONFIGURED, "", found, tier=tier))
            else:
                for mode in Isolation:
                    prompts = await self._prompts_in(mode)
                    checks += await self._pairs_in_tier(tier, prompts)
                    await self._release([prompts.one, prompts.other, prompts.stranger])
        return checks

    async def _have_in_tier(self, tier: str, prompts: _Prompts) -> set[str]:
        """Ask for every prompt, and have it leave the tiers before this one, as it would for want of room.

        Returns:
            What those are called that the tier has all of. What is not there in time stays where it is.
        """
        before, after = prompts.controls
        of_pairs = [(pair.name, text) for pair, text in prompts.of_pairs.items()]
        for name, text in (("before", before), *of_pairs, ("after", after)):
            await prompts.one.asker.ask(text.messages, session=f"{tier}-{name}")
            prompts.asked[name] = await self._session(prompts.one, f"{tier}-{name}")
            await self._keep(prompts)
        names = {session.lease_label: name for name, session in prompts.asked.items()}
        there: set[str] = set()
        with suppress(TimeoutError):
            async with asyncio.timeout(_STORED_WITHIN_S):
                while len(there) < len(names):
                    with suppress(HoldfastError):  # a busy engine is asked again
                        there |= await self._services.engine.demote(tier, list(names))
                    await self._keep(prompts)
                    await asyncio.sleep(_ASK_AGAIN_S)
        return {names[label] for label in there if label in names}

    async def _keep(self, prompts: _Prompts) -> None:
        """Tell the engine that the prompts are asked for in a moment: nobody else's push them out of a full tier."""
        awaited = [(session.tenant_label, session.lease_label) for session in prompts.asked.values()]
        with suppress(HoldfastError):  # then they may be pushed out
            await self._services.engine.leases(awaited=awaited)

    async def _session(self, party: _Party, named: str) -> Session:
        """The session of a party's that it calls so."""
        turn = Turn(TurnKind.CHAT, self._model, [{"role": "user", "content": "-"}], {}, SessionHints(named))
        return await self._services.sessions.resolve(party.caller, turn)

    async def _prompts_in(self, mode: Isolation) -> _Prompts:
        # Their leases end with their turns, so that they yield before anybody else's do.
        tenant = await self._tenant(mode, idle_timeout_s=0.0)
        stranger = await self._tenant(mode, idle_timeout_s=0.0)
        return _Prompts(
            mode,
            await self._party(tenant),
            await self._party(tenant),
            await self._party(stranger),
            {pair: self._text() for pair in Pair},
            (self._text(), self._text()),
        )

    async def _pairs_in_tier(self, tier: str, prompts: _Prompts) -> list[Check]:
        """Every pair of a mode, of prompts that were brought into a tier, and then the controls.

        The tier had a prompt when the engine said so, and the tier has what was kept just before and just after it
        still, when all have been asked for. The controls come before the forgetting, for that may take everything of
        the tenant's.
        """
        there = await self._have_in_tier(tier, prompts)
        said: dict[Pair, Said] = {}
        for pair in Pair:
            if pair is not Pair.FORGOTTEN:
                said[pair] = await self._ask_in_tier(tier, pair, prompts)
        asker = prompts.one.asker
        await self._keep(prompts)
        controls = [
            await asker.ask(text.messages, session=f"{tier}-{name}")
            for name, text in zip(("before", "after"), prompts.controls, strict=True)
        ]
        shown = shows(controls, tier, block_size=self._block_size)
        await self._forget(prompts.one, f"{tier}-{Pair.FORGOTTEN.name}")
        said[Pair.FORGOTTEN] = await self._ask_in_tier(tier, Pair.FORGOTTEN, prompts)
        checks = []
        for pair, answer in said.items():
            wanted = self._wanted(prompts.mode, pair, answer, await self._system_tokens(prompts.of_pairs[pair]))
            was_there = shown and pair.name in there
            checks.append(_check(pair.value, prompts.mode, answer, wanted, tier, was_there=was_there))
        return checks

    async def _ask_in_tier(self, tier: str, pair: Pair, prompts: _Prompts) -> Said:
        await self._keep(prompts)
        own = f"{tier}-{pair.name}"
        party = {Pair.OTHER_KEY: prompts.other, Pair.OTHER_TENANT: prompts.stranger}.get(pair, prompts.one)
        same = pair in (Pair.SAME_SESSION, Pair.FORGOTTEN)
        return await party.asker.ask(
            prompts.of_pairs[pair].messages,
            session=own if same else f"{own}-asked",
            parent=own if pair is Pair.SIBLING else None,
        )

    # Times

    async def timing(self, rounds: int) -> list[Check]:
        """Whether another tenant's prompt is answered as fast as one that nobody asked for.

        Three times are taken in each round, in a random order: of a prompt that is new (cold), of one that another
        tenant asked for just before (other), and of one that the same session did (warm). Cold and other are compared
        by Mann and Whitney's test, two-sided, at `ALPHA`; where it sees a difference everything is taken again, and
        only a second one counts: a false alarm in less than `ALPHA` squared of the runs. The same test must tell warm
        from cold at a tenth of `ALPHA`: one that cannot see a hit would see no leak.
        """
        mine = await self._party(await self._tenant(Isolation.SESSION))
        theirs = await self._party(await self._tenant(Isolation.SESSION))
        for attempt in range(2):
            cold, other, warm = await self._times(mine, theirs, rounds, attempt)
            sees, differs = mann_whitney_p(cold, warm), mann_whitney_p(cold, other)
            if differs >= ALPHA:
                break
        gap_s, moved_s = shift(warm, cold), shift(other, cold)
        found = (
            f"p = {differs:.3f}; another tenant's {1000 * moved_s:+.1f} ms faster than cold, a hit {1000 * gap_s:+.1f} "
            f"ms (p = {sees:.1e}); {rounds} of each"
        )
        expected = f"no difference at alpha = {ALPHA:g} (Mann-Whitney, two-sided), and a hit that can be seen"
        verdict = Verdict.FAIL if differs < ALPHA else Verdict.PASS if sees < ALPHA / 10 else Verdict.UNKNOWN
        return [Check("time to first token of another tenant's prompt", verdict, expected, found)]

    async def _times(
        self, mine: _Party, theirs: _Party, rounds: int, attempt: int
    ) -> tuple[list[float], list[float], list[float]]:
        times: dict[str, list[float]] = {"cold": [], "other": [], "warm": []}
        for number in range(rounds):
            known, new = self._text(), self._text()
            name = f"timing-{attempt}-{number}"
            await theirs.asker.ask(known.messages, session=name)
            order = ["cold", "other", "warm"]
            random.shuffle(order)
            for kind in order:
                party = theirs if kind == "warm" else mine
                session = name if kind == "warm" else f"{name}-{kind}"
                said = await party.asker.ask((new if kind == "cold" else known).messages, session=session)
                times[kind].append(said.first_token_s)
        return times["cold"], times["other"], times["warm"]

    # Seeds, stop strings, log-probabilities

    async def crossing(self) -> list[Check]:
        """Requests that run at once, each compared with what the same request gives alone.

        Batches of other shapes round differently, so one that differs is tried again: what crossed would do so each
        time.
        """
        one = await self._party(await self._tenant(Isolation.SESSION))
        other = await self._party(await self._tenant(Isolation.SESSION))
        # Short: vLLM 0.32.0 on a CPU ends when the prompt of a request with a seed is computed in more than one step.
        text = self._text(words=4)
        numbers = iter(range(10_000))

        async def ask(party: _Party, seed: int, **fields: Any) -> Said:
            name = f"crossing-{next(numbers)}"
            sampled: dict[str, Any] = {
                "temperature": 1.5,
                "seed": seed,
                "max_tokens": _ANSWER_TOKENS,
                "ignore_eos": True,
            }
            return await party.asker.ask(text.messages, session=name, **sampled, **fields)

        shows = {"logprobs": True, "top_logprobs": 3}
        alone, another = await ask(one, 7), await ask(other, 8, **shows)
        stop = alone.text[len(alone.text) // 2 :][:2].strip()
        same_seed = stops = probabilities = False
        for _ in range(_ATTEMPTS):
            plain, seeded, stopped, shown = await asyncio.gather(
                ask(one, 7),
                ask(other, 7),
                ask(one, 7, stop=[stop or "\0"]),
                ask(other, 8, **shows),
            )
            same_seed = same_seed or (plain.text == seeded.text == alone.text and shown.text == another.text)
            others = {plain.finish_reason, seeded.finish_reason, shown.finish_reason}
            stops = stops or (stopped.finish_reason == "stop" and others == {"length"})
            probabilities = probabilities or (
                plain.logprob_tokens is None
                and seeded.logprob_tokens is None
                and stopped.logprob_tokens is None
                and shown.logprob_tokens is not None
                and shown.logprob_tokens == another.logprob_tokens
            )
        told = alone.text != another.text
        return [
            _crossing("seeds", same_seed, told, "two seeds gave one text", "each answer as it is alone"),
            _crossing("stop strings", stops, bool(stop), "no stop string could be chosen", "who set it stops, only"),
            _crossing("log-probabilities", probabilities, True, "", "who asked has its own, nobody else any"),
        ]

    # Words

    async def words(self) -> list[Check]:
        """No salt, key, or word of a prompt, a stop string or a schema in events, metrics and logs."""
        services = self._services
        needles = [*await self._asked_for(), *await self._needles()]
        texts = {
            "events": await asyncio.to_thread(self._events),
            "metrics of the gateway": _whole(services.metrics.exposition()),
            "metrics of the engine": _whole((await services.engine.metrics()).encode()),
            "report of leases": _whole(to_json((await services.engine.leases(every=True)).to_wire())),
        }
        for name, log in self._logs.items():
            texts[f"log of the {name}"] = await asyncio.to_thread(log.added)
        checks = []
        for name, (text, missing) in texts.items():
            leaked = await asyncio.to_thread(_found_in, text, needles)
            said = f"none in {len(text)} bytes"
            checks.append(
                Check(
                    f"{name}: no salt, key or word",
                    Verdict.FAIL if leaked else Verdict.UNKNOWN if missing else Verdict.PASS,
                    f"none of {len(needles)} salts, keys, words and token ids",
                    ", ".join(leaked) if leaked else f"{said}; {missing}" if missing else said,
                )
            )
        return checks

    async def _asked_for(self) -> list[tuple[str, str]]:
        """Ask for an answer with a stop string and a schema, of the kind that xgrammar has something to say of."""
        stop, word = _made_up(1), _made_up(1)
        schema = {"type": "string", "pattern": f"a^{word}$b"}
        wanted = {"type": "json_schema", "json_schema": {"name": "words", "schema": schema}}
        asker, text = self._parties[0].asker, self._text(words=4)
        await asker.ask(text.messages, session="asked-for", stop=[stop], response_format=wanted)
        return [("a stop string", stop), ("a word of a schema", word)]

    async def _needles(self) -> list[tuple[str, str]]:
        needles = [("a word of a prompt", word) for text in self._texts for word in text.split()[:2]]
        for party in self._parties:
            needles.append(("an API key", party.secret))
            session = await self._session(party, "one")
            needles += [("a salt", salt) for salt in (session.salt, session.shared_salt) if salt is not None]
        token_ids = await self._rendered(_Text(self._texts[0], self._texts[1]))
        middle = len(token_ids) // 3
        run = token_ids[middle : middle + 8]
        needles += [("token ids", separator.join(map(str, run))) for separator in (", ", ",", " ")]
        return needles

    def _events(self) -> Added:
        """The records since the proof began, decrypted."""
        query = Query(since_ns=self._began_ns, limit=_MOST_EVENTS)
        found = search(LogReader(self._services.audit.directory), self._services.vault, query)
        records = [each.record for each in found.found if each.record is not None]
        missing = "" if records else "there is no event"
        if found.go_on_before is not None:
            missing = f"only the newest {len(found.found)} events were looked at"
        elif len(records) < len(found.found):
            missing = f"{len(found.found) - len(records)} events cannot be opened"
        return Added(to_json(records), missing)


def verdict_of(checks: Sequence[Check]) -> Verdict:
    """What is to be said of the whole."""
    verdicts = {check.verdict for check in checks}
    for worst in (Verdict.FAIL, Verdict.UNKNOWN):
        if worst in verdicts:
            return worst
    return Verdict.PASS if Verdict.PASS in verdicts else Verdict.UNKNOWN


def _check(name: str, mode: Isolation, said: Said, wanted: Bounds, tier: str, *, was_there: bool) -> Check:
    verdict, found = judged(said, wanted, tier, was_there=was_there)
    expected = "none" if wanted.most == 0 else f"{wanted.least} to {wanted.most}"
    return Check(name, verdict, f"{expected} of {said.prompt_tokens} tokens found", found, mode.value, tier)


def _whole(text: bytes) -> Added:
    return Added(text, "" if text else "nothing to look at")


def _found_in(text: bytes, needles: Sequence[tuple[str, str]]) -> list[str]:
    """What kinds of needles a text has."""
    return sorted({kind for kind, needle in needles if needle.encode() in text})


def _made_up(words: int) -> str:
    """Words that were never said before."""
    return " ".join(secrets.token_hex(6) for _ in range(words))


def _crossing(name: str, right: bool, told: bool, why_not: str, expected: str) -> Check:
    verdict = (Verdict.PASS if right else Verdict.FAIL) if told else Verdict.UNKNOWN
    found = (f"so it was within {_ATTEMPTS} tries" if right else f"not in {_ATTEMPTS} tries") if told else why_not
    return Check(f"{name} do not cross", verdict, expected, found)


def _too_busy(cause: str, remedy: str) -> TooBusyToProve:
    return TooBusyToProve("nothing can be proved now", cause=cause, remedy=remedy)
