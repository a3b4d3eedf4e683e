"""The API matches its own OpenAPI document: schemathesis generates the requests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import schemathesis
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

from reir.query.request import MAX_K, MAX_TERMS
from reir.text import DEFAULT_MAX_CHARS
from reir_serving.config import ServeConfig
from reir_serving.http.app import create_app
from reir_serving.middleware.keys import new_key

LOCAL = "http://127.0.0.1:8000"


def check_all(application: Any, examples: int, real_names: bool) -> None:
    """Send generated requests to every operation, and check the answers against the document.

    Not every request that matches its schema is accepted, because filters, cursors and expressions
    have a grammar of their own. With `real_names` every request names a gallery that exists; this
    also replaces invalid names, so such requests may be accepted although they should not be.
    """
    left_out = [positive_data_acceptance] + [negative_data_rejection] * real_names
    schema = schemathesis.openapi.from_asgi("/openapi.json", application)
    bounded = settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    num_operations = 0
    for found in schema.get_all_operations():
        assert isinstance(found, Ok)
        operation = found.ok()
        num_operations += 1

        @bounded
        @given(case=operation.as_strategy())
        def send(case: Any) -> None:
            if real_names:
                _name_gallery(case)
            case.call_and_validate(base_url=LOCAL, excluded_checks=left_out)

        send()
    assert num_operations >= 15


def _name_gallery(case: Any) -> None:
    for part in (case.body, case.path_parameters, case.query):
        if isinstance(part, dict) and "gallery" in part:
            part["gallery"] = "photos"


@pytest.fixture
def application(backend: Any, tmp_path: Path) -> Any:
    # Without a search log, the server answers valid feedback with 501.
    return create_app(backend, ServeConfig(search_log=tmp_path / "searches"))


@pytest.mark.parametrize("real_names", [False, True], ids=["any names", "real names"])
def test_answers_match_the_document(application: Any, real_names: bool) -> None:
    check_all(application, 12, real_names)


@pytest.mark.slow
@pytest.mark.parametrize("real_names", [False, True], ids=["any names", "real names"])
def test_many_answers_match_the_document(application: Any, real_names: bool) -> None:
    check_all(application, 300, real_names)


def test_the_document_has_examples_problems_and_keys(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    search = document["paths"]["/v1/search"]["post"]
    assert document["components"]["schemas"]["SearchRequest"]["examples"][0]["expression"]
    assert "application/problem+json" in search["responses"]["4XX"]["content"]
    assert "Problem" in document["components"]["schemas"]
    assert "HTTPValidationError" not in document["components"]["schemas"]
    assert {"bearer": []} in search["security"]
    similar = document["paths"]["/v1/search/similar"]["post"]["requestBody"]["content"]
    assert set(similar) == {"application/json", "multipart/form-data"}


def test_the_openapi_limits_match_the_library(client: TestClient) -> None:
    schemas = client.get("/openapi.json").json()["components"]["schemas"]
    fields = schemas["SearchRequest"]["properties"]
    assert fields["expression"]["maxLength"] == DEFAULT_MAX_CHARS
    assert fields["also"]["maxItems"] == MAX_TERMS - 1
    for name in ("k", "per_image"):
        assert (fields[name]["minimum"], fields[name]["maximum"]) == (1, MAX_K)
    assert f'maxlength="{DEFAULT_MAX_CHARS}"' in client.get("/").text
    also = [{"expression": "blue"}] * (MAX_TERMS - 1)
    text = "x" * DEFAULT_MAX_CHARS
    full = {"gallery": "photos", "expression": text, "also": also, "k": 5.0}
    assert client.post("/v1/search", json=full).status_code == 200
    for more in ({"expression": text + "x"}, {"also": [*also, also[0]]}):
        (wrong,) = client.post("/v1/search", json=full | more).json()["errors"]
        assert wrong["kind"] in ("string_too_long", "too_long")  # rejected by the schema


def test_the_openapi_document_says_whether_a_key_is_required(
    client_of: Any, tmp_path: Path
) -> None:
    new_key(tmp_path / "keys.yaml", read=("*",), write=())
    for keys, needed in ((None, False), (tmp_path / "keys.yaml", True)):
        document = client_of(keys_file=keys).get("/openapi.json").json()
        assert ({} in document["paths"]["/v1/search"]["post"]["security"]) is not needed


def test_every_reference_of_the_document_resolves(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    known = document["components"]["schemas"]

    def walk(node: Any) -> None:
        if isinstance(node, dict):
            place = node.get("$ref", "#/components/schemas/Problem")
            assert place.rpartition("/")[2] in known, place
            node = list(node.values())
        if isinstance(node, list):
            for each in node:
                walk(each)

    walk(document)
