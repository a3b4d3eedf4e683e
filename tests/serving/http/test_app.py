"""Every endpoint: what a client sends, and what it gets."""

from __future__ import annotations

import io
import json
import math
from typing import Any

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from reir.checkpoint import load_color_reader
from reir.models.nano.encoder import cpu_path
from reir.query.search import CheckpointExtras
from reir.query.verify.photos import PixelVerifier
from reir_serving.backend.models import LoadedModel, ModelCache
from reir_serving.backend.photos import MAX_NAME_BYTES
from reir_serving.backend.service import SLICE_QUERIES
from reir_serving.backend.workers import SearchWorkers
from reir_serving.config import Limits, LiveSettings
from reir_serving.http.routes.galleries import (
    MAX_PHOTOS,
    AddImageAnswer,
    GalleriesAnswer,
    GalleryOut,
    ImageAnswer,
    PhotosAnswer,
)
from reir_serving.http.routes.images import LocalizeAnswer
from reir_serving.http.routes.search_schemas import BatchAnswer, SearchAnswer


def search(client: TestClient, expression: str = "the red box", **more: Any) -> dict[str, Any]:
    body = {"gallery": "photos", "expression": expression, **more}
    answer = client.post("/v1/search", json=body)
    assert answer.status_code == 200, answer.text
    SearchAnswer.model_validate_json(answer.content)
    return dict(answer.json())


def form(data: bytes, **fields: str) -> dict[str, Any]:
    return {"files": {"image": ("p.png", data, "image/png")}, "data": fields}


def test_a_search_finds_the_instance(client: TestClient) -> None:
    answer = search(client, k=1)
    (hit,) = answer["hits"]
    assert hit["box"] == pytest.approx([10 / 120, 20 / 80, 40 / 120, 60 / 80], abs=0.01)
    assert hit["attributes"] == {"camera": "X100"}
    assert answer["found"] is True
    assert answer["images"] is None


def test_an_answer_says_whether_the_expression_is_english(client: TestClient) -> None:
    assert search(client)["english"] is True
    assert search(client, "die rote Kiste neben der blauen")["english"] is False


def test_hits_are_grouped_by_photo_on_request(client: TestClient) -> None:
    answer = search(client, per_image=3, group_by="image")
    groups = {each["image_id"]: len(each["hits"]) for each in answer["images"]}
    assert sorted(groups.values()) == [1, 2]
    assert answer["images"][0]["score"] == answer["hits"][0]["score"]


def test_options_reach_the_backend(client: TestClient, backend: Any) -> None:
    like = search(client, k=1)["hits"][0]["instance_id"]
    backend.queries.clear()
    also = [{"expression": "the blue box", "weight": -0.5}, {"instance_id": like}]
    search(
        client,
        also=also,
        rerank=True,
        localize=True,
        explain=True,
        budget_ms=5000,
        where="area > 0.01",
    )
    (query,) = backend.queries
    assert [(t.expression, t.instance_id, t.weight) for t in query.terms] == [
        ("the red box", "", 1.0),
        ("the blue box", "", -0.5),
        ("", like, 1.0),
    ]
    assert (query.rerank, query.localize) == (True, True)
    assert (query.explain, query.budget_ms, query.where) == (True, 5000, "area > 0.01")


def test_k_defaults_to_the_live_settings(client: TestClient, backend: Any) -> None:
    backend.live = LiveSettings(k=1)
    assert len(search(client)["hits"]) == 1
    assert len(search(client, k=2)["hits"]) == 2


def test_the_reranker_is_off_unless_the_request_or_the_live_settings_ask_for_it(
    client: TestClient, backend: Any
) -> None:
    backend.queries.clear()
    search(client)
    search(client, rerank=True)
    backend.live = LiveSettings(rerank=True)
    search(client)
    search(client, rerank=False)
    assert [query.rerank for query in backend.queries] == [False, True, True, False]


def test_a_request_for_too_many_hits_is_refused_with_the_limit(client_of: Any) -> None:
    client = client_of()
    body = {"gallery": "photos", "expressions": ["the red box"] * 11, "k": 1000}
    refused = client.post("/v1/search/batch", json=body)
    assert refused.status_code == 422
    (wrong,) = refused.json()["errors"]
    assert wrong["field"] == "k"
    assert "11000 hits in total are requested (queries: 11)" in wrong["detail"]
    assert "limit for one request is 10000" in wrong["detail"]
    body["expressions"] = ["the red box"] * 2
    assert client.post("/v1/search/batch", json=body).status_code == 200
    refused = client.post("/v1/search/batch", json={**body, "explain": True})
    assert refused.status_code == 422
    assert "2000 hits" in refused.json()["detail"]
    assert "limit for one request with explain is 1000" in refused.json()["detail"]


