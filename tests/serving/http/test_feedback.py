"""The search log of a server, and `POST /v1/feedback`."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from reir.operations.search_log import read_events, remove_events
from reir.store.embedded.locks import exclusive
from reir_serving.http.routes import feedback
from reir_serving.http.routes.feedback import FeedbackAnswer
from reir_serving.middleware.keys import new_key

G = "photos"
SEARCH_BODY: dict[str, Any] = {"gallery": G, "expression": "the red box"}
LEFT_BOX = [0.0833, 0.25, 0.3333, 0.75]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "searches"


@pytest.fixture
def events(folder: Path) -> Callable[[], list[dict[str, Any]]]:
    """Return the events of the log; searches that came before a verdict are written before it."""

    def read() -> list[dict[str, Any]]:
        return list(read_events(folder, G))

    return read


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
    client: TestClient, folder: Path, events: Any
) -> None:
    search(client)
    assert send(client, "absent").json() == {"recorded": True}
    shutil.rmtree(folder)
    assert search(client)["hits"]
    assert send(client, "absent").json() == {"recorded": False}
    text = client.get("/metrics").text
    assert "reir_serve_search_log_dropped_total 2.0" in text
    assert 'reir_serve_feedback_total{verdict="absent"} 1.0' in text
    folder.mkdir()
    assert send(client, "absent").json() == {"recorded": True}
    assert len(events()) == 1


def test_feedback_waits_only_so_long_for_a_removal(
    client: TestClient, folder: Path, events: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feedback, "WRITE_TIMEOUT_S", 0.2)
    send(client, "absent")
    (path,) = (folder / G).iterdir()
    with exclusive(path):
        started_s = time.monotonic()
        assert send(client, "absent", expression="a zebra").json() == {"recorded": True}
        assert time.monotonic() - started_s < 5
        assert search(client)["hits"]
        assert len(events()) == 1
    log_of(client).close()
    assert [each["expression"] for each in events()] == ["the red box", "a zebra", "the red box"]
    assert remove_events(folder, G, lambda each: each["event"] == "search") == 1


# ----------------------------------------------------------------------------------------- feedback


def test_verdicts_are_recorded(client: TestClient, events: Any) -> None:
    hit = search(client, k=1)["hits"][0]
    for verdict in ("right", "wrong"):
        answer = send(client, verdict, hit["instance_id"])
        assert answer.status_code == 200
        FeedbackAnswer.model_validate_json(answer.content)
        assert answer.json() == {"recorded": True}
    answer = send(client, "absent", expression="a giraffe")
    assert answer.json() == {"recorded": True}
    _, right, wrong, absent = events()
    assert [each["verdict"] for each in (right, wrong, absent)] == ["right", "wrong", "absent"]
    assert (right["expression"], right["version"], right["tenant"]) == ("the red box", "v1", "")
    for name in ("instance_id", "image_id", "uri"):
        assert right[name] == hit[name]
    assert right["box"] == LEFT_BOX
    assert (absent["instance_id"], absent["box"]) == ("", None)
    assert absent["request_id"] == answer.headers["x-request-id"]
    text = client.get("/metrics").text
    for verdict in ("right", "wrong", "absent"):
        assert f'reir_serve_feedback_total{{verdict="{verdict}"}} 1.0' in text
    assert "reir_serve_search_log_dropped_total 0.0" in text
    assert client.get("/v1/about").json()["feedback"] is True


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"verdict": "right"}, "instance_id is missing; the verdict 'right' needs the hit"),
        ({"verdict": "wrong"}, "instance_id is missing; the verdict 'wrong' needs the hit"),
        ({"verdict": "absent", "instance_id": "x#1"}, "not allowed with the verdict 'absent'"),
        ({"verdict": "maybe"}, "should be 'right', 'wrong' or 'absent'"),
        ({"verdict": ["right"]}, "should be 'right', 'wrong' or 'absent'"),
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
    client: TestClient, events: Any, changes: dict[str, Any], problem: str
) -> None:
    body = SEARCH_BODY | {"verdict": "absent"} | changes
    answer = client.post("/v1/feedback", json=body)
    assert problem in problem_of(answer, 422, "invalid-request")["detail"]
    assert events() == []


@pytest.mark.parametrize(
    "instance_id",
    ["", "#", "#0", "0123456789abcdef0123#0", "../../etc/passwd#0", "a' or '1'=='1", "\u0000", "*"],
)
def test_unknown_instances_are_not_found(client: TestClient, events: Any, instance_id: str) -> None:
    problem_of(send(client, "right", instance_id), 404, "image-not-found")
    assert events() == []


@pytest.mark.parametrize("number", ["7", "-1", "x", "", "00", "9" * 30])
def test_unknown_numbers_are_not_found(client: TestClient, events: Any, number: str) -> None:
    image_id = search(client)["hits"][0]["image_id"]
    problem = problem_of(send(client, "right", f"{image_id}#{number}"), 404, "image-not-found")
    assert f"has no instance '{image_id}#{number}'" in problem["detail"]
    assert [each["event"] for each in events()] == ["search"]


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
    assert len(list(read_events(folder, G))) == 1
    assert [path.name for path in folder.iterdir()] == [G]


def test_a_tenant_gives_feedback_only_on_its_own_photos(
    client_of: Any, folder: Path, tmp_path: Path, events: Any
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
    _, searched, said = events()
    # The operator's log has the place of the photo, and only the filter of the user.
    assert searched["hits"][0]["uri"] == said["uri"]
    assert said["uri"].startswith("file:///")
    assert (searched["where"], searched["tenant"], said["tenant"]) == ("area > 0", "acme", "acme")


def test_the_document_describes_feedback(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    operation = document["paths"]["/v1/feedback"]["post"]
    assert "application/problem+json" in operation["responses"]["501"]["content"]
    schema = document["components"]["schemas"]["FeedbackRequest"]
    assert schema["properties"]["verdict"]["enum"] == ["right", "wrong", "absent"]
    assert len(schema["oneOf"]) == 2
    assert "recorded" in document["components"]["schemas"]["FeedbackAnswer"]["properties"]
