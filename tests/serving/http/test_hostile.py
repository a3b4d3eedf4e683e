"""Errors and hostile inputs: each gets the right status, and a problem without internals."""

from __future__ import annotations

import io
import json
import struct
import zlib
from typing import Any

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from reir.errors import (
    CheckpointError,
    ImageError,
    ImageFailure,
    Overloaded,
    SchemaMismatch,
    StoreError,
    StoreUnavailable,
)

JSON = {"Content-Type": "application/json"}
SEARCH_BODY: dict[str, Any] = {"gallery": "photos", "expression": "the red box"}


def problem_of(answer: Any, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = answer.json()
    assert problem["status"] == status
    assert problem["type"].startswith("/problems/")
    assert problem["detail"]
    assert problem["request_id"] == answer.headers["x-request-id"]
    assert "nosniff" in answer.headers["x-content-type-options"]
    return problem


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"k": 0}, "k"),
        ({"k": 10**30}, "k"),
        ({"k": "many"}, "k"),
        ({"per_image": -1}, "per_image"),
        ({"expression": ""}, "expression"),
        ({"expression": " \u200b\u0000 "}, "expression"),
        ({"expression": 7}, "expression"),
        ({"expression": "x" * 200_000}, "expression"),
        ({"expression": ["the red box"]}, "expression"),
        ({"min_presence": 1.5}, "min_presence"),
        ({"min_presence": 0.5}, "min_presence"),  # the fake encoder's scores are not calibrated
        ({"budget_ms": 0}, "budget_ms"),
        ({"where": "area >"}, "filter"),
        ({"where": "1 == 1 or true"}, "filter"),
        ({"where": "area > 0.1); drop collection photos; --"}, "filter"),
        ({"where": "image_id == '' || true"}, "filter"),
        ({"where": "nothing > 3"}, "filter"),
        ({"where": "(" * 5000}, "filter"),
        ({"where": "a" * 9000}, "where"),
        ({"group_by": "gallery"}, "group_by"),
        ({"also": [{"weight": 1}]}, "also.0"),
        ({"also": [{"expression": "x", "weight": 99}]}, "also.0.weight"),
        ({"also": [{"expression": "x"}] * 16}, "also"),
        ({"expression": "x" * 513}, "expression"),
        ({"explain": 0}, "explain"),
        ({"rerank": "yes"}, "rerank"),
        ({"k": True}, "k"),
        ({"k": "5"}, "k"),
        ({"k": 1.5}, "k"),
        ({"min_presence": False}, "min_presence"),
        ({"also": [{"expression": "x", "weight": "1"}]}, "also.0.weight"),
        ({"cursor": "x" * 3000}, "cursor"),
        ({"surprise": 1}, "surprise"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_the_problem_names_an_invalid_field(
    client: TestClient, changes: dict[str, Any], field: str
) -> None:
    problem = problem_of(client.post("/v1/search", json=SEARCH_BODY | changes), 422)
    assert field in [each["field"] for each in problem["errors"]]
    assert len(json.dumps(problem)) < 4000


@pytest.mark.parametrize(
    "expression",
    ["the red box \U0001f9f2", "\u202eder red box", "red\u0000box", "the  r\u0435d box", "'; --"],
    ids=["emoji", "rtl", "nul", "cyrillic", "sql"],
)
def test_unusual_text_is_a_valid_expression(client: TestClient, expression: str) -> None:
    answer = client.post("/v1/search", json=SEARCH_BODY | {"expression": expression})
    assert answer.status_code == 200
    assert answer.json()["expression"] == expression


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"x"',
        b"\xff\xfe",
        b"[" * 100_000 + b"]" * 100_000,
        b'{"gallery":"photos","expression":"x","k":NaN}',
        b'{"gallery":"photos","expression":"x","min_presence":Infinity}',
        b'{"gallery":"photos","expression":"\\ud800"}',
        b'{"gallery":"photos","expression":"x","k":1e400}',
        b'{"gallery":"photos","expression":"x","k":' + b"9" * 5000 + b"}",
        b'{"gallery":"photos","expression":"x","\\ud800":1}',
        b'{"gallery":"photos","expression":"x","' + b"y" * 99_000 + b'":1}',
    ],
    ids=lambda body: str(body[:30]),
)
def test_an_invalid_body_is_rejected(client: TestClient, body: bytes) -> None:
    for place in ("/v1/search", "/v1/search/batch", "/v1/search/similar", "/v1/feedback"):
        answer = client.post(place, content=body, headers=JSON)
        problem_of(answer, 400 if answer.status_code == 400 else 422)
        assert len(answer.content) < 4000