def test_a_request_that_localizes_too_many_queries_is_refused_with_the_limit(
    client_of: Any,
) -> None:
    client = client_of()
    body = {"gallery": "photos", "expressions": ["the red box"] * 21}
    assert client.post("/v1/search/batch", json=body).status_code == 200
    refused = client.post("/v1/search/batch", json={**body, "localize": True})
    assert refused.status_code == 422
    (wrong,) = refused.json()["errors"]
    assert wrong["field"] == "localize"
    assert "for 21 queries, but the limit for one request is 20" in wrong["detail"]


def test_zoom_returns_where_it_looked(client: TestClient) -> None:
    hit = search(client, k=1)["hits"][0]
    assert hit["zoom"] is None
    zoomed = search(client, k=1, zoom=True)["hits"][0]
    assert zoomed["zoom"]["steps"][0]["frame"] == [0, 0, 1, 1]
    assert zoomed["zoom"]["steps"][0]["box"] == hit["box"]
    assert zoomed["box"] == zoomed["zoom"]["box"]
    assert zoomed["zoom"]["score"] == pytest.approx(hit["score"], abs=1e-5)


def test_verification_returns_what_the_pixels_say(client: TestClient, backend: Any) -> None:
    assert search(client, verify=True, explain=True)["hits"][0]["evidence"]["colors"] == []
    extras = CheckpointExtras(verifier=PixelVerifier(load_color_reader))
    models = ModelCache(lambda _: LoadedModel(backend.encoder, extras))
    backend._workers = SearchWorkers(backend.store, models, backend._config.limits)
    backend._stages_of.clear()
    answer = search(client, k=1, verify=True, explain=True)
    ((color,),) = (hit["evidence"]["colors"] for hit in answer["hits"])
    assert (color["word"], color["likely"]) == ("red", "red")
    assert 0.5 < color["probability"] == color["likely_probability"] <= 1
    assert answer["timings_ms"]["verify"] > 0
    body = {"gallery": "photos", "expression": "the red box", "verify": True, "rerank": True}
    (wrong,) = client.post("/v1/search", json=body).json()["errors"]
    assert wrong["field"] == "verify"


def test_a_request_that_zooms_in_for_too_many_queries_is_refused_with_the_limit(
    client_of: Any,
) -> None:
    client = client_of()
    body = {"gallery": "photos", "expressions": ["the red box"] * 4, "zoom": True}
    answers = client.post("/v1/search/batch", json=body).json()["answers"]
    assert all(answer["hits"][0]["zoom"] for answer in answers)
    body["expressions"] = ["the red box"] * 5
    refused = client.post("/v1/search/batch", json=body)
    assert refused.status_code == 422
    (wrong,) = refused.json()["errors"]
    assert wrong["field"] == "zoom"
    assert "for 5 queries, but the limit for one request is 4" in wrong["detail"]


def test_zoom_without_an_expression_is_refused(client: TestClient) -> None:
    like = search(client, k=1)["hits"][0]["instance_id"]
    body = {"gallery": "photos", "instance_id": like, "zoom": True}
    refused = client.post("/v1/search/similar", json=body)
    assert refused.status_code == 422
    (wrong,) = refused.json()["errors"]
    assert wrong["field"] == "zoom"


def test_a_picture_can_show_a_part_of_a_photo(client: TestClient) -> None:
    url = search(client, k=1)["hits"][0]["image_url"]
    whole = Image.open(io.BytesIO(client.get(url).content))
    part = client.get(f"{url}&frame=0.5&frame=0&frame=1&frame=0.5")
    assert part.headers["content-type"] == "image/jpeg"
    assert part.headers["etag"] != client.get(url).headers["etag"]
    shown = Image.open(io.BytesIO(part.content))
    assert shown.size == (math.ceil(whole.width / 2), math.ceil(whole.height / 2))
    for sides, said in (
        ("frame=0.5&frame=0&frame=0.5&frame=1", "with left < right and top < bottom, got 0.5, 0"),
        ("frame=0&frame=0&frame=1&frame=1&boxes=true", "cannot be combined with `boxes`"),
    ):
        refused = client.get(f"{url}&{sides}")
        assert refused.status_code == 422
        assert said in refused.json()["errors"][0]["detail"]
    assert client.get(f"{url}&frame=0&frame=0&frame=1").status_code == 422


