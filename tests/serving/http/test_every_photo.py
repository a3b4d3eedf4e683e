"""`POST /v1/search/all`: the stream of every photo, its errors and what a tenant sees of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

import reir
from reir.cli.every_photo import expectation
from reir.client.http_client import Client
from reir.errors import QueryError, ServerError, StoreUnavailable
from reir.query import every_photo
from reir.query.every_photo import PhotoScan, ScannedPart, end_line
from reir.query.presence import Calibration
from reir.query.search import CheckpointExtras, Gallery
from reir_serving.backend.models import LoadedModel, ModelCache
from reir_serving.http.routes.every_photo import LINES, EveryPhotoLine
from reir_serving.middleware.keys import new_key
from reir_testing import FakeEncoder

ASKED = {"gallery": "photos", "expression": "the green box"}


pytestmark = pytest.mark.usefixtures("calibrated")


@pytest.fixture
def local(backend: Any, calibrated: Calibration) -> Gallery:
    """Return the gallery of the service in this process."""
    extras = CheckpointExtras(calibration=calibrated)
    return Gallery("photos", backend.store, backend.encoder, extras)


@pytest.fixture
def remote(serve: Any, backend: Any) -> Iterator[Client]:
    with Client(serve(backend), patience_s=0.0) as made:
        yield made


def lines_of(client: TestClient, headers: dict[str, str] | None = None, **options: Any) -> Any:
    answer = client.post("/v1/search/all", json={**ASKED, **options}, headers=headers or {})
    assert (answer.status_code, answer.headers["content-type"]) == (200, LINES)
    lines = [json.loads(line) for line in answer.text.splitlines()]
    for line in lines:
        EveryPhotoLine.model_validate(line)
    return lines


def test_the_stream_has_what_the_library_finds(client: TestClient, local: Gallery) -> None:
    first, *photos, last = lines_of(client, min_presence=0.0)
    wanted = local.every_photo("the green box", min_presence=0.0)
    assert first["search"] == {
        "expression": "the green box",
        "gallery": "photos",
        "version": "v1",
        "num_photos": 2,
        "min_presence": 0.0,
        "recall": 1.0,
        "precision": 0.5,
    }
    assert [each["photo"]["instance_id"] for each in photos] == [e.instance_id for e in wanted]
    assert last == end_line(2, 0)
    assert client.get(photos[0]["photo"]["thumbnail_url"]).status_code == 200


def test_filter_and_threshold_hold(client: TestClient) -> None:
    assert len(lines_of(client, min_presence=0.0, where='attr.camera == "X100"')) == 3
    assert lines_of(client)[-1] == end_line(1, 0)
    assert lines_of(client, recall=0.9)[0]["search"]["min_presence"] == 0.3


@pytest.mark.parametrize(
    ("options", "status", "said"),
    [
        ({"recall": 0.9, "precision": 0.9}, 422, "at most one"),
        ({"min_presence": 2}, 422, "less than or equal to 1"),
        ({"precision": 0.999}, 422, "gallery of 2 photos"),
        ({"where": "colour == 1"}, 422, "colour"),
        ({"expression": " "}, 422, "is empty"),
        ({"gallery": "none"}, 404, "no gallery"),
        ({"k": 3}, 422, "k"),
    ],
)
def test_a_wrong_request_is_refused_before_the_stream(
    client: TestClient, options: dict[str, Any], status: int, said: str
) -> None:
    answer = client.post("/v1/search/all", json={**ASKED, **options})
    assert answer.status_code == status
    assert said in answer.text


def test_a_tenant_sees_its_own_photos_only(
    client_of: Callable[..., TestClient], tmp_path: Path
) -> None:
    key = new_key(tmp_path / "keys.yaml", read=("photos",), write=(), tenant="acme")
    client = client_of(keys_file=tmp_path / "keys.yaml")
    assert client.post("/v1/search/all", json=ASKED).status_code == 401
    first, photo, last = lines_of(client, {"X-API-Key": key}, min_presence=0.0)
    assert first["search"]["num_photos"] is None
    assert first["search"]["precision"] is None, "the number of photos follows from it"
    assert first["search"]["recall"] == 1.0
    assert photo["photo"]["attributes"] == {"tenant": "acme"}
    assert "/" not in photo["photo"]["uri"]
    assert last == end_line(1, 0)


@pytest.mark.parametrize("precision", [0.0, 0.5, 1.0])
def test_a_tenant_cannot_ask_for_a_precision(
    client_of: Callable[..., TestClient], tmp_path: Path, precision: float
) -> None:
    """Its threshold would tell how many photos the gallery has."""
    key = new_key(tmp_path / "keys.yaml", read=("photos",), write=(), tenant="acme")
    client = client_of(keys_file=tmp_path / "keys.yaml")
    body = {**ASKED, "precision": precision}
    answer = client.post("/v1/search/all", json=body, headers={"X-API-Key": key})
    assert (answer.status_code, answer.json()["errors"][0]["field"]) == (422, "precision")
    assert "2" not in answer.json()["detail"]
    assert "use min_presence or recall" in answer.json()["detail"]


def test_the_client_of_a_tenant_gets_no_precision(serve: Any, backend: Any, tmp_path: Path) -> None:
    key = new_key(tmp_path / "keys.yaml", read=("photos",), write=(), tenant="acme")
    address = serve(backend, keys_file=tmp_path / "keys.yaml")
    with Client(address, key=key, patience_s=0.0) as client:
        found = client.every_photo("the green box", "photos")
        assert (found.num_photos, found.decision.precision) == (None, None)
        assert expectation(found.decision, found.num_photos) == (
            "Photos whose presence is at least 0.7. Recall to expect: 63 %."
        )
        assert len(list(found)) == 1


def test_the_client_streams(remote: Client, local: Gallery) -> None:
    assert reir.Client is Client
    for options in ({"min_presence": 0.0}, {"recall": 0.9, "where": "area > 0"}, {}):
        found = remote.every_photo("the green box", "photos", **options)
        wanted = local.every_photo("the green box", **options)
        assert list(found) == list(wanted)
        assert (found.decision, found.num_photos) == (wanted.decision, wanted.num_photos)
    first = remote.every_photo("the green box", "photos", min_presence=0.0)
    next(first)
    assert remote.search("the green box", "photos").hits  # while the stream is open
    assert len(list(first)) == 1
    with pytest.raises(QueryError, match="gallery of 2 photos"):
        remote.every_photo("the green box", "photos", precision=0.999)


def test_the_end_tells_how_many_photos_have_other_colors(
    remote: Client, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def parts(self: PhotoScan) -> Any:
        yield ScannedPart(self._found(self.first.rows), num_contradicted=2)
        yield ScannedPart([], num_contradicted=3)

    monkeypatch.setattr(PhotoScan, "parts", parts)
    assert lines_of(client)[-1] == {"end": {"found": 1, "contradicted": 5}}
    found = remote.every_photo("the green box", "photos")
    assert (len(list(found)), found.num_contradicted) == (1, 5)


def test_an_error_within_the_stream_is_its_last_line(
    remote: Client, client: TestClient, backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(every_photo, "FIRST_PHOTOS", 1)
    search, calls = backend.store.search, []

    def failing(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        if len(calls) % 2 == 0:
            raise StoreUnavailable("here", "gone")
        return search(*arguments, **options)

    monkeypatch.setattr(backend.store, "search", failing)
    *_, last = lines_of(client)
    assert last["error"]["status"] == 503
    with pytest.raises(StoreUnavailable):
        list(remote.every_photo("the green box", "photos"))


def test_a_cut_stream_is_an_error(
    remote: Client, backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def cut(self: PhotoScan) -> Any:
        yield ScannedPart(self._found(self.first.rows))
        raise AssertionError("the connection breaks")

    monkeypatch.setattr(PhotoScan, "parts", cut)
    found = remote.every_photo("the green box", "photos")
    with pytest.raises(ServerError, match="ended before it was complete"):
        list(found)


def test_a_promotion_to_another_model_is_followed(
    client: TestClient, backend: Any, calibrated: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reir_serving.backend.workers.LIVE_STALE_S", 0.0)
    monkeypatch.setattr("reir_serving.backend.workers.LIVE_FRESH_S", 0.0)
    assert lines_of(client)[-1] == end_line(1, 0)
    other = FakeEncoder()
    other.digest = "other"
    backend.store.create_version(
        "photos", "v2", replace(backend.store.versions("photos")[0].spec, digest="other")
    )
    backend.store.promote("photos", "v2")
    backend.encoder = other
    extras = CheckpointExtras(calibration=calibrated)
    backend._workers._models = ModelCache(lambda _: LoadedModel(other, extras))
    first, last = lines_of(client)
    assert (first["search"]["version"], last) == ("v2", end_line(0, 0))
