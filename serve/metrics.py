"""Counters and times of the server in Prometheus' format, under the names that boards for vLLM know."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from serve.models.writer import Counts

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0)


class Metrics:
    """The metrics of one server.

    Args:
        prefix: Beginning of every name, such as `lab:`.
        counts: The counts of each model's writer, by the model's id.
    """

    def __init__(self, prefix: str, counts: Callable[[], Mapping[str, Counts]]) -> None:
        self._registry = own = CollectorRegistry()
        names = ["model_name"]
        self._prompt_tokens = Counter(f"{prefix}prompt_tokens", "Tokens of prompts.", names, registry=own)
        self._new_tokens = Counter(f"{prefix}generation_tokens", "New tokens.", names, registry=own)
        reasons = [*names, "finished_reason"]
        self._finished = Counter(
            f"{prefix}request_success", "Choices that were finished.", reasons, registry=self._registry
        )
        self._refused = Counter(
            f"{prefix}request_refused", "Requests that were refused.", ["status"], registry=self._registry
        )
        places = [*names, "position"]
        self._accepted = Counter(
            f"{prefix}spec_decode_num_accepted_tokens_per_pos",
            "Draft tokens that the target accepted, by their place among those of one pass.",
            places,
            registry=self._registry,
        )
        about = "Seconds to the first token."
        self._first = Histogram(
            f"{prefix}time_to_first_token_seconds", about, names, buckets=SECONDS, registry=self._registry
        )
        about = "Seconds between two tokens."
        self._token = Histogram(
            f"{prefix}inter_token_latency_seconds", about, names, buckets=TOKEN_SECONDS, registry=self._registry
        )
        about = "Seconds of whole requests."
        self._whole = Histogram(
            f"{prefix}e2e_request_latency_seconds", about, names, buckets=SECONDS, registry=self._registry
        )
        self._registry.register(_Now(prefix, counts))

    def text(self) -> bytes:
        """All of them, as Prometheus reads them."""
        return generate_latest(self._registry)

    def refused(self, status: int) -> None:
        """Count a request that was refused."""
        self._refused.labels(str(status)).inc()

    def accepted(self, model: str, guesses: int) -> None:
        """Count the first so many draft tokens of a pass as accepted."""
        for place in range(guesses):
            self._accepted.labels(model, str(place)).inc()

    def first_token(self, model: str, seconds: float) -> None:
        """Count a first token."""
        self._first.labels(model).observe(seconds)

    def token(self, model: str, seconds: float) -> None:
        """Count a later token."""
        self._token.labels(model).observe(seconds)

    def ended(self, model: str, reasons: Iterable[str], prompt_tokens: int, new_tokens: int, seconds: float) -> None:
        """Count a request that has ended."""
        self._prompt_tokens.labels(model).inc(prompt_tokens)
        self._new_tokens.labels(model).inc(new_tokens)
        self._whole.labels(model).observe(seconds)
        for reason in reasons:
            self._finished.labels(model, reason).inc()


class _Now(Collector):
    """Counts that are kept elsewhere."""

    def __init__(self, prefix: str, counts: Callable[[], Mapping[str, Counts]]) -> None:
        self._prefix, self._counts = prefix, counts

    def collect(self) -> Iterable[Metric]:
        """Read them."""
        gauges = {"num_requests_running": "running", "num_requests_waiting": "waiting"}
        counters = {
            "spec_decode_num_drafts": "passes",
            "spec_decode_num_draft_tokens": "drafts_checked",
            "spec_decode_num_accepted_tokens": "drafts_accepted",
            "prefix_cache_queries": "prefix_asked",
            "prefix_cache_hits": "prefix_found",
        }
        by_model = self._counts()
        for name, field in gauges.items():
            gauge = GaugeMetricFamily(f"{self._prefix}{name}", field, labels=["model_name"])
            for model, counts in by_model.items():
                gauge.add_metric([model], getattr(counts, field))
            yield gauge
        for name, field in counters.items():
            counter = CounterMetricFamily(f"{self._prefix}{name}", field, labels=["model_name"])
            for model, counts in by_model.items():
                counter.add_metric([model], getattr(counts, field))
            yield counter
