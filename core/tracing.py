"""OpenTelemetry traces, where OTEL_EXPORTER_OTLP_ENDPOINT names a collector: spans of requests, and of what workers do with the job that
a request has created, in the same trace. OpenTelemetry's own variables (OTEL_SERVICE_NAME, OTEL_TRACES_SAMPLER, …) hold.

The SDK is in the extra `otel` and is imported only then; the interface alone, which comes with FastAPI, does nothing without it.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from opentelemetry import trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
FLUSH_MILLISECONDS = 5000
TRACE_PARENT = "traceparent"

_tracer = trace.get_tracer("sdft")


class TracingNotInstalled(Exception):
    """A collector is named, and the packages that send to it are missing."""


def tracing_wanted() -> bool:
    return any(os.environ.get(name) for name in ENDPOINTS) and os.environ.get("OTEL_SDK_DISABLED", "").lower() != "true"


def start_tracing(service_name: str) -> None:
    """Once a process, at its start; does nothing where no collector is named. `service_name` gives way to OTEL_SERVICE_NAME. Raises
    TracingNotInstalled."""
    if not tracing_wanted():
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        named = next(name for name in ENDPOINTS if os.environ.get(name))
        raise TracingNotInstalled(f"{named} is set, and OpenTelemetry is not installed: pip install 'sdft[otel]', or unset it") from error
    name = os.environ.get("OTEL_SERVICE_NAME") or service_name
    provider = TracerProvider(resource=Resource.create({"service.name": name}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)


def send_traces() -> None:
    """At the end of a process, which a signal may end before the SDK's own exit handler runs."""
    flush = getattr(trace.get_tracer_provider(), "force_flush", None)
    if flush is not None:
        flush(FLUSH_MILLISECONDS)


def current_trace_parent() -> str | None:
    """The current span as W3C Trace Context writes it, to go on from elsewhere; None where nothing is traced."""
    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    return carrier.get(TRACE_PARENT)


@contextmanager
def continued_span(name: str, trace_parent: str | None, **attributes: Any) -> Iterator[None]:
    """A span within the trace of whoever wrote `trace_parent`; a trace of its own where that is None."""
    parent = TraceContextTextMapPropagator().extract({TRACE_PARENT: trace_parent} if trace_parent else {})
    with _tracer.start_as_current_span(name, context=parent, attributes=attributes):
        yield


def note_on_span(**attributes: Any) -> None:
    trace.get_current_span().set_attributes(attributes)
