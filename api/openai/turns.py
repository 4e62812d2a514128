"""The life of a turn: admitted, placed in its session, asked of the engine, given on, committed, and only then ended.

Rules:

- A request enters its key's quota before its body is read. Before the engine is asked: its tokens are reserved, the
  session is known, and the admission is on its way into the audit log. Before a word of an answer leaves, or of a
  refusal by the engine, it is on the disk. Where it cannot be written the engine's work is cancelled and the request
  refused; while the log is known to fail the engine is not asked.
- The answer goes to the client as it comes, save its end: the chunk with the last `finish_reason`, the usage and
  `[DONE]` are held back until request, answer and token ids are durable, and the audit log has how it ended. A client
  that saw any of them will find its transcript. Where one of the two fails, an error event takes their place.
- A turn that was broken off (client gone, engine lost, deadline, gateway stopping) is committed as interrupted, with
  what was generated, if anything was; the engine's work is cancelled at once.
- What was reserved is settled exactly once, on every way out. Where the engine worked and did not say what it cost,
  because the client left or the time was up, all that was reserved counts as used for an answer in one piece, and for a
  stream of which nothing was seen its prompt, by its bytes.
- When the last chunk has come the engine is told how the turn ended. Where it has more tiers than the device, or the
  session a cap, its account of the prompt is waited for and stored with the turn; else nobody waits.
- What the engine holds of a session that is over, by this turn's word or by another's meanwhile, is let go when the
  turn has ended.
- Every send has a deadline, the listener's: a client that does not read is one that is gone (`api.listener`).
- Where the engine is full, a turn waits in `services.waiting` for its place, admitted and recorded like any other; it
  gives the place back when the engine has done with it, not when it is durable.
- The status line waits for the engine's first chunk, so that what fails before it has a status of its own.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from typing import Any

from pydantic_core import from_json, to_json

from api import trail
from api.answers import REQUEST, Receive, Request, Scope, Send, answer_json, drop_frames
from api.bodies import ClientGone, read_body, refuse_many_values
from api.engine_leases import release
from api.openai.chunks import Answer
from api.openai.errors import (
    AnswerBroken,
    ContextTooLong,
    EngineRefused,
    ModelMissing,
    TooManyTurns,
    TurnTooLong,
    engine_not_ready,
    error_object,
)
from api.openai.hints import ends_session, read_hints
from api.openai.prefixes import Prefixes
from api.openai.running import Running, StreamReader
from api.openai.wire import Asked, HintsReader
from api.services import Services
from api.turn_ends import stop_of
from appliance.audit import AuditUnavailable, Event
from appliance.audit.digests import Text, answer_hash, keyed_digest, prompt_hash
from appliance.engine.client import EngineLost, EngineRejected, EngineUnavailable
from appliance.engine.protocol import Lease, SharedPrefix, TurnAccount, TurnEnd, lease_params
from appliance.errors import HoldfastError
from appliance.identity import Admission
from appliance.sessions import Account, Outcome, Served, Session, TurnKind, TurnOf, TurnState
from appliance.sessions.harness_lines import take_out_harness_lines
from appliance.settings import GatewaySettings
from appliance.vault import KeyMissing, VaultSealed

_STALLED_CLIENT_S = 2.0  # how long a client that does not read is given to take the error event
_ACCOUNT_WITHIN_S = 1.0  # what the engine has not said of a turn by then is not known
_MUCH_TO_HASH = 64 << 10  # bytes of a request that are canonicalised and hashed beside the loop
_BYTES_PER_TOKEN = 4  # what an answer cost whose prompt the engine did not get to count
_EVENT_STREAM = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One of the two ways of asking.

    Attributes:
        path: where the engine is asked.
        id_prefix: what the engine puts before our request id to make the response's id.
    """

    kind: TurnKind
    path: str
    id_prefix: str
    read: Callable[[bytes | bytearray, HintsReader, GatewaySettings], Asked]


