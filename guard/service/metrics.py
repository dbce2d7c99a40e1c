"""What Prometheus scrapes: docs/serving.md. Every label set is closed: by the pack, by the API or by that table."""

import threading
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector
from prometheus_client.metrics_core import CounterMetricFamily
from prometheus_client.registry import Collector

from guard.assessor import Assessor, Observer
from guard.pack.manifest import LatentLine
from guard.records import Phase, Verdict
from guard.scoring.pooling import Ints

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_SCORES = (0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1)
_SEQUENCES = (1, 2, 4, 8, 16, 32, 64, 128)
_TOKENS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


class Metrics(Observer):
    """One registry for one assessor; hand it on as `assessor.observer`. Every method may be called from any thread."""

    def __init__(self, assessor: Assessor) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)

        # Each metric as what finds a series by the values of its labels; they are checked at the first look-up only.
        def counter(name: str, text: str, *labels: str) -> Callable[..., Counter]:
            metric = Counter(f"guard_{name}", text, labels, registry=registry)
            return cache(metric.labels) if labels else lambda: metric

        def histogram(name: str, text: str, buckets: Sequence[float], *labels: str) -> Callable[..., Histogram]:
            metric = Histogram(f"guard_{name}", text, labels, registry=registry, buckets=buckets)
            return cache(metric.labels) if labels else lambda: metric

        def gauge(name: str, text: str, read: Any) -> None:
            Gauge(f"guard_{name}", text, registry=registry).set_function(read)

        def info(name: str, text: str, **labels: str) -> None:
            Info(f"guard_{name}", text, registry=registry).info(labels)

        self._requests = counter("requests", "Phases judged.", "method", "phase", "action")
        self._chunks = counter("chunks", "Running verdicts of streams.", "phase", "action")
        self._domains = counter("domain_actions", "What each domain came to.", "domain", "phase", "action")
        self._scores = histogram("score", "Scores of a head.", _SCORES, "domain", "head")
        self._not_assessed = counter("not_assessed", "Verdicts that could not be given.", "reason")
        self._request_seconds = histogram("request_seconds", "A call.", _SECONDS, "method", "code")
        self._chunk_seconds = histogram("chunk_seconds", "A stream's chunk.", _SECONDS, "phase")
        self._stage_seconds = histogram("stage_seconds", "A stage of a verdict.", _SECONDS, "stage")
        self._batch_seconds = histogram("batch_seconds", "A stage of a batch.", _SECONDS, "stage")
        self._batch_sequences = histogram("batch_sequences", "Sequences read together.", _SEQUENCES)
        self._batch_tokens = histogram("batch_tokens", "Tokens read together.", _TOKENS)
        self._tokens = counter("tokens", "Tokens read by the model.")
        self._prefixes = counter("prefixes", "Chats looked up among those kept.", "result")
        self._prefix_tokens = counter("prefix_tokens", "Tokens not read again.")
        gauge("prefix_bytes", "Memory of the chats kept.", lambda: assessor.prefix_bytes)
        gauge("queue_depth", "Requests that wait or are being read.", lambda: assessor.queue_depth)
        gauge("open_sessions", "Open streams.", lambda: assessor.open_sessions)
        connections = Gauge("guard_tap_connections", "Taps connected.", ("engine",), registry=registry)
        requests = Gauge("guard_tap_requests", "Open observed requests.", ("engine",), registry=registry)
        self._tap_connections, self._tap_requests = cache(connections.labels), cache(requests.labels)
        self._tap_steps = counter("tap_steps", "Steps of engines.", "engine")
        self._tap_rows = counter("tap_rows", "Runs of rows.", "engine")
        self._tap_tokens = counter("tap_tokens", "Tokens observed.", "engine")
        self._tap_dropped = counter("tap_dropped", "Steps that taps could not hand over.", "engine")
        gauge("session_bytes", "Memory of the open streams' keys and values.", lambda: assessor.session_bytes)
        pack, policy, model = assessor.pack.info, assessor.policy, assessor.model
        info("pack", "The pack.", id=pack.id, version=pack.version, hash=pack.hash)
        info(
            "model",
            "The model that reads.",
            fingerprint=model.fingerprint,
            verified=str(model.verified).lower(),
            dtype=assessor.reader_dtype,
            encode_backend=assessor.encode_backend,
        )
        info("policy", "The policy.", version=policy.version, hash=policy.hash)
        self._hits = _Hits(assessor.pack.latents, by_latent=assessor.config.server.latent_metrics)
        registry.register(self._hits)

    def verdict(self, verdict: Verdict, method: str) -> None:
        if method == "observe":  # counted at the request's end: meanwhile nobody may ask for a verdict, or many may
            return
        for stage, seconds in verdict.timings.items():
            self._stage_seconds(stage).observe(seconds)
        if method == "check":
            self.judged(verdict, method)
        elif verdict.phases:
            latest = verdict.phases[-1]
            self._chunks(latest.phase.value, latest.action.value).inc()

    def judged(self, verdict: Verdict, method: str) -> None:
        """Counts a request: a check by its verdict, a stream by its Outcome (severest actions, last scores)."""
        for phase in verdict.phases:
            self._requests(method, phase.phase.value, phase.action.value).inc()
            for domain in phase.domains:
                self._domains(domain.domain, phase.phase.value, domain.action.value).inc()
                for head in domain.heads:
                    self._scores(domain.domain, head.head.value).observe(head.score)
        if not verdict.phases:
            self._requests(method, "none", verdict.action.value).inc()
        for missing in verdict.not_assessed:
            self._not_assessed(missing.reason.value).inc()

    def hits(self, counts: Ints) -> None:
        self._hits.add(counts)

    def prefix(self, tokens: int) -> None:
        self._prefixes("hit" if tokens else "miss").inc()
        self._prefix_tokens().inc(tokens)

    def batch(self, sequences: int, tokens: int, seconds: dict[str, float]) -> None:
        self._batch_sequences().observe(sequences)
        self._batch_tokens().observe(tokens)
        self._tokens().inc(tokens)
        for stage, taken in seconds.items():
            self._batch_seconds(stage).observe(taken)

    def tap_step(self, engine: str, rows: int, tokens: int, dropped: int) -> None:
        for metric, count in (
            (self._tap_steps, 1),
            (self._tap_rows, rows),
            (self._tap_tokens, tokens),
            (self._tap_dropped, dropped),
        ):
            metric(engine).inc(count)

    def taps(self, engine: str, connected: int, requests: int) -> None:
        self._tap_connections(engine).set(connected)
        self._tap_requests(engine).set(requests)

    def ended(self, verdict: Verdict) -> None:
        self.judged(verdict, "observe")

    def call(self, method: str, code: str, seconds: float) -> None:
        self._request_seconds(method, code).observe(seconds)

    def chunk(self, phase: Phase, seconds: float) -> None:
        self._chunk_seconds(phase.value).observe(seconds)


class _Hits(Collector):
    """Adds hits up by row, which is one sum a batch, and makes series of them when they are scraped.

    Every series is there from the start: a rate over a counter that appears late misses its first hits.
    """

    def __init__(self, latents: Sequence[LatentLine], *, by_latent: bool) -> None:
        self._counts = np.zeros(len(latents), dtype=np.int64)  # [K]
        self._lock = threading.Lock()
        self._rows: dict[tuple[str, str, str], list[int]] = {}  # by domain, hook point, latent
        for row, line in enumerate(latents):
            for domain in line.domains or ("none",):
                labels = (domain, line.hook_point, str(line.latent) if by_latent else "")
                self._rows.setdefault(labels, []).append(row)

    def add(self, counts: Ints) -> None:
        with self._lock:
            self._counts += counts

    def collect(self) -> Iterator[CounterMetricFamily]:
        with self._lock:
            counts = self._counts.copy()
        family = CounterMetricFamily(
            "guard_hits", "Tokens on which a latent fired.", labels=("domain", "hook_point", "latent")
        )
        for labels, rows in self._rows.items():
            family.add_metric(labels, float(counts[rows].sum()))
        yield family
