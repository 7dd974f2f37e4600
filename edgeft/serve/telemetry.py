"""Requests as OpenTelemetry spans, by the standard SDK. Off unless asked for; no prompt and no answer is exported.

Attribute names are those of OpenTelemetry's semantic conventions for generative AI (`gen_ai.*`).
"""

from __future__ import annotations

import atexit

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import SpanKind, Status, StatusCode

from edgeft import __version__
from edgeft.request_log import Request
from edgeft.serve.recorder import Exporter

_NS = 1_000_000_000


def exporter(spans: SpanExporter | None = None) -> Exporter:
    """What exports one finished request as one span.

    Args:
        spans: where to; default: OTLP over HTTP, configured by the `OTEL_EXPORTER_OTLP_…` variables.
    """
    resource = Resource.create({"service.name": "edgeft", "service.version": __version__})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    processor = BatchSpanProcessor(spans or OTLPSpanExporter())
    provider.add_span_processor(processor)
    atexit.register(provider.shutdown)
    tracer = provider.get_tracer("edgeft.serve", __version__)

    def export(request: Request) -> None:
        begin = int(request.at * _NS)
        span = tracer.start_span(
            f"chat {request.served}", kind=SpanKind.SERVER, start_time=begin, attributes=_attributes(request)
        )
        if request.error:
            span.set_status(Status(StatusCode.ERROR, request.error))
        span.end(begin + int(request.total_ms * 1_000_000))

    export.flush = provider.force_flush  # type: ignore[attr-defined]
    return export


def _attributes(request: Request) -> dict[str, str | int | float]:
    values: dict[str, str | int | float | None] = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "edgeft",
        "gen_ai.request.model": request.model,
        "gen_ai.response.model": request.served,
        "gen_ai.response.id": request.id,
        "gen_ai.usage.input_tokens": request.prompt_tokens,
        "gen_ai.usage.output_tokens": request.completion_tokens,
        "http.response.status_code": request.status,
        "edgeft.finish": request.finish,
        "edgeft.queued_ms": request.queued_ms,
        "edgeft.ttft_ms": request.ttft_ms,
        "edgeft.tokens_per_s": request.tokens_per_s,
        "edgeft.deferral": request.deferral,
        "edgeft.cost": request.cost,
        "error.type": request.error,
    }
    return {name: value for name, value in values.items() if value is not None}