class Turns:
    """One of the two completion routes, as an ASGI application."""

    def __init__(self, services: Services, endpoint: Endpoint) -> None:
        self._services = services
        self._endpoint = endpoint
        self._settings = services.settings.gateway
        self._prefixes = Prefixes(services.engine)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request.

        Raises:
            HoldfastError: it is refused, and nothing of an answer was sent.
        """
        request: Request = scope[REQUEST]
        services, lifecycle = self._services, self._services.lifecycle
        self._refuse_busy(request)
        admission = services.quotas.enter(request.known_caller())
        running: Running | None = None
        try:
            ends = ends_session(request.headers)
            asked, body_bytes = await self._read(request, receive)
            asked = _as_tenant_allows(request, asked)
            self._refuse_busy(request)
            lifecycle.placing += 1
            try:
                admission.reserve(asked.turn.model, self._reservation(asked, body_bytes))
                running = await self._place(request, asked, admission, body_bytes)
                lifecycle.turns.add(running)
                self._say_hints(request, running)
            finally:
                lifecycle.placing -= 1
            session_id, model = running.session.session_id, asked.turn.model
            admitted = trail.admitted(
                request,
                session_id=session_id,
                model=model,
                prompt_bytes=body_bytes,
                prompt_digest=await self._prompt_digest(request, asked, body_bytes),
            )
            also = [trail.session_ended(request, session_id=session_id)] if ends else []
            running.recorded = services.audit.begin(admitted, *also)
            watcher = asyncio.get_running_loop().create_task(_watch(receive, running))
            try:
                await (self._stream if asked.stream else self._whole)(
                    request, running, self._engine_body(running), send
                )
            finally:
                watcher.cancel()
                if ends and running.is_recorded:
                    services.sessions.end_with_turn(running.session)
                if running.session.was_ended():
                    await release(services, [running.session.lease_label])
        finally:
            if running is not None:
                services.sessions.turn_over(running.session)
                lifecycle.turns.discard(running)
            if running is None or not running.settled:
                admission.release()

    def _refuse_busy(self, request: Request) -> None:
        self._services.waiting.refuse_full(request.known_caller().tenant)
        lifecycle, most = self._services.lifecycle, self._settings.max_streams
        # A body that only arrives takes no place: whoever sends slowly would keep others out.
        if len(lifecycle.turns) + lifecycle.placing >= most:
            raise TooManyTurns(
                "the gateway is busy",
                cause=f"{most} turns run already (gateway.max_streams)",
                remedy="Send the request again in a moment",
            )

    async def _read(self, request: Request, receive: Receive) -> tuple[Asked, int]:
        """What is asked, and how many bytes said so."""
        settings, held = self._settings, self._services.lifecycle.bodies
        body = await read_body(request, receive, settings.max_body_bytes, held)
        try:
            refuse_many_values(body, settings.max_json_values)
            asked = self._endpoint.read(body, lambda given: read_hints(request.headers, given), settings)
        finally:
            held.give_back(len(body))
        dropped = asked.dropped.header()
        if dropped is not None:
            request.answer_headers.append((b"x-holdfast-dropped", dropped.encode("ascii")))
        return asked, len(body)

    async def _prompt_digest(self, request: Request, asked: Asked, body_bytes: int) -> str:
        """The keyed digest of what goes to the engine; empty unless the tenant chose to have it."""
        tenant, turn = request.known_caller().tenant, asked.turn
        if tenant is None or not tenant.audit_digests:
            return ""
        prompt = list(turn.messages) if self._endpoint.kind is TurnKind.CHAT else turn.parameters["prompt"]
        hashed = await asyncio.to_thread(prompt_hash, prompt) if body_bytes > _MUCH_TO_HASH else prompt_hash(prompt)
        return keyed_digest(self._services.vault, tenant.tenant_id, Text.PROMPT, hashed)

    def _answer_digest(self, request: Request, answer: Answer) -> str:
        """The keyed digest of what was answered until now; empty if nothing was, or unless the tenant chose it."""
        tenant = request.known_caller().tenant
        if tenant is None or not tenant.audit_digests or not answer.begun:
            return ""
        return keyed_digest(self._services.vault, tenant.tenant_id, Text.ANSWER, answer_hash(answer.texts()))

    def _reservation(self, asked: Asked, body_bytes: int) -> int:
        """Tokens, before anything is known but the bounds."""
        prompt = body_bytes // _BYTES_PER_TOKEN
        if asked.max_tokens is not None:
            return prompt + asked.choices * asked.max_tokens
        model = self._services.watch.model(asked.turn.model)
        longest = model.max_model_len if model is not None and model.max_model_len else prompt
        return asked.choices * max(longest, prompt)

    async def _place(self, request: Request, asked: Asked, admission: Admission, prompt_bytes: int) -> Running:
        services = self._services
        if not services.watch.ready:
            raise engine_not_ready(services.watch.summary, for_good=services.watch.failed)
        if services.watch.model(asked.turn.model) is None:
            raise ModelMissing(
                "there is no such model here",
                cause="the name in `model` is not one that is served",
                remedy="GET /v1/models lists those that are",
                param="model",
            )
        started_at, began_s = services.now(), services.monotonic()
        session = await services.sessions.resolve(request.known_caller(), asked.turn)
        request.session_id = session.visible_id.encode("latin-1", "replace")
        response_id = f"{self._endpoint.id_prefix}{services.new_id()}"
        answer = Answer(
            self._endpoint.kind,
            response_id,
            asked.turn.model,
            choices=asked.choices,
            include_usage=asked.include_usage,
            keep_token_ids=asked.keep_token_ids,
        )
        prefix = None
        if session.shared_salt is not None:
            prefix = await self._prefixes.of(session.tenant_id, asked.turn)
        return Running(asked, session, admission, answer, response_id, prompt_bytes, started_at, began_s, prefix)

    @contextlib.asynccontextmanager
    async def _at_the_engine(self, request: Request, running: Running) -> AsyncIterator[Callable[[], None]]:
        """Wait for a place at the engine, and have it while the body runs, or until what this yields is called.

        Raises:
            LineFull: too many wait already.
            AuditUnavailable: its admission cannot be recorded.
        """
        if running.recorded is None or running.recorded.done() or self._services.audit.error is not None:
            await running.until_recorded()
        waiting, asked, session = self._services.waiting, running.asked, running.session
        tenant = request.known_caller().tenant
        hints = asked.agent_hints.allowed(waiting.most_priority(tenant))
        key = session.tenant_label, session.lease_label
        model = self._services.watch.model(asked.turn.model)
        place = await waiting.enter(
            tenant,
            key,
            prompt_bytes=running.prompt_bytes,
            sequences=asked.choices,
            most_output_tokens=asked.max_tokens,
            hinted_output_tokens=hints.osl,
            most_context_tokens=None if model is None else model.max_model_len,
            tier=hints.strict_priority or 0,
            priority=hints.priority or 0,
        )
        running.reached_engine = True

        def leave() -> None:
            usage = running.answer.usage
            waiting.leave(
                place,
                key,
                prompt_bytes=running.prompt_bytes,
                prompt_tokens=usage.prompt_tokens,
                cached_tokens=usage.cached_tokens,
                output_tokens=usage.completion_tokens,
                idle_timeout_s=session.keeping.idle_timeout_after_s(stop_of(running.answer.finish_reason)),
            )

        try:
            yield leave
        finally:
            leave()

    def _engine_body(self, running: Running) -> bytes:
        """The only way that anything reaches the engine."""
        asked, session = running.asked, running.session
        shared = None
        if session.shared_salt is not None and running.prefix is not None:
            shared = SharedPrefix(session.shared_salt, running.prefix.tokens, running.prefix.digest)
        keeping = session.keeping
        lease = Lease(
            session.lease_label,
            session.tenant_label,
            keeping.idle_timeout_s,
            turn=running.response_id,
            strict=keeping.strict,
            parent=session.parent_lease_label,
            tenant_share=keeping.tenant_share,
            tenant_cap=keeping.tenant_cap,
            session_cap=keeping.session_cap,
            shared=shared,
        )
        body: dict[str, Any] = {
            **asked.turn.parameters,
            "model": asked.turn.model,
            "cache_salt": session.salt,
            "kv_transfer_params": lease_params(lease),
            "return_token_ids": True,
        }
        if self._endpoint.kind is TurnKind.CHAT:
            body["messages"] = asked.turn.messages
        if asked.stream:
            body["stream"] = True
            body["stream_options"] = {"include_usage": True}
        return to_json(body)

    # Streamed

    async def _stream(self, request: Request, running: Running, body: bytes, send: Send) -> None:
        answer = running.answer
        failure: HoldfastError | None = None
        try:
            async with running.until(self._settings.request_timeout_s):
                await self._pass_on(request, running, body, send)
                if not answer.complete:
                    raise _unfinished()
        except HoldfastError as error:
            drop_frames(error)
            failure = error
        failure = failure or running.broken_off_by
        if not request.began and not answer.begun:
            await self._settle_unanswered(request, running, failure)
            if failure is not None:
                raise self._explained(running, failure)
            raise ClientGone
        state = TurnState.COMPLETE if failure is None and not running.client_gone else TurnState.INTERRUPTED
        account: Account | None = None
        try:
            account = await self._commit(request, running, state, failure)
        except HoldfastError as error:
            drop_frames(error)
            failure = failure or error
        if running.client_gone:
            return
        if not request.began:
            await _begin(send)
        last = answer.end(account) if failure is None else _error_event(self._explained(running, failure), request)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(None if failure is None else _STALLED_CLIENT_S):
                await send({"type": "http.response.body", "body": last})

    async def _pass_on(self, request: Request, running: Running, body: bytes, send: Send) -> None:
        """From the engine to the client, all but the end."""
        answer = running.answer
        begun_at = time.perf_counter()
        engine = self._services.engine
        engine_id = running.response_id.removeprefix(self._endpoint.id_prefix)
        async with (
            self._at_the_engine(request, running) as leave,
            engine.batches(self._endpoint.path, body, request_id=engine_id) as batches,
        ):
            await running.until_recorded()
            reader = StreamReader(send, leave)
            async for batch in batches:
                # Who waits for the first event does not wait for those to be read that came with it.
                for together in (batch,) if request.began or len(batch) == 1 else (batch[:1], batch[1:]):
                    events, failure = _feed(answer, together)
                    if events:
                        if not request.began:
                            running.first_token_s = time.perf_counter() - begun_at
                            await _begin(send)
                        await reader.send(events)
                    if failure is not None:
                        raise failure
                    if together is not batch:
                        await asyncio.sleep(0)  # what was written leaves when the loop comes round

    # Whole

    async def _whole(self, request: Request, running: Running, body: bytes, send: Send) -> None:
        failure: HoldfastError | None = None
        engine_id = running.response_id.removeprefix(self._endpoint.id_prefix)
        try:
            async with running.until(self._settings.request_timeout_s), self._at_the_engine(request, running):
                answered = await self._services.engine.call(
                    self._endpoint.path,
                    body,
                    request_id=engine_id,
                    deadline_s=self._settings.request_timeout_s,
                )
                await running.until_recorded()
                running.answer.take_whole(answered[1])
        except HoldfastError as error:
            drop_frames(error)
            failure = error
        failure = failure or running.broken_off_by
        if failure is not None or running.client_gone:
            await self._settle_unanswered(request, running, failure)
            if failure is not None:
                raise self._explained(running, failure)
            raise ClientGone
        account = await self._commit(request, running, TurnState.COMPLETE, None)
        await answer_json(send, 200, running.answer.whole(account))

    # Writing it down

    async def _commit(
        self, request: Request, running: Running, state: TurnState, failure: HoldfastError | None
    ) -> Account:
        """Store a turn and record how it ended, at the same time: both are on the disk when this returns.

        Raises:
            HoldfastError: one of them is not. That a turn was not stored is recorded, too.
        """
        services, answer, usage = self._services, running.answer, running.answer.usage
        outcome = Outcome(
            response_id=running.response_id,
            state=state,
            answer=answer.message(),
            prompt_token_ids=answer.prompt_token_ids,
            completion_token_ids=answer.completion_token_ids,
            prompt_tokens=usage.prompt_tokens,
            cached_tokens=usage.cached_tokens,
            completion_tokens=usage.completion_tokens,
            finish_reason=answer.finish_reason,
            started_at=running.started_at,
            ended_at=services.now(),
            ran_s=(running.began_s, services.monotonic()),
            first_token_s=running.first_token_s,
        )
        running.settled = True
        told = self._tell_engine(running)
        used = running.admission.settle(usage.prompt_tokens + usage.completion_tokens)
        begun_at = time.perf_counter()
        session_id = running.session.session_id
        served = await self._served(running, told)
        # The record first: it is on its way to the disk while the turn is encrypted.
        recorded = services.audit.begin(self._ended(request, running, state, failure))
        try:
            stored = await services.sessions.record(
                running.session,
                running.asked.turn,
                outcome,
                used,
                engine=services.engine_life,
                replica=services.replica,
                template=services.template,
                served=served,
                last=ends_session(request.headers),
            )
        except HoldfastError as error:
            not_kept = services.audit.begin(trail.not_kept(request, session_id=session_id, error=error))
            # The client is told that it was not stored, whatever becomes of the records.
            await asyncio.gather(not_kept, recorded, return_exceptions=True)
            raise
        await recorded
        self._note(running, state, stored, time.perf_counter() - begun_at, outcome)
        return stored

    async def _served(self, running: Running, told: "asyncio.Future[TurnAccount | None]") -> Served | None:
        """From where the engine had what it found of the prompt; None: that is not certain."""
        cached_tokens = running.answer.usage.cached_tokens
        if cached_tokens is None or self._services.engine_life is None:
            return None
        if not _wants_account(self._services, running):
            return Served(cached_tokens, 0, 0)
        done, _ = await asyncio.wait([told], timeout=_ACCOUNT_WITHIN_S)
        account = told.result() if done else None
        if account is None:
            return None
        return Served(account.device_tokens, account.dram_tokens, account.disk_tokens, account.reason)

    def _note(self, running: Running, state: TurnState, account: Account, commit_s: float, outcome: Outcome) -> None:
        """Count a turn that was written down."""
        session = running.session
        self._services.metrics.turn(
            state,
            commit_s,
            account,
            completion=outcome.completion_tokens,
            tenant_id=session.tenant_id,
            first_token_s=running.first_token_s,
        )
        self._services.ledger.note(
            TurnOf(session.session_id, session.tenant_id, session.lease_label, session.tenant_label),
            account,
            ended_at=outcome.ended_at,
            first_token_s=running.first_token_s,
        )

    def _say_hints(self, request: Request, running: Running) -> None:
        """Have a header say what is made of the client's hints."""
        services = self._services
        hints = running.asked.agent_hints.allowed(services.waiting.most_priority(request.known_caller().tenant))
        recalls = services.kv.recalls and not running.session.keeping.strict
        said = hints.header(recalls=recalls)
        if said is not None:
            request.answer_headers.append((b"x-holdfast-hints", said.encode("ascii")))

    def _tell_engine(self, running: Running) -> "asyncio.Future[TurnAccount | None]":
        session, answer = running.session, running.answer
        stop = stop_of(answer.finish_reason)
        end = TurnEnd(
            session.lease_label,
            session.tenant_label,
            running.response_id,
            stop,
            answer.usage.completion_tokens,
            session.keeping.idle_timeout_after_s(stop),
            returns_soon=bool(running.asked.agent_hints.speculative_prefill),
        )
        return self._services.turn_ends.tell(end, at_once=_wants_account(self._services, running))

    def _ended(self, request: Request, running: Running, state: TurnState, failure: HoldfastError | None) -> Event:
        usage = running.answer.usage
        gone = "client_gone" if running.client_gone else ""
        return trail.ended(
            request,
            session_id=running.session.session_id,
            model=running.asked.turn.model,
            complete=state is TurnState.COMPLETE,
            reason=gone if failure is None else failure.code,
            counts={
                "prompt_tokens": usage.prompt_tokens,
                "cached_tokens": usage.cached_tokens or 0,
                "completion_tokens": usage.completion_tokens,
                "answer_bytes": sum(len(text.encode(errors="surrogatepass")) for text in running.answer.texts()),
                "duration_ms": round(1000 * (self._services.monotonic() - running.began_s)),
            },
            answer_digest=self._answer_digest(request, running.answer),
        )

    async def _settle_unanswered(self, request: Request, running: Running, failure: HoldfastError | None) -> None:
        """Nothing was answered: what a client did not wait for, or asked too much for, it pays; else nothing.

        Nor does it pay for what never came to the engine.

        Raises:
            AuditUnavailable: the admission was not recorded: no other refusal may be told.
        """
        await running.until_recorded()
        self._services.metrics.unanswered()
        with contextlib.suppress(AuditUnavailable, VaultSealed, KeyMissing):
            await self._services.audit.record(self._ended(request, running, TurnState.INTERRUPTED, failure))
        if not running.reached_engine or (failure is not None and not isinstance(failure, TurnTooLong)):
            return
        running.settled = True
        # Of a stream, what was generated has been seen: nothing. An answer in one piece may have been nearly whole.
        at_most = running.prompt_bytes // _BYTES_PER_TOKEN if running.asked.stream else running.admission.reserved
        used = running.admission.settle(at_most)
        if used:
            await self._services.store.write(used)

    def _explained(self, running: Running, error: HoldfastError) -> HoldfastError:
        """The error that a client is told for one that the engine or its client raised."""
        watch = self._services.watch
        if isinstance(error, EngineUnavailable | EngineLost):
            watch.missed()
        if isinstance(error, EngineUnavailable):
            return engine_not_ready(watch.summary, for_good=watch.failed)
        if isinstance(error, EngineRejected):
            return _refusal(error, running.session, running.asked.turn.kind)
        return error


