"""Traces: spans of requests and of indexing batches, exported by OTLP. Off by default.

They are on if the setting `tracing.endpoint` or one of OpenTelemetry's variables
`OTEL_EXPORTER_OTLP_ENDPOINT` and `OTEL_EXPORTER_OTLP_TRACES_ENDPOINT` names a collector. Otherwise
OpenTelemetry is not imported, and no span is created.

Durations are measured whether traces are on or not (`reir.query.clock`, and the records of an
indexing run). Spans are made from them afterwards, so the measured code knows nothing of traces.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, NamedTuple

from pydantic import Field

from reir.config import StrictConfig
from reir.errors import ConfigError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span, Tracer

SECTION = "tracing"
ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
ENDPOINTS = (ENDPOINT, "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
DELAY_MS = "OTEL_BSP_SCHEDULE_DELAY"
SAMPLER, SAMPLER_ARGUMENT = "OTEL_TRACES_SAMPLER", "OTEL_TRACES_SAMPLER_ARG"

Attributes = Mapping[str, str | int | float]


class TracingSettings(StrictConfig):
    """Settings of traces. OpenTelemetry's own variables count more.

    Attributes:
        endpoint: address of a collector that takes OTLP over HTTP, such as http://localhost:4318;
            None exports nothing.
        sample_ratio: fraction of the traces to export. A request whose caller has decided already
            (`traceparent`) follows that decision.
    """

    endpoint: str | None = None
    sample_ratio: float = Field(1.0, ge=0, le=1)


class Period(NamedTuple):
    """When something happened.

    Attributes:
        name: what happened.
        start_ns, end_ns: Unix time in nanoseconds.
        error: class of the error that ended it; empty if it succeeded.
    """

    name: str
    start_ns: int
    end_ns: int
    error: str = ""


class _Export(NamedTuple):
    provider: TracerProvider
    tracer: Tracer


_exports: list[_Export] = []
"""Where the spans of this process go; empty while traces are off."""


def set_variables() -> None:
    """Set OpenTelemetry's variables from the settings, unless they are set already.

    Processes that this one starts, such as the replicas of a local Ray, inherit them.

    Raises:
        ConfigError: the section `tracing` is wrong.
    """
    from reir.settings import load_settings

    settings = load_settings(SECTION, TracingSettings).values
    if settings.endpoint is None or any(os.environ.get(name) for name in ENDPOINTS):
        return
    os.environ[ENDPOINT] = settings.endpoint
    os.environ.setdefault(SAMPLER, "parentbased_traceidratio")
    os.environ.setdefault(SAMPLER_ARGUMENT, str(settings.sample_ratio))


def is_configured() -> bool:
    """Whether OpenTelemetry's variables name a collector, and do not switch traces off."""
    return (
        any(os.environ.get(name) for name in ENDPOINTS)
        and os.environ.get("OTEL_SDK_DISABLED", "").lower() != "true"
        # OpenTelemetry evaluates this variable only in its automatic configuration, which is not
        # used here.
        and os.environ.get("OTEL_TRACES_EXPORTER", "otlp") == "otlp"
    )


def start_tracing(service: str) -> bool:
    """Export the spans of this process from now on, if that is configured.

    Args:
        service: name of the service, unless `OTEL_SERVICE_NAME` names another one.

    Returns:
        Whether spans are exported.

    Raises:
        ConfigError: it is configured, but OpenTelemetry is not installed.
    """
    if _exports or not is_configured():
        return bool(_exports)
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ConfigError(
            f"traces are configured ({' or '.join(ENDPOINTS)}), but cannot be exported: {error}; "
            f"pip install 'reir-platform[operations]', or unset the variable"
        ) from error
    # Attributes that are given in code would count more than the variable.
    named = {} if os.environ.get("OTEL_SERVICE_NAME") else {"service.name": service}
    release = version("reir-platform")
    provider = TracerProvider(resource=Resource.create({**named, "service.version": release}))
    # Ray kills replicas when a server stops, and the spans that wait then are lost.
    # The processor reads this variable when it is created.
    os.environ.setdefault(DELAY_MS, "1000")
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    _exports.append(_Export(provider, provider.get_tracer("reir", release)))
    return True


def tracer_provider() -> TracerProvider | None:
    """Return OpenTelemetry's source of spans for libraries that make some; None if traces are off.

    It is not OpenTelemetry's global one, which belongs to the program that uses this library, and
    which Ray would use for spans of its own.
    """
    return _exports[0].provider if _exports else None


def current_trace_id(**attributes: str) -> str:
    """Return the id of the trace that the calling code belongs to, 32 hex digits; empty without.

    Args:
        attributes: are added to the current span.
    """
    if not is_in_span():
        return ""
    from opentelemetry.trace import get_current_span

    span = get_current_span()
    span.set_attributes(attributes)
    return f"{span.get_span_context().trace_id:032x}"


def is_in_span() -> bool:
    """Whether traces are on, and the calling code belongs to a span, such as that of a request."""
    if not _exports:
        return False
    from opentelemetry.trace import get_current_span

    return get_current_span().get_span_context().is_valid


def record_span(
    period: Period,
    *,
    parent: Span | None = None,
    attributes: Attributes | None = None,
) -> Span:
    """Make a span of something that has happened. Call this only if traces are on.

    Args:
        period: when it happened.
        parent: the span that contains it; None for the span that the calling code belongs to.
        attributes: more about it.
    """
    from opentelemetry.trace import StatusCode, set_span_in_context

    span = _exports[0].tracer.start_span(
        period.name,
        None if parent is None else set_span_in_context(parent),
        attributes=attributes,
        start_time=period.start_ns,
    )
    if period.error:
        # Without the message, which may quote an expression: expressions are personal data.
        span.set_attribute("error.type", period.error)
        span.set_status(StatusCode.ERROR)
    span.end(period.end_ns)
    return span


def stop_tracing() -> None:
    """Send the spans that still wait, and create no more."""
    while _exports:
        _exports.pop().provider.shutdown()