def test_the_hit_limit_can_change_while_the_server_runs(client: TestClient, backend: Any) -> None:
    body = {"gallery": "photos", "expression": "the red box", "k": 6}
    assert client.post("/v1/search", json=body).status_code == 200
    backend.live = LiveSettings(hits=5)
    assert client.post("/v1/search", json=body).status_code == 422


def test_a_batch_is_answered_in_order(client: TestClient) -> None:
    body = {"gallery": "photos", "expressions": ["the green box", "the blue box"], "k": 1}
    answer = client.post("/v1/search/batch", json=body)
    BatchAnswer.model_validate_json(answer.content)
    first, second = answer.json()["answers"]
    assert [first["expression"], second["expression"]] == body["expressions"]
    assert first["hits"][0]["image_id"] != second["hits"][0]["image_id"]


def test_similar_accepts_an_instance_with_an_expression(client: TestClient, backend: Any) -> None:
    like = search(client, k=1)["hits"][0]["instance_id"]
    body = {"gallery": "photos", "instance_id": like, "expression": "but blue"}
    answer = client.post("/v1/search/similar", json=body)
    SearchAnswer.model_validate_json(answer.content)
    assert [(t.instance_id, t.expression) for t in backend.queries[-1].terms] == [
        (like, ""),
        ("", "but blue"),
    ]


def test_similar_accepts_a_photo_with_a_box(
    client: TestClient, backend: Any, green_box: bytes
) -> None:
    request = json.dumps({"gallery": "photos", "box": [0.2, 0.1, 0.8, 0.9]})
    answer = client.post("/v1/search/similar", **form(green_box, request=request))
    assert answer.status_code == 200, answer.text
    (term,) = backend.queries[-1].terms
    assert term.vector.shape == (16,)


def test_localize_finds_boxes_in_a_photo(client: TestClient, pair: bytes) -> None:
    answer = client.post("/v1/localize", **form(pair, expression="the blue box", k="1"))
    LocalizeAnswer.model_validate_json(answer.content)
    (found,) = answer.json()["boxes"]
    assert found["box"][0] == pytest.approx(70 / 120, abs=0.01)


def test_some_photos_of_a_gallery_are_listed(client: TestClient) -> None:
    answer = client.get("/v1/galleries/photos/images")
    images = PhotosAnswer.model_validate_json(answer.content).images
    assert len({each.image_id for each in images}) == len(images) > 1
    assert client.get(images[0].thumbnail_url).headers["content-type"].startswith("image/")
    first = client.get("/v1/galleries/photos/images", params={"limit": 1}).json()["images"]
    assert [each["image_id"] for each in first] == [images[0].image_id]
    for limit in (0, MAX_PHOTOS + 1):
        assert client.get(f"/v1/galleries/photos/images?limit={limit}").status_code == 422
    assert client.get("/v1/galleries/none/images").status_code == 404


def test_a_hit_says_what_differs_on_request(client: TestClient) -> None:
    sentence = "the red box on the right"  # it is on the left
    (plain,), (asked,) = (
        search(client, sentence, k=1, explain=explain)["hits"] for explain in (False, True)
    )
    assert plain["differs"] == []
    assert asked["differs"] == [{"kind": "side", "wanted": "right", "seen": "left"}]
    assert (asked["photo_presence"], asked["likelihood"]) == (None, None)  # not calibrated


def test_galleries_are_listed(client: TestClient) -> None:
    answer = client.get("/v1/galleries")
    GalleriesAnswer.model_validate_json(answer.content)
    assert [each["name"] for each in answer.json()["galleries"]] == ["other", "photos"]
    one = client.get("/v1/galleries/photos")
    GalleryOut.model_validate_json(one.content)
    assert one.json()["versions"][0]["num_images"] == 2


def test_galleries_that_are_not_served_do_not_exist_for_clients(client_of: Any) -> None:
    client = client_of(galleries=("other",))
    assert [each["name"] for each in client.get("/v1/galleries").json()["galleries"]] == ["other"]
    body = {"gallery": "photos", "expression": "the red box"}
    assert client.post("/v1/search", json=body).status_code == 404


def test_a_photo_with_a_long_name_keeps_the_end_of_its_name(
    client: TestClient, magenta_box: bytes
) -> None:
    files = {"image": ("folder/" + 300 * "x" + ".png", magenta_box, "image/png")}
    added = client.post("/v1/galleries/photos/images", files=files)
    name = added.json()["uri"].rpartition("/")[2]
    assert name == (MAX_NAME_BYTES - 4) * "x" + ".png"