def _wants_account(services: Services, running: Running) -> bool:
    """Whether the engine knows more of where a prompt was found: it has more tiers, or a cap that may have been met."""
    keeping = running.session.keeping
    return services.kv.has_more_tiers or min(keeping.tenant_cap, keeping.session_cap) < 1.0


def _as_tenant_allows(request: Request, asked: Asked) -> Asked:
    """What is asked, without known lines of a harness's own where the tenant allows that; a header says so."""
    tenant = request.known_caller().tenant
    if tenant is None or not tenant.takes_out_harness_lines:
        return asked
    messages, taken_out = take_out_harness_lines(asked.turn.messages)
    if not taken_out:
        return asked
    request.answer_headers.append((b"x-holdfast-normalised", b"harness-lines=%d" % taken_out))
    return replace(asked, turn=replace(asked.turn, messages=messages))


def _feed(answer: Answer, payloads: list[bytes]) -> tuple[bytes, AnswerBroken | None]:
    """The events of payloads that came together; where one is none, those before it, and what is wrong with it."""
    events: list[bytes] = []
    for payload in payloads:
        try:
            events.append(answer.feed(payload))
        except AnswerBroken as failure:
            return b"".join(events), failure
    return b"".join(events), None


async def _watch(receive: Receive, running: Running) -> None:
    """Break the turn off when its client goes away."""
    while (await receive())["type"] != "http.disconnect":
        pass
    running.interrupt(None)