def test_unknown_paths_media_types_and_galleries_are_problems(client: TestClient) -> None:
    assert "/nowhere" in problem_of(client.get("/nowhere"), 404)["detail"]
    problem_of(client.post("/v1/search", content=b"x", headers={"Content-Type": "text/xml"}), 415)
    problem_of(client.post("/v1/search/similar", content=b"x"), 415)
    problem_of(client.post("/v1/search", json=SEARCH_BODY | {"gallery": "none"}), 404)


@pytest.mark.parametrize(
    ("path", "methods"),
    [
        ("/v1/search", "POST"),
        ("/v1/feedback", "POST"),
        ("/v1/galleries", "GET"),
        ("/v1/galleries/photos/images", "GET, POST"),
        ("/v1/galleries/photos/images/x", "DELETE, GET"),
        ("/v1/images/x", "GET"),
        ("/", "GET"),
    ],
)
@pytest.mark.parametrize("method", ["OPTIONS", "PUT", "TRACE"])
def test_an_unsupported_method_gets_405_with_the_allowed_ones(
    client: TestClient, path: str, methods: str, method: str
) -> None:
    wrong = client.request(method, path)
    problem_of(wrong, 405)
    assert wrong.headers["allow"] == methods


@pytest.mark.parametrize(
    "image_id",
    ["../../etc/passwd", "..%2f..%2fetc%2fpasswd", "%00", "a'%20or%20'1'=='1", "x" * 100, "*"],
    ids=lambda each: each[:12],
)
def test_an_image_id_cannot_reach_other_files(client: TestClient, image_id: str) -> None:
    for place in (
        f"/v1/images/{image_id}?gallery=photos",
        f"/v1/galleries/photos/images/{image_id}",
    ):
        problem_of(client.get(place), 404)
    problem_of(client.delete(f"/v1/galleries/photos/images/{image_id}"), 404)
    problem_of(client.get("/v1/images/x", params={"gallery": image_id}), 404)
    problem_of(client.post("/v1/search", json=SEARCH_BODY | {"gallery": image_id}), 404)


def test_files_of_the_package_are_not_served(client: TestClient) -> None:
    for place in (
        "/page/../app.py",
        "/page/%2e%2e/app.py",
        "/app.py",
        "/page/",
        "/page/..%5capp.py",
    ):
        problem_of(client.get(place), 404)


