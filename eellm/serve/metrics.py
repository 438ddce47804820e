"""What Prometheus reads at /metrics. A registry of the server's own: nothing else in the process is counted."""

from collections import Counter as Count
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from eellm.infer.handle import Handle
from eellm.infer.shadow import ShadowReport

FIRST_S = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
BETWEEN_S = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3)
WHOLE_S = (0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)


class Load(Protocol):
    """How busy a model is."""

    num_open: int
    num_running: int
    shadow: ShadowReport


class Meters:
    def __init__(self) -> None:
        own = self.registry = CollectorRegistry()
        model, keyed = ("model",), ("model", "key")
        self._requests = Counter("eellm_requests", "Answered.", ("route", "status", "key"), registry=own)
        self._answers = Counter(
            "eellm_answers", "Answers that are over, by how they ended.", ("model", "key", "outcome"), registry=own
        )
        self._prompt = Counter("eellm_prompt_tokens", "Tokens of prompts.", keyed, registry=own)
        self._new = Counter("eellm_generation_tokens", "Tokens made.", keyed, registry=own)
        self._exits = Counter(
            "eellm_exit_tokens", "Tokens made, by the exit's layer.", ("model", "layer"), registry=own
        )
        self._run = Counter("eellm_layers_run", "Passes through a layer.", model, registry=own)
        self._full = Counter("eellm_layers_full", "What full depth would have run.", model, registry=own)
        self._running = Gauge("eellm_num_requests_running", "Answers being made.", model, registry=own)
        self._waiting = Gauge("eellm_num_requests_waiting", "Answers that wait for a slot.", model, registry=own)
        self._checked = Counter(
            "eellm_shadow_checked", "Tokens that left early and were held against the final exit.", model, registry=own
        )
        self._wrong = Counter(
            "eellm_shadow_wrong", "Of these, those it would have chosen otherwise.", model, registry=own
        )
        self._broken = Gauge(
            "eellm_certificate_broken",
            "1: the checked tokens contradict the certificate of this risk.",
            ("model", "risk"),
            registry=own,
        )
        self._seen: dict[str, ShadowReport] = {}
        self._first_s = Histogram(
            "eellm_time_to_first_token_seconds", "From the request.", model, registry=own, buckets=FIRST_S
        )
        self._between_s = Histogram(
            "eellm_inter_token_latency_seconds", "Between tokens.", model, registry=own, buckets=BETWEEN_S
        )
        self._whole_s = Histogram(
            "eellm_e2e_request_latency_seconds", "Of a whole answer.", model, registry=own, buckets=WHOLE_S
        )

    def request(self, route: str, status: int, key: str) -> None:
        self._requests.labels(route, str(status), key).inc()

    def prompt(self, model: str, key: str, num_tokens: int) -> None:
        self._prompt.labels(model, key).inc(num_tokens)

    def answer(
        self, model: str, key: str, outcome: str, handle: Handle | None, begin_s: float, times: Sequence[float]
    ) -> None:
        """One that is over; all at once, so that tokens on their way cost nothing here.

        outcome: `stop`, `length`, `cancelled` (nobody waits for it any more), or the code of what its client is told.
        handle: None where it never began. times: of its tokens.
        """
        self._answers.labels(model, key, outcome).inc()
        if handle is None:
            return
        stats = handle.stats()
        self._new.labels(model, key).inc(stats.new_tokens)
        self._run.labels(model).inc(stats.layers_run)
        self._full.labels(model).inc(stats.layers_full)
        for layer, count in Count(handle.exits).items():
            self._exits.labels(model, str(layer)).inc(count)
        if times:
            self._first_s.labels(model).observe(times[0] - begin_s)
        if times and outcome in ("stop", "length"):
            self._whole_s.labels(model).observe(times[-1] - begin_s)
        between_s = self._between_s.labels(model)
        for earlier, later in pairwise(times):
            between_s.observe(later - earlier)

    def _shadow(self, model: str, report: ShadowReport) -> None:
        seen = self._seen.get(model, ShadowReport())
        self._checked.labels(model).inc(report.num_checked - seen.num_checked)
        self._wrong.labels(model).inc(report.num_wrong - seen.num_wrong)
        for certificate, is_broken in report.broken:
            self._broken.labels(model, f"{certificate.risk:g}").set(is_broken)
        self._seen[model] = report

    def text(self, loads: Iterable[tuple[str, Load]]) -> bytes:
        """In Prometheus's format."""
        for model, load in loads:
            self._running.labels(model).set(load.num_running)
            self._waiting.labels(model).set(max(0, load.num_open - load.num_running))
            self._shadow(model, load.shadow)
        return generate_latest(self.registry)