async def _begin(send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": list(_EVENT_STREAM)})


def _error_event(error: HoldfastError, request: Request) -> bytes:
    return b"data: " + error_object(error, request.request_id) + b"\n\n"


def _unfinished() -> HoldfastError:
    return AnswerBroken(
        "the engine broke off the answer",
        cause="its stream ended before the answer did",
        remedy="Send the request again; `holdfast logs engine` tells more",
    )


def _refusal(rejected: EngineRejected, session: Session, kind: TurnKind) -> HoldfastError:
    said = _engine_message(rejected.body, session)
    if "maximum context length" in said:
        chat = kind is TurnKind.CHAT
        shorter = "Leave out or summarise the oldest messages" if chat else "Shorten the prompt"
        return ContextTooLong(
            f"the {'conversation' if chat else 'prompt'} is longer than the model can take",
            cause=said,
            remedy=f"{shorter}, or ask for fewer tokens",
            param="messages" if chat else "prompt",
        )
    return EngineRefused("the engine refused the request", cause=said, remedy="Correct the request")


def _engine_message(body: bytes, session: Session) -> str:
    """What the engine said of a request, if it may be repeated: it may quote what the gateway put in."""
    try:
        message = from_json(body)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return "it did not say why"
    secrets = (session.salt, session.shared_salt, session.lease_label, session.tenant_label)
    if not isinstance(message, str) or any(secret is not None and secret in message for secret in secrets):
        return "it did not say why"
    return message[:500].rstrip(".")
