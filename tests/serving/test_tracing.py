"""Traces of requests, as a real collector receives them."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient

from reir.errors import ConfigError
from reir.models.interfaces import EncodedExpression
from reir.tracing import ENDPOINT, start_tracing, stop_tracing
from reir_serving.middleware.logs import ACCESS
from reir_testing.otlp import CollectedSpan, Collector, trace_collector

TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = {"traceparent": f"00-{TRACE}-{CALLER}-01"}
SEARCH = {"gallery": "photos", "expression": "the red box", "k": 1}


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    with trace_collector() as made:
        monkeypatch.setenv(ENDPOINT, made.endpoint)
        assert start_tracing("reir-serve")  # before the fixture `client` makes the application
        yield made
        stop_tracing()


def search(client: TestClient, **fields: Any) -> Any:
    return client.post("/v1/search", json=SEARCH | fields, headers=TRACEPARENT)


def names(spans: list[CollectedSpan]) -> list[str]:
    return [each.name for each in spans]


def test_a_search_is_a_span_of_the_callers_trace_with_its_stages(
    collector: Collector, client: TestClient
) -> None:
    assert search(client).status_code == 200
    stop_tracing()
    request = collector.wait_for("POST /v1/search")
    assert (request.service, request.trace_id, request.parent_id) == ("reir-serve", TRACE, CALLER)
    assert request.attributes["http.route"] == "/v1/search"
    assert request.attributes["http.response.status_code"] == 200
    (answer,) = collector.children(request)
    assert answer.attributes == {"reir.gallery": "photos", "reir.queries": 1}
    stages = collector.children(answer)
    assert names(stages) == ["text", "search", "rank", "rank"]
    (inner,) = collector.children(stages[1])
    assert inner.name == "store search"
    for outer, within in ((request, answer), (answer, stages[0]), (stages[1], inner)):
        assert outer.start_ns <= within.start_ns <= within.end_ns
        assert within.end_ns <= outer.end_ns + 1_000_000  # two clocks, so within a millisecond
    assert {each.trace_id for each in collector.spans} == {TRACE}
    assert not any(each.failed for each in collector.spans)


def test_an_answer_can_be_matched_with_its_trace_and_spans_contain_no_expression(
    collector: Collector, client: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, ACCESS.name)
    refused = search(client, expression="a secret " * 200)
    stop_tracing()
    assert refused.status_code == 422
    assert refused.json()["trace_id"] == TRACE
    (line,) = [json.loads(each.getMessage()) for each in caplog.records if each.name == ACCESS.name]
    assert line["trace_id"] == TRACE
    request = collector.wait_for("POST /v1/search")
    assert request.attributes["reir.request_id"] == line["request_id"]
    assert "secret" not in repr(collector.spans)
    assert not request.failed, "a mistake of the client is no failure of the server"


def test_a_failed_stage_is_marked(
    collector: Collector, client: TestClient, backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Any) -> list[EncodedExpression]:
        raise MemoryError("the red box does not fit")

    monkeypatch.setattr(backend.encoder, "encode_expressions", fail)
    assert search(client).status_code == 500
    stop_tracing()
    request = collector.wait_for("POST /v1/search")
    (answer,) = collector.children(request)
    (text,) = collector.children(answer)
    for span, kind in ((request, "500"), (answer, "MemoryError"), (text, "MemoryError")):
        assert (span.failed, span.attributes["error.type"]) == (True, kind)
        assert span.num_events == 0, "the event of an exception would quote its message"


def test_a_caller_that_does_not_sample_is_followed(
    collector: Collector, client: TestClient
) -> None:
    header = {"traceparent": f"00-{TRACE}-{CALLER}-00"}
    assert client.post("/v1/search", json=SEARCH, headers=header).status_code == 200
    assert client.post("/v1/search", json=SEARCH).status_code == 200
    stop_tracing()
    request = collector.wait_for("POST /v1/search")
    assert request.parent_id == ""
    assert TRACE not in {each.trace_id for each in collector.spans}


def test_checks_of_machines_are_not_traced(collector: Collector, client: TestClient) -> None:
    for path in ("/healthz", "/readyz", "/metrics"):
        assert client.get(path).status_code == 200
    stop_tracing()
    assert collector.spans == []


def test_each_slice_of_a_batch_is_an_answer(collector: Collector, client: TestClient) -> None:
    expressions = [f"the {color} box" for color in ("red", "blue", "green")] * 2
    body = {"gallery": "photos", "expressions": expressions}
    sent = client.post("/v1/search/batch", json=body)
    assert sent.status_code == 200, sent.text
    stop_tracing()
    answers = collector.children(collector.wait_for("POST /v1/search/batch"))
    assert [each.attributes["reir.queries"] for each in answers] == [4, 2]


def test_without_a_collector_nothing_is_imported_or_recorded(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(ENDPOINT, raising=False)
    assert not start_tracing("reir-serve")
    assert search(client).status_code == 200
    assert "trace_id" not in search(client, k=0).json()
    code = (
        "import sys, reir.query.search, reir_ingestion.pipeline\n"
        "from reir.tracing import current_trace_id, is_in_span, start_tracing, tracer_provider\n"
        "assert not start_tracing('x') and not is_in_span() and not current_trace_id()\n"
        "assert tracer_provider() is None\n"
        "print([name for name in sys.modules if name.startswith('opentelemetry')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("name", "value"), [("OTEL_SDK_DISABLED", "true"), ("OTEL_TRACES_EXPORTER", "none")]
)
def test_opentelemetrys_own_switches_count(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENDPOINT, "http://127.0.0.1:1")
    monkeypatch.setenv(name, value)
    assert not start_tracing("reir-serve")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENDPOINT, "http://127.0.0.1:1")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigError, match=r"pip install 'reir-platform\[operations\]'"):
        start_tracing("reir-serve")
