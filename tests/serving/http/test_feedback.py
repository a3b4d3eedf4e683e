"""The search log of a server, and `POST /v1/feedback`."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from reir.operations.feedback import Feedback, database, read_feedback
from reir.operations.feedback.records import user_of
from reir.operations.search_log import read_events
from reir_serving.config import Limits
from reir_serving.http.routes.feedback import FeedbackAnswer
from reir_serving.middleware.keys import new_key

G = "photos"
SEARCH_BODY: dict[str, Any] = {"gallery": G, "expression": "the red box"}
LEFT_BOX = [0.0833, 0.25, 0.3333, 0.75]
BOX = [0.1, 0.2, 0.3, 0.4]
ZEBRA = {"gallery": G, "expression": "a zebra", "verdict": "absent"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "searches"


@pytest.fixture
def recorded(folder: Path) -> Callable[[], list[Feedback]]:
    return lambda: read_feedback(folder, G)


@pytest.fixture
def client(client_of: Any, folder: Path) -> Iterator[TestClient]:
    client: TestClient = client_of(search_log=folder)
    yield client
    log_of(client).close()


def log_of(client: Any) -> Any:
    return client.app.state.app_state.search_log


def search(client: TestClient, path: str = "/v1/search", **more: Any) -> dict[str, Any]:
    answer = client.post(path, json=SEARCH_BODY | more)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def send(client: TestClient, verdict: str, instance_id: str | None = None, **more: Any) -> Any:
    about = {} if instance_id is None else {"instance_id": instance_id}
    return client.post("/v1/feedback", json=SEARCH_BODY | {"verdict": verdict} | about | more)


def problem_of(answer: Any, status: int, kind: str) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = answer.json()
    assert problem["type"] == f"/problems/{kind}"
    return problem


def tokens_of(keys: Path) -> list[str]:
    """Return the keys that `keys_with` has made."""
    return keys.with_suffix(".txt").read_text().split()


def keys_with(keys: Path, number: int) -> Path:
    """Write a file with some keys for the gallery, and the keys themselves beside it."""
    made = [new_key(keys, read=(G,), write=()) for _ in range(number)]
    keys.with_suffix(".txt").write_text("\n".join(made))
    return keys


# ----------------------------------------------------------------------------------------- searches


def test_a_search_is_logged(client: TestClient, folder: Path) -> None:
    answer = search(client, k=2, where="area > 0.01")
    log_of(client).close()
    (event,) = read_events(folder, G)
    assert event["request_id"] == answer["request_id"]
    assert (event["event"], event["expression"]) == ("search", "the red box")
    assert (event["k"], event["where"], event["version"]) == (2, "area > 0.01", "v1")
    assert (event["found"], event["presence"]) == (True, None)
    names = ("instance_id", "image_id", "uri", "score", "presence")
    assert [[hit[name] for name in names] for hit in event["hits"]] == [
        [hit[name] for name in names] for hit in answer["hits"]
    ]
    assert event["hits"][0]["box"] == LEFT_BOX


def test_only_first_pages_of_plain_searches_are_logged(
    client: TestClient, folder: Path, pair: bytes
) -> None:
    page = search(client, k=1)
    search(client, k=1, cursor=page["cursor"])
    like = page["hits"][0]["instance_id"]
    search(client, also=[{"instance_id": like, "weight": -0.5}])
    search(client, "/v1/search/similar", instance_id=like)
    form = {"request": json.dumps(SEARCH_BODY)}
    files = {"image": ("p.png", pair, "image/png")}
    assert client.post("/v1/search/similar", files=files, data=form).status_code == 200
    batch = {"gallery": G, "expressions": ["the green box", "the blue box"]}
    assert client.post("/v1/search/batch", json=batch).status_code == 200
    assert client.post("/v1/search", json=SEARCH_BODY | {"k": 0}).status_code == 422
    log_of(client).close()
    expressions = [event["expression"] for event in read_events(folder, G)]
    assert expressions == ["the red box", "the green box", "the blue box"]


def test_without_the_setting_nothing_is_logged(
    client_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REIR_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    client = client_of()
    hit = search(client)["hits"][0]
    for verdict, instance_id in (("right", hit["instance_id"]), ("absent", None)):
        problem = problem_of(send(client, verdict, instance_id), 501, "feedback-disabled")
        assert "reir serve --search-log FOLDER" in problem["detail"]
    assert client.get("/v1/about").json()["feedback"] is False
    assert list(tmp_path.rglob("*.jsonl")) == []
    assert not (tmp_path / "home").exists()
    assert log_of(client) is None


def test_a_log_that_cannot_be_written_fails_no_request(
    client: TestClient, folder: Path, recorded: Any
) -> None:
    search(client)
    assert send(client, "absent").json() == {"recorded": True}
    shutil.rmtree(folder)
    assert search(client)["hits"]
    assert send(client, "absent").json() == {"recorded": False}
    log_of(client).close()
    text = client.get("/metrics").text
    assert "reir_serve_search_log_dropped_total 2.0" in text
    assert 'reir_serve_feedback_total{verdict="absent"} 1.0' in text
    folder.mkdir()
    assert send(client, "absent").json() == {"recorded": True}
    assert len(recorded()) == 1


def test_feedback_that_cannot_be_written_in_time_is_not_recorded(
    client: TestClient, folder: Path, recorded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never is anything confirmed that is not on disk; the same request succeeds later."""
    monkeypatch.setattr(database, "BUSY_TIMEOUT_S", 0.1)
    send(client, "absent")
    key = {"Idempotency-Key": "later"}
    with closing(sqlite3.connect(folder / G / database.NAME)) as other:
        other.execute("BEGIN EXCLUSIVE")
        answer = client.post("/v1/feedback", json=ZEBRA, headers=key)
        assert answer.json() == {"recorded": False}
        assert search(client)["hits"]
    assert client.post("/v1/feedback", json=ZEBRA, headers=key).json() == {"recorded": True}
    assert [each.expression for each in recorded()] == ["the red box", "a zebra"]