def bomb_png() -> bytes:
    """Return a PNG of 30,000 x 30,000 black pixels in a few kB."""
    row = b"\0" * (1 + 30_000 // 8)
    squeeze = zlib.compressobj(9)
    data = b"".join(squeeze.compress(row) for _ in range(30_000)) + squeeze.flush()

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 1, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'
HTML = b"<!doctype html><script>alert(1)</script>"


@pytest.mark.parametrize(
    ("data", "status"),
    [(SVG, 415), (HTML, 415), (b"", 422), (b"\xff\xd8\xff\xe0cut", 422), (bomb_png(), 413)],
    ids=["svg", "html", "empty", "cut", "bomb"],
)
def test_uploads_that_are_not_photos_are_rejected(
    client: TestClient, data: bytes, status: int
) -> None:
    files = {"image": ("p.png", data, "image/png")}
    request = json.dumps({"gallery": "photos"})
    problem_of(client.post("/v1/localize", files=files, data={"expression": "the red box"}), status)
    problem_of(client.post("/v1/search/similar", files=files, data={"request": request}), status)
    problem_of(client.post("/v1/galleries/photos/images", files=files), status)


@pytest.mark.parametrize(
    "attributes",
    ["[]", "{", '{"a": {"b": 1}}', '{"a": [1]}', '{"a": NaN}', '{"a": 1e999}', "[" * 9000],
    ids=lambda each: each[:14],
)
def test_attributes_that_filters_cannot_read_are_rejected(
    client: TestClient, pair: bytes, attributes: str
) -> None:
    files = {"image": ("p.png", pair, "image/png")}
    place = "/v1/galleries/photos/images"
    problem_of(client.post(place, files=files, data={"attributes": attributes}), 422)


def test_incomplete_forms_are_rejected(client: TestClient, pair: bytes) -> None:
    files = {"image": ("p.png", pair, "image/png")}
    problem_of(client.post("/v1/localize", files=files), 422)
    problem_of(client.post("/v1/search/similar", files=files), 422)
    problem_of(client.post("/v1/search/similar", files=files, data={"request": "{"}), 422)
    form = {"Content-Type": "multipart/form-data; boundary=x"}
    problem_of(client.post("/v1/localize", content=b"--x\r\nbroken", headers=form), 422)
    problem_of(client.post("/v1/localize", headers={"Content-Type": "multipart/form-data"}), 400)


def test_a_stored_file_that_is_no_longer_a_photo_is_never_sent(
    client: TestClient, backend: Any
) -> None:
    from reir.images.decode import path_of_uri

    hit = client.post("/v1/search", json=SEARCH_BODY | {"k": 1}).json()["hits"][0]
    for data in (SVG, HTML):
        path_of_uri(hit["uri"]).write_bytes(data)
        problem_of(client.get(hit["image_url"]), 404)
    path_of_uri(hit["uri"]).unlink()
    problem_of(client.get(hit["image_url"]), 404)


def test_a_file_that_is_both_gif_and_html_is_sent_as_gif(client: TestClient) -> None:
    out = io.BytesIO()
    Image.new("RGB", (40, 40), (220, 20, 20)).save(out, "GIF")
    files = {"image": ("<script>.html", out.getvalue() + HTML, "text/html")}
    added = client.post("/v1/galleries/photos/images", files=files)
    assert added.status_code == 201
    sent = client.get(f"/v1/images/{added.json()['image_id']}?gallery=photos")
    assert sent.headers["content-type"] == "image/gif"
    assert sent.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (StoreUnavailable("10.1.2.3:19530", "secret"), 503, "store-unavailable"),
        (StoreError("disk of 10.1.2.3 is full"), 503, "store-unavailable"),
        (Overloaded("the queue", 3.0), 503, "overloaded"),
        (SchemaMismatch("digests differ"), 409, "schema-mismatch"),
        (CheckpointError("/srv/10.1.2.3 is damaged"), 503, "not-ready"),
        (ImageError(ImageFailure.TRUNCATED, "cut"), 422, "bad-image"),
        (RuntimeError("10.1.2.3"), 500, "internal"),
        (TimeoutError(), 503, "timed-out"),
    ],
    ids=lambda each: type(each).__name__ if isinstance(each, Exception) else "",
)
def test_errors_of_the_platform_become_problems_without_internals(
    client: TestClient, backend: Any, error: Exception, status: int, kind: str
) -> None:
    backend.error = error
    answer = client.post("/v1/search", json=SEARCH_BODY)
    problem = problem_of(answer, status)
    assert problem["type"] == f"/problems/{kind}"
    assert "10.1.2.3" not in answer.text
    assert ("retry-after" in answer.headers) == (status == 503)