def test_a_photo_is_added_found_and_deleted(client: TestClient, magenta_box: bytes) -> None:
    added = client.post(
        "/v1/galleries/photos/images", **form(magenta_box, attributes='{"year": 2024}')
    )
    assert added.status_code == 201, added.text
    AddImageAnswer.model_validate_json(added.content)
    image_id = added.json()["image_id"]
    hit = search(client, "the magenta box", k=1, where="attr.year == 2024")["hits"][0]
    assert hit["image_id"] == image_id

    place = added.headers["location"]
    row = client.get(place)
    ImageAnswer.model_validate_json(row.content)
    assert (row.json()["width_px"], len(row.json()["instances"])) == (120, 1)

    gone = client.delete(place)
    assert (gone.status_code, gone.content) == (204, b"")
    assert client.delete(place).status_code == 404
    assert client.get(place).status_code == 404
    found = search(client, "the magenta box", where="attr.year == 2024")
    assert found["hits"] == []
    assert found["found"] is False


def test_pictures_are_whole_scaled_down_or_have_boxes(client: TestClient) -> None:
    hit = search(client, k=1)["hits"][0]
    whole = client.get(hit["image_url"])
    assert whole.headers["content-type"] == "image/png"
    small = client.get(hit["image_url"] + "&width=40")
    assert small.headers["content-type"] == "image/jpeg"
    assert Image.open(io.BytesIO(small.content)).size == (40, 27)
    plain = Image.open(io.BytesIO(whole.content)).convert("RGB")
    for options in ("&boxes=1", f"&instance={hit['image_id']}%231"):
        drawn = Image.open(io.BytesIO(client.get(hit["image_url"] + options).content))
        assert drawn.size == plain.size
        assert drawn.tobytes() != plain.tobytes()
    wide = client.get(hit["image_url"] + "&width=4096")
    assert Image.open(io.BytesIO(wide.content)).size == plain.size


def test_the_limit_of_uploaded_photos_does_not_hold_for_stored_ones(client_of: Any) -> None:
    client = client_of(limits=Limits(pixels=100))
    place = search(client, k=1)["hits"][0]["image_url"]
    assert client.get(place + "&width=40").status_code == 200


def test_a_picture_is_not_sent_again_if_the_client_has_it(client: TestClient) -> None:
    place = search(client, k=1)["hits"][0]["thumbnail_url"]
    first = client.get(place)
    assert "private" in first.headers["cache-control"]
    again = client.get(place, headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    other = client.get(place + "&boxes=1", headers={"If-None-Match": first.headers["etag"]})
    assert other.status_code == 200


def test_health_readiness_and_about(client: TestClient, backend: Any) -> None:
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/readyz").json()["checks"] == {"store": "ok", "model": "ok"}
    backend.ready = False
    answer = client.get("/readyz")
    assert answer.status_code == 503
    assert answer.json()["checks"]["store"] == "cannot be reached"
    assert int(answer.headers["retry-after"]) >= 1
    about = client.get("/v1/about").json()
    assert (about["keys_required"], about["writes"]) == (False, True)
    assert about["feedback"] is False
    assert about["cpu_path"] == cpu_path()


def test_metrics_count_requests_stages_and_problems(client: TestClient) -> None:
    search(client)
    client.get("/v1/galleries/none")
    text = client.get("/metrics").text
    assert 'requests_total{method="POST",route="/v1/search",status="200"} 1.0' in text
    assert 'stage_seconds_count{stage="search"} 1.0' in text
    assert 'problems_total{problem="gallery-not-found"} 1.0' in text
    assert "reir_serve_batch_queries_sum 1.0" in text
    assert "reir_serve_in_flight_requests 1.0" in text  # the request for the metrics itself
    assert "the red box" not in text


def test_metrics_have_the_times_of_all_parts_of_a_batch(client: TestClient) -> None:
    body = {"gallery": "photos", "expressions": ["the red box"] * (2 * SLICE_QUERIES + 1)}
    assert client.post("/v1/search/batch", json=body).status_code == 200
    text = client.get("/metrics").text
    assert 'stage_seconds_count{stage="search"} 3.0' in text
    assert "reir_serve_batch_queries_count 1.0" in text


def test_the_page_is_served_from_the_package(client: TestClient) -> None:
    page = client.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "'unsafe" not in page.headers["content-security-policy"]
    script = client.get("/page/page.js")
    assert script.headers["content-type"].startswith("text/javascript")
    again = client.get("/page/page.js", headers={"If-None-Match": script.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
