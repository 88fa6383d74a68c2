"""Prometheus metrics: the server's own names, and vLLM's as aliases, so that dashboards made for it work.

What is counted by requests is counted when one ends; what engines count themselves is read when somebody asks. No
label is a user or a prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from snello.engine.prefix_store import StoreCounters
from snello.serve.answering import Record
from snello.serve.served import Models, Served

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
FIRST_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)
BETWEEN_BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.5, 1)
WHOLE_BUCKETS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300, 600)
TOKEN_BUCKETS = (1, 8, 32, 128, 512, 2048, 8192, 32768)


class Metrics:
    """The metrics of one server."""

    def __init__(self, models: Models, *, vllm_names: bool) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # when a series began: nobody asks, and it doubles the text
        self._registry = CollectorRegistry()
        self._registry.register(Engines(models, vllm_names))
        prefixes = ("snello", "vllm") if vllm_names else ("snello",)
        self._requests = self._counter("snello:requests", "answered, by path and status", ["path", "status"])
        self._disconnects = self._counter("snello:client_disconnects", "clients that hung up", ["model_name"])
        self._sources = self._counter("snello:answers", "by where they came from", ["model_name", "source"])
        self._finished = [
            self._counter(f"{prefix}:request_success", "answers by what ended them", ["model_name", "finished_reason"])
            for prefix in prefixes
        ]
        self._histograms = {
            name: [self._histogram(f"{prefix}:{name}", text, buckets) for prefix in prefixes]
            for name, text, buckets in (
                ("time_to_first_token_seconds", "from the request to its first token", FIRST_BUCKETS),
                ("inter_token_latency_seconds", "mean between tokens of an answer", BETWEEN_BUCKETS),
                ("e2e_request_latency_seconds", "from the request to its end", WHOLE_BUCKETS),
                ("request_prompt_tokens", "of a request", TOKEN_BUCKETS),
                ("request_generation_tokens", "of a request", TOKEN_BUCKETS),
            )
        }

    def _counter(self, name: str, text: str, labels: list[str]) -> Counter:
        return Counter(name, text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, ["model_name"], buckets=buckets, registry=self._registry)

    def ended(self, record: Record, now: float, route: str) -> None:
        """Counts a request that has ended. `route`: its pattern, so that nobody can make new labels."""
        self._requests.labels(route, record.status).inc()
        if not record.model:
            return
        if record.ended == "disconnected":
            self._disconnects.labels(record.model).inc()
        if record.first is None or record.last is None:
            return
        self._sources.labels(record.model, record.source.partition(";")[0]).inc()
        for counter in self._finished:
            for reason in record.reasons:
                counter.labels(record.model, reason).inc()
        seen = {
            "time_to_first_token_seconds": record.first - record.started,
            "e2e_request_latency_seconds": now - record.started,
            "request_prompt_tokens": record.prompt_tokens,
            "request_generation_tokens": record.completion_tokens,
        }
        answers = max(1, len(record.reasons))
        if record.completion_tokens > answers:
            between = (record.last - record.first) * answers / (record.completion_tokens - answers)
            seen["inter_token_latency_seconds"] = between
        for name, value in seen.items():
            for histogram in self._histograms[name]:
                histogram.labels(record.model).observe(value)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)


class Engines(Collector):
    """What the engines say of themselves now."""

    def __init__(self, models: Models, vllm_names: bool) -> None:
        self._models = models
        self._vllm_names = vllm_names

    def collect(self) -> Iterator[Metric]:
        for name, (alias, text, kind) in FACTS.items():
            family = kind(f"snello:{name}", text, labels=["model_name"])
            also = kind(f"vllm:{alias}", text, labels=["model_name"]) if alias and self._vllm_names else None
            for served in self._models.values() if name in OWN else self._models.engines():
                value = facts(served)[name]
                family.add_metric([served.name], value)
                if also is not None:
                    also.add_metric([served.name], value)
            yield family
            if also is not None:
                yield also
        refused = CounterMetricFamily(
            "snello:rejections", "requests that were not let in", labels=["model_name", "reason"]
        )
        for served in self._models.engines():
            for reason, count in served.gate.refused.items():
                refused.add_metric([served.name, reason], count)
        yield refused
        if self._models.exact is not None:
            for name, value in vars(self._models.exact.counters).items():
                kind = GaugeMetricFamily if name == "bytes" else CounterMetricFamily
                yield kind(f"snello:exact_answers_{name}", "of the answers that are kept on disk", value=value)
        if self._models.similar is not None:
            similar, text = self._models.similar.similar, "of the cache of similar questions"
            for name, value in vars(similar.counters).items():
                yield CounterMetricFamily(f"snello:similar_questions_{name}", text, value=value)
            for name, value in (("serves", similar.serves), ("entries", len(similar))):
                yield GaugeMetricFamily(f"snello:similar_questions_{name}", text, value=value)


FACTS: dict[str, tuple[str, str, Any]] = {  # ours -> vLLM's, what it is, its kind
    "num_requests_running": ("num_requests_running", "answers that are computed now", GaugeMetricFamily),
    "num_requests_waiting": ("num_requests_waiting", "answers that wait", GaugeMetricFamily),
    "kv_cache_usage": ("kv_cache_usage_perc", "share of the cache's pages that answers hold", GaugeMetricFamily),
    "queue_tokens": ("", "tokens that may be asked for at most, by those inside", GaugeMetricFamily),
    "ready": ("", "1 while requests are let in", GaugeMetricFamily),
    "prompt_tokens": ("prompt_tokens", "of prompts, known ones included", CounterMetricFamily),
    "generation_tokens": ("generation_tokens", "drawn", CounterMetricFamily),
    "prefix_cache_queries": ("prefix_cache_queries", "prompt tokens that were looked up", CounterMetricFamily),
    "prefix_cache_hits": ("prefix_cache_hits", "prompt tokens that were known", CounterMetricFamily),
    "preemptions": ("num_preemptions", "answers that were put back", CounterMetricFamily),
    "steps": ("", "of the engine", CounterMetricFamily),
    "step_seconds": ("", "spent in steps", CounterMetricFamily),
    "failed_steps": ("", "steps that ended by a bug", CounterMetricFamily),
    "flights_joined": ("", "requests that shared a generation that ran", CounterMetricFamily),
    "prefix_disk_queries": ("", "prompt tokens that were looked up on disk", CounterMetricFamily),
    "prefix_disk_hits": ("", "prompt tokens that were read from disk", CounterMetricFamily),
    "prefix_disk_audited_pages": ("", "stored pages that were computed again and compared", CounterMetricFamily),
    "prefix_disk_mismatched_pages": ("", "of them different: the store is used no more", CounterMetricFamily),
}

OWN = {"flights_joined"}  # what an adapter has for itself; all else is its model's


def facts(served: Served) -> dict[str, float]:
    """Counts of one model, by the names of `FACTS`."""
    worker, gate = served.worker, served.gate
    engine, pages = worker.engine, served.llm.executor.pages
    counters = engine.counters
    stored = served.llm.store.counters if served.llm.store is not None else StoreCounters()
    return {
        "num_requests_running": engine.num_running,
        "num_requests_waiting": engine.num_waiting,
        "kv_cache_usage": pages.num_held / max(1, pages.num_pages),
        "queue_tokens": gate.inside,
        "ready": float(not gate.closed),
        "prompt_tokens": counters.prompt_tokens,
        "generation_tokens": worker.tokens,
        "prefix_cache_queries": counters.prompt_tokens,
        "prefix_cache_hits": counters.cached_tokens,
        "preemptions": counters.preemptions,
        "steps": counters.steps,
        "step_seconds": worker.step_seconds,
        "failed_steps": worker.failures,
        "flights_joined": served.caches.flights.counters.joined if served.caches is not None else 0,
        "prefix_disk_queries": stored.queried,
        "prefix_disk_hits": stored.hit,
        "prefix_disk_audited_pages": stored.audited_pages,
        "prefix_disk_mismatched_pages": stored.mismatched_pages,
    }