# ----------------------------------------------------------------------------------------- feedback


def test_verdicts_are_recorded(client: TestClient, recorded: Any) -> None:
    hit = search(client, k=1)["hits"][0]
    for verdict in ("right", "wrong"):
        answer = send(client, verdict, hit["instance_id"])
        assert answer.status_code == 200
        FeedbackAnswer.model_validate_json(answer.content)
        assert answer.json() == {"recorded": True}
    answer = send(client, "absent", expression="a giraffe")
    assert answer.json() == {"recorded": True}
    box = [0.1, 0.2, 0.30004, 0.4]
    answer = send(client, "box", image_id=hit["image_id"], box=box)
    assert answer.json() == {"recorded": True}
    right, wrong, absent, drawn = recorded()
    assert [each.verdict for each in recorded()] == ["right", "wrong", "absent", "box"]
    assert (right.expression, right.version) == ("the red box", "v1")
    assert (right.tenant, right.user) == ("", "")
    for name in ("instance_id", "image_id", "uri"):
        assert getattr(right, name) == getattr(wrong, name) == hit[name]
    assert list(right.box) == LEFT_BOX
    assert (absent.instance_id, absent.image_id, absent.box) == ("", "", None)
    assert (drawn.image_id, drawn.uri, drawn.instance_id) == (hit["image_id"], hit["uri"], "")
    assert drawn.box == (0.1, 0.2, 0.3, 0.4)
    assert drawn.request_id == answer.headers["x-request-id"]
    assert abs(datetime.now(UTC) - drawn.time) < timedelta(minutes=1)
    text = client.get("/metrics").text
    for verdict in ("right", "wrong", "absent", "box"):
        assert f'reir_serve_feedback_total{{verdict="{verdict}"}} 1.0' in text
    assert "reir_serve_search_log_dropped_total 0.0" in text
    assert client.get("/v1/about").json()["feedback"] is True


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"verdict": "right"}, "instance_id is missing; the verdict 'right' needs the hit"),
        ({"verdict": "wrong"}, "instance_id is missing; the verdict 'wrong' needs the hit"),
        ({"verdict": "absent", "instance_id": "x#1"}, "not allowed with the verdict 'absent'"),
        ({"verdict": "absent", "box": BOX}, "box is not allowed with the verdict 'absent'"),
        ({"verdict": "maybe"}, "should be 'right', 'wrong', 'absent' or 'box'"),
        ({"verdict": ["right"]}, "should be 'right', 'wrong', 'absent' or 'box'"),
        ({"verdict": "box"}, "image_id is missing; the verdict 'box' needs the photo and the box"),
        ({"verdict": "box", "image_id": "x"}, "box is missing; the verdict 'box'"),
        ({"verdict": "box", "box": BOX}, "image_id is missing"),
        ({"verdict": "right", "instance_id": "x#1", "box": BOX}, "box is not allowed with"),
        ({"verdict": "box", "image_id": "x", "box": BOX[:3]}, "at least 4 items"),
        ({"verdict": "box", "image_id": "x", "box": [*BOX, 1]}, "at most 4 items"),
        ({"verdict": "box", "image_id": "x", "box": [0, 0, 1.1, 1]}, "less than or equal to 1"),
        ({"verdict": "box", "image_id": "x", "box": [0.5, 0, 0.4, 1]}, "x1, y1, x2, y2 in [0, 1]"),
        ({"verdict": "box", "image_id": "x", "box": [0, 0.5, 1, 0.5]}, "at least 0.001 wide"),
        ({"expression": " "}, "is empty"),
        ({"expression": "\u200b"}, "is empty"),
        ({"expression": "x" * 513}, "at most 512"),
        ({"instance_id": 3}, "valid string"),
        ({"instance_id": "x" * 256}, "at most 255"),
        ({"gallery": ""}, "at least 1"),
        ({"surprise": 1}, "not permitted"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_wrong_feedback_is_explained(
    client: TestClient, recorded: Any, changes: dict[str, Any], problem: str
) -> None:
    body = SEARCH_BODY | {"verdict": "absent"} | changes
    answer = client.post("/v1/feedback", json=body)
    assert problem in problem_of(answer, 422, "invalid-request")["detail"]
    assert recorded() == []


@pytest.mark.parametrize(
    "instance_id",
    ["", "#", "#0", "0123456789abcdef0123#0", "../../etc/passwd#0", "a' or '1'=='1", "\u0000", "*"],
)
def test_unknown_instances_are_not_found(
    client: TestClient, recorded: Any, instance_id: str
) -> None:
    problem_of(send(client, "right", instance_id), 404, "image-not-found")
    assert recorded() == []


@pytest.mark.parametrize("number", ["7", "-1", "x", "", "00", "9" * 30])
def test_unknown_numbers_are_not_found(client: TestClient, recorded: Any, number: str) -> None:
    image_id = search(client)["hits"][0]["image_id"]
    problem = problem_of(send(client, "right", f"{image_id}#{number}"), 404, "image-not-found")
    assert f"has no instance '{image_id}#{number}'" in problem["detail"]
    assert recorded() == []


def test_galleries_that_the_key_cannot_read_do_not_exist(
    client_of: Any, folder: Path, tmp_path: Path
) -> None:
    keys = tmp_path / "keys.yaml"
    other = {"Authorization": f"Bearer {new_key(keys, read=('other',), write=())}"}
    reader = {"Authorization": f"Bearer {new_key(keys, read=(G,), write=())}"}
    client = client_of(search_log=folder, keys_file=keys)
    body = SEARCH_BODY | {"verdict": "absent"}
    assert client.post("/v1/feedback", json=body).status_code == 401
    answers = [
        client.post("/v1/feedback", json=body | {"gallery": name}, headers=other)
        for name in (G, "never", "../x")
    ]
    for answer in answers:
        problem_of(answer, 404, "gallery-not-found")
    assert client.post("/v1/feedback", json=body, headers=reader).json() == {"recorded": True}
    (said,) = read_feedback(folder, G)
    assert said.user == user_of(reader["Authorization"].split("_")[1])
    assert [path.name for path in folder.iterdir()] == [G]


def test_a_tenant_gives_feedback_only_on_its_own_photos(
    client_of: Any, folder: Path, tmp_path: Path, recorded: Any
) -> None:
    keys = tmp_path / "keys.yaml"
    everyone = {"Authorization": f"Bearer {new_key(keys, read=('*',), write=())}"}
    acme = {"Authorization": f"Bearer {new_key(keys, read=(G,), write=(), tenant='acme')}"}
    client = client_of(search_log=folder, keys_file=keys)

    def first_hit(expression: str, headers: dict[str, str], **more: Any) -> dict[str, Any]:
        body = SEARCH_BODY | {"expression": expression} | more
        hit: dict[str, Any] = client.post("/v1/search", json=body, headers=headers).json()["hits"][
            0
        ]
        return hit

    def say(instance_id: str, headers: dict[str, str]) -> Any:
        body = SEARCH_BODY | {"verdict": "right", "instance_id": instance_id}
        return client.post("/v1/feedback", json=body, headers=headers)

    red = first_hit("the red box", everyone)
    problem_of(say(red["instance_id"], acme), 404, "image-not-found")
    green = first_hit("the green box", acme, where="area > 0")
    assert green["uri"] == "green.png"
    assert say(green["instance_id"], acme).json() == {"recorded": True}
    body = SEARCH_BODY | {"verdict": "box", "box": BOX}
    drawn = body | {"image_id": red["image_id"]}
    problem_of(client.post("/v1/feedback", json=drawn, headers=acme), 404, "image-not-found")
    log_of(client).close()
    _, searched = read_events(folder, G)
    (said,) = recorded()
    # The operator's log has the place of the photo, and only the filter of the user.
    assert searched["hits"][0]["uri"] == said.uri
    assert said.uri.startswith("file:///")
    assert (searched["where"], searched["tenant"], said.tenant) == ("area > 0", "acme", "acme")


def test_the_document_describes_feedback(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    operation = document["paths"]["/v1/feedback"]["post"]
    for status in ("429", "501"):
        assert "application/problem+json" in operation["responses"][status]["content"]
    (header,) = operation["parameters"]
    assert (header["name"], header["in"], header["required"]) == (
        "idempotency-key",
        "header",
        False,
    )
    schema = document["components"]["schemas"]["FeedbackRequest"]
    assert schema["properties"]["verdict"]["enum"] == ["right", "wrong", "absent", "box"]
    assert len(schema["oneOf"]) == 4
    assert "recorded" in document["components"]["schemas"]["FeedbackAnswer"]["properties"]


# ------------------------------------------------------------------------------------- exactly once


def post(client: TestClient, body: dict[str, Any], key: str, **headers: str) -> Any:
    return client.post("/v1/feedback", json=body, headers={"Idempotency-Key": key} | headers)


def test_the_same_key_is_recorded_once(client: TestClient, recorded: Any) -> None:
    hit = search(client, k=1)["hits"][0]
    body = SEARCH_BODY | {"verdict": "right", "instance_id": hit["instance_id"]}
    answers = [post(client, body, "k1").json() for _ in range(3)]
    # A string of RFC 8941 has quotes, but not every client sends them.
    answers.append(post(client, body, '"k1"').json())
    assert answers == [{"recorded": True}] * 4
    assert len(recorded()) == 1
    assert 'reir_serve_feedback_total{verdict="right"} 1.0' in client.get("/metrics").text
    assert post(client, body, "k2").json() == {"recorded": True}
    assert len(recorded()) == 2
    assert client.post("/v1/feedback", json=body).json() == {"recorded": True}
    assert client.post("/v1/feedback", json=body).json() == {"recorded": True}
    assert len(recorded()) == 4, "without a key, each request is new"


def test_a_repeated_request_is_answered_even_if_its_photo_is_gone(
    client: TestClient, recorded: Any
) -> None:
    hit = search(client, k=1)["hits"][0]
    body = SEARCH_BODY | {"verdict": "right", "instance_id": hit["instance_id"]}
    post(client, body, "k1")
    client.delete(f"/v1/galleries/{G}/images/{hit['image_id']}")
    assert post(client, body, "k1").json() == {"recorded": True}
    problem_of(post(client, body, "k2"), 404, "image-not-found")
    assert len(recorded()) == 1


def test_a_key_with_other_feedback_is_refused(client: TestClient, recorded: Any) -> None:
    post(client, ZEBRA, "k1")
    for other in (ZEBRA | {"expression": "a Zebra"}, ZEBRA | {"verdict": "right"}):
        if other["verdict"] == "right":
            other["instance_id"] = search(client)["hits"][0]["instance_id"]
        problem = problem_of(post(client, other, "k1"), 422, "idempotency-key-reused")
        assert "'k1' was used for other feedback" in problem["detail"]
        assert problem["errors"][0]["field"] == "idempotency_key"
    assert len(recorded()) == 1


@pytest.mark.parametrize("key", ["", '""', "x" * 256, "caf\u00e9", "a\tb"])
def test_a_key_that_cannot_be_used_is_explained(
    client: TestClient, recorded: Any, key: str
) -> None:
    answer = client.post(
        "/v1/feedback", json=ZEBRA, headers=[(b"idempotency-key", key.encode("latin-1"))]
    )
    problem = problem_of(answer, 422, "invalid-request")
    assert problem["errors"][0]["field"].replace("-", "_") == "idempotency_key"
    assert recorded() == []


def test_keys_of_users_do_not_collide(
    client_of: Any, folder: Path, tmp_path: Path, recorded: Any
) -> None:
    keys = tmp_path / "keys.yaml"
    client = client_of(search_log=folder, keys_file=keys_with(keys, 2))
    for token in tokens_of(keys):
        said = ZEBRA | {"expression": f"animal {token[-3:]}"}
        assert post(client, said, "k1", Authorization=f"Bearer {token}").json()["recorded"]
    assert len({each.user for each in recorded()}) == 2


# -------------------------------------------------------------------------------------- rate limits


def test_feedback_is_limited_for_each_key(
    client_of: Any, folder: Path, tmp_path: Path, recorded: Any
) -> None:
    keys = tmp_path / "keys.yaml"
    limits = Limits(feedback_rate_per_s=0.001, feedback_burst=2)
    client = client_of(search_log=folder, keys_file=keys_with(keys, 2), limits=limits)
    for token in tokens_of(keys):
        headers = {"Authorization": f"Bearer {token}"}
        for _ in range(2):
            assert client.post("/v1/feedback", json=ZEBRA, headers=headers).status_code == 200
        answer = client.post("/v1/feedback", json=ZEBRA, headers=headers)
        problem_of(answer, 429, "rate-limited")
        assert 900 <= int(answer.headers["retry-after"]) <= 1000
        body = SEARCH_BODY | {"k": 1}
        assert client.post("/v1/search", json=body, headers=headers).status_code == 200
    assert len(recorded()) == 4


def test_without_keys_feedback_is_limited_for_each_address(client_of: Any, folder: Path) -> None:
    client = client_of(
        search_log=folder, limits=Limits(feedback_rate_per_s=0.001, feedback_burst=1)
    )
    assert client.post("/v1/feedback", json=ZEBRA).status_code == 200
    problem_of(client.post("/v1/feedback", json=ZEBRA), 429, "rate-limited")
    app = client.app
    other = TestClient(app, base_url=str(client.base_url), client=("127.0.0.2", 4000))
    assert other.post("/v1/feedback", json=ZEBRA).status_code == 200
