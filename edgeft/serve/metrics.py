"""Counters and histograms, as Prometheus reads them."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from edgeft.request_log import Request

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_SPEEDS = (1, 2, 5, 10, 20, 30, 50, 75, 100, 150, 200, 400)
UNKNOWN = "unknown"
"""The label for what never got to a model: a client must not be able to make labels of its own."""


class Metrics:
    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        one, by = ["model"], ["model", "status"]
        self._requests = Counter("edgeft_requests", "Requests that were answered or refused.", by, registry=registry)
        self._errors = Counter("edgeft_errors", "Requests that got an error.", ["model", "code"], registry=registry)
        self._deferrals = Counter("edgeft_deferrals", "Answers of the cloud.", ["model", "reason"], registry=registry)
        self._tokens = Counter("edgeft_tokens", "Tokens read and written.", ["model", "kind"], registry=registry)
        self._cost = Counter(
            "edgeft_cost", "Spent on the cloud, in the currency of its prices.", one, registry=registry
        )
        self._feedback = Counter("edgeft_feedback", "Ratings by readers.", ["model", "rating"], registry=registry)
        self._ttft = Histogram(
            "edgeft_time_to_first_token_seconds", "From arrival.", one, buckets=_SECONDS, registry=registry
        )
        self._queued = Histogram(
            "edgeft_queue_seconds", "Waiting for the model.", one, buckets=_SECONDS, registry=registry
        )
        self._speed = Histogram(
            "edgeft_decode_tokens_per_second", "Of one answer.", one, buckets=_SPEEDS, registry=registry
        )
        self._waiting = Gauge("edgeft_queue_length", "Requests that wait now.", one, registry=registry)
        self._crashes = Gauge("edgeft_model_crashes", "Times the model's process ended.", one, registry=registry)

    def count(self, request: Request) -> None:
        self._requests.labels(request.served, str(request.status)).inc()
        if request.error:
            self._errors.labels(request.served, request.error).inc()
        if request.deferral:
            self._deferrals.labels(request.served, request.deferral).inc()
        if request.cost:
            self._cost.labels(request.served).inc(request.cost)
        if request.ttft_ms is None:
            return
        self._tokens.labels(request.served, "prompt").inc(request.prompt_tokens)
        self._tokens.labels(request.served, "completion").inc(request.completion_tokens)
        self._ttft.labels(request.served).observe(request.ttft_ms / 1000)
        self._queued.labels(request.served).observe(request.queued_ms / 1000)
        if request.tokens_per_s:
            self._speed.labels(request.served).observe(request.tokens_per_s)

    def refused(self, status: int, code: str) -> None:
        self._requests.labels(UNKNOWN, str(status)).inc()
        self._errors.labels(UNKNOWN, code).inc()

    def rated(self, model: str, rating: str) -> None:
        self._feedback.labels(model, rating).inc()

    def gauge(self, model: str, waiting: int, crashes: int) -> None:
        self._waiting.labels(model).set(waiting)
        self._crashes.labels(model).set(crashes)

    def page(self) -> bytes:
        return generate_latest(self._registry)
