"""What the gateway counts, for Prometheus.

Rules:

- A label is one of a few words that we chose, an error's code among them; the name of a destination, of a witness or of
  a model, which an administrator chose; or a tenant's id, which says nothing of whose it is. It is never a token, a
  salt, a text, another name or another id.
- The first `MAX_TENANTS` tenants that have turns have series of their own; the others share those of `other`. A tenant
  that is removed takes its series with it, and another has room.
- Units are in the names (https://prometheus.io/docs/practices/naming/). docs/kv.md has every name beside vLLM's.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from appliance.sessions import Account, TurnState
from appliance.sessions.ledger import MAX_TENANTS, OTHER_TENANTS, is_warm, served_by_tier

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# A quantile is looked for within one bucket: each ends at 1.5 times where it begins at most.
_LATENCY_BUCKETS_S = (
    *(0.002, 0.003, 0.004, 0.005, 0.007, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.07),
    *(0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0),
    *(10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 70.0, 100.0, 150.0, 200.0, 300.0),
)


class Metrics:
    """The counters of one gateway, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry(auto_describe=True)
        self._requests = Counter(
            "holdfast_requests_total",
            "Requests answered on the data listener, by route and class of status.",
            ("route", "status"),
            registry=self._registry,
        )
        self._requests_of: dict[tuple[str, int], Counter] = {}
        turns = Counter("holdfast_turns_total", "Turns, by how they ended.", ("state",), registry=self._registry)
        self._turns_of = {state: turns.labels(state.value) for state in TurnState}
        tokens = Counter(
            "holdfast_tokens_total",
            "Tokens of turns written down: cached ones were found on the engine, computed ones were prefilled.",
            ("kind",),
            registry=self._registry,
        )
        self._tokens_cached = tokens.labels("prompt_cached")
        self._tokens_computed = tokens.labels("prompt_computed")
        self._tokens_generated = tokens.labels("generated")
        computed = Counter(
            "holdfast_computed_prompt_tokens_total",
            "Prompt tokens that were prefilled, by why they had to be.",
            ("cause", "tenant"),
            registry=self._registry,
        )
        self._computed = computed
        self._served = Counter(
            "holdfast_served_prompt_tokens_total",
            "Prompt tokens that were found, by the tier that had them.",
            ("tier", "tenant"),
            registry=self._registry,
        )
        self._prompts = Counter(
            "holdfast_prompt_tokens_total",
            "Prompt tokens of turns written down.",
            ("tenant",),
            registry=self._registry,
        )
        self._repeated = Counter(
            "holdfast_repeated_prompt_tokens_total",
            "Prompt tokens that the turn before in their session had, too: input that was replicated across calls.",
            ("tenant",),
            registry=self._registry,
        )
        self._first_token_of = Histogram(
            "holdfast_time_to_first_token_seconds",
            "Time to first token of streamed turns; warm: more of the prompt was found than computed.",
            ("tenant", "start"),
            buckets=_LATENCY_BUCKETS_S,
            registry=self._registry,
        )
        self._of_tenants: dict[str, _OfTenant] = {}
        self.waited_s = Histogram(
            "holdfast_admission_wait_seconds",
            "How long turns waited for room at the engine, of those that had to.",
            buckets=_LATENCY_BUCKETS_S,
            registry=self._registry,
        )
        self._commit_s = Histogram(
            "holdfast_commit_seconds",
            "From a turn's end to its being durable.",
            buckets=(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1.0, 5.0),
            registry=self._registry,
        )

    def answered(self, route: str, status: int) -> None:
        """A request on the data listener has its answer; `route` is one of those that exist, or `other`."""
        of = route, status // 100
        if of not in self._requests_of:
            self._requests_of[of] = self._requests.labels(route, f"{status // 100}xx")
        self._requests_of[of].inc()

    def turn(
        self,
        state: TurnState,
        commit_s: float,
        account: Account,
        *,
        completion: int,
        tenant_id: str,
        first_token_s: float | None = None,
    ) -> None:
        """A turn is durable; what became of its tokens, and how long that took."""
        self._turns_of[state].inc()
        self._commit_s.observe(commit_s)
        self._tokens_cached.inc(account.served_tokens)
        self._tokens_computed.inc(account.prompt_tokens - account.served_tokens)
        self._tokens_generated.inc(completion)
        of_tenant = self._of_tenant(tenant_id)
        of_tenant.prompts.inc(account.prompt_tokens)
        of_tenant.repeated.inc(account.repeated_tokens)
        for cause, tokens in account.computed.items():
            of_tenant.counter(self._computed, cause.value).inc(tokens)
        for tier, tokens in served_by_tier(account).items():
            of_tenant.counter(self._served, tier).inc(tokens)
        if first_token_s is not None:
            (of_tenant.warm if is_warm(account) else of_tenant.cold).observe(first_token_s)

    def _of_tenant(self, tenant_id: str) -> "_OfTenant":
        known = self._of_tenants.get(tenant_id)
        if known is None:
            name = tenant_id if len(self._of_tenants) < MAX_TENANTS else OTHER_TENANTS
            if name in self._of_tenants:
                return self._of_tenants[name]
            known = self._of_tenants[name] = _OfTenant(
                name,
                self._prompts.labels(name),
                self._repeated.labels(name),
                self._first_token_of.labels(name, "warm"),
                self._first_token_of.labels(name, "cold"),
            )
        return known

    def forget_tenant(self, tenant_id: str) -> None:
        """A tenant was removed: its series go, and what they counted stays in those that are nobody's."""
        if self._of_tenants.pop(tenant_id, None) is not None:
            for family in (self._computed, self._served, self._prompts, self._repeated, self._first_token_of):
                family.remove_by_labels({"tenant": tenant_id})

    def unanswered(self) -> None:
        """A turn ended before anything of it was answered; it is not written down."""
        self._turns_of[TurnState.FAILED].inc()

    def observe(self, name: str, help_text: str, value: Callable[[], float]) -> None:
        """Publish a gauge whose value is asked for when it is read."""
        Gauge(name, help_text, registry=self._registry).set_function(value)

    def observe_count(self, name: str, help_text: str, value: Callable[[], int]) -> None:
        """As `observe`, of a counter, whose `name` ends in `_total`."""
        self._registry.register(_Read(lambda: CounterMetricFamily(name, help_text, value=value())))

    def observe_each(
        self,
        name: str,
        help_text: str,
        values: Callable[[], Iterable[tuple[Sequence[str], float]]],
        *,
        labels: Sequence[str] = ("destination",),
    ) -> None:
        """As `observe`, for each thing of a kind that there is then, a destination of the audit log say.

        Each value comes with those of `labels`.
        """

        def family() -> Metric:
            gauge = GaugeMetricFamily(name, help_text, labels=labels)
            for of, value in values():
                gauge.add_metric(of, value)
            return gauge

        self._registry.register(_Read(family))

    def collect_from(self, collector: Collector) -> None:
        """Publish what `collector` says whenever it is read."""
        self._registry.register(collector)

    def exposition(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self._registry)


@dataclass(slots=True)
class _OfTenant:
    """One tenant's series, found once and kept."""

    name: str
    prompts: Counter
    repeated: Counter
    warm: Histogram
    cold: Histogram
    _counters: dict[tuple[int, str], Counter] = field(default_factory=dict)

    def counter(self, of: Counter, label: str) -> Counter:
        """The series of the family `of`, for one of our words and this tenant."""
        key = id(of), label
        if key not in self._counters:
            self._counters[key] = of.labels(label, self.name)
        return self._counters[key]


class _Read(Collector):
    """A metric that is made when it is read."""

    def __init__(self, family: Callable[[], Metric]) -> None:
        self._family = family

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterable[Metric]:
        return [self._family()]
