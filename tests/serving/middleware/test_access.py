"""API keys, tenants, rate limits, limits of size and time, security headers, and logs."""

from __future__ import annotations

import asyncio
import json
import logging
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from reir.errors import ConfigError, FilterError
from reir.store.filters import MAX_DEPTH, MAX_LENGTH
from reir.store.names import MAX_NAME_LENGTH
from reir_serving.backend.service import Readiness
from reir_serving.config import Limits
from reir_serving.http.routes.galleries import GalleryOut
from reir_serving.middleware import keys as keys_module
from reir_serving.middleware.access import Caller, check_bind
from reir_serving.middleware.auth import AuthMiddleware
from reir_serving.middleware.keys import TRUSTED_S, KeyRing, KeysUnusable, new_key, revoke_key
from reir_serving.middleware.rate_limits import RateLimit
from reir_serving.middleware.request_state import SCOPE_KEY, RequestState

SEARCH_BODY = {"gallery": "photos", "expression": "the red box"}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    return tmp_path / "keys.yaml"


def test_the_api_requires_a_key(client_of: Any, key_file: Path) -> None:
    key = new_key(key_file, read=("photos",), write=())
    client = client_of(keys_file=key_file)
    for wrong in ({}, bearer("nonsense"), bearer(key[:-1] + "x"), bearer(key.upper())):
        answer = client.post("/v1/search", json=SEARCH_BODY, headers=wrong)
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.json()["type"] == "/problems/no-key"
    assert client.post("/v1/search", json=SEARCH_BODY, headers=bearer(key)).status_code == 200
    assert (
        client.post("/v1/search", json=SEARCH_BODY, headers={"X-API-Key": key}).status_code == 200
    )
    for place in ("/healthz", "/readyz", "/metrics", "/v1/about", "/openapi.json"):
        assert client.get(place).status_code == 200
    assert client.get("/v1/about").json()["writes"] is False


def test_readiness_reveals_no_names_on_a_server_with_keys(
    client_of: Any, backend: Any, key_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new_key(key_file, read=("photos",), write=())

    async def readiness() -> Readiness:
        checks = {"store": "ok", "gallery a": "ok", "gallery b": "store at 10.1.2.3 is away"}
        return Readiness(ready=False, checks=checks)

    monkeypatch.setattr(backend, "readiness", readiness)
    assert client_of().get("/readyz").json()["checks"]["gallery b"].endswith("away")
    problem = client_of(keys_file=key_file).get("/readyz").json()
    assert problem["checks"] == {"store": "ok", "gallery": "failing", "keys": "ok"}
    assert "10.1.2.3" not in str(problem)


def test_a_key_can_use_only_its_own_galleries(client_of: Any, key_file: Path, pair: bytes) -> None:
    reader = new_key(key_file, read=("photos",), write=())
    writer = new_key(key_file, read=(), write=("other",))
    client = client_of(keys_file=key_file)
    listed = client.get("/v1/galleries", headers=bearer(reader)).json()["galleries"]
    assert [each["name"] for each in listed] == ["photos"]
    for place in (
        "/v1/galleries/other",
        "/v1/galleries/other/images/x",
        "/v1/images/x?gallery=other",
    ):
        hidden, missing = (
            client.get(place.replace("other", name), headers=bearer(reader))
            for name in ("other", "never")
        )
        assert (hidden.status_code, missing.status_code) == (404, 404)
        assert hidden.json()["detail"] == missing.json()["detail"].replace("never", "other")
    files = {"image": ("p.png", pair, "image/png")}
    add = "/v1/galleries/{}/images"
    assert client.post(add.format("photos"), files=files, headers=bearer(reader)).status_code == 403
    assert client.post(add.format("other"), files=files, headers=bearer(reader)).status_code == 404
    assert client.post(add.format("other"), files=files, headers=bearer(writer)).status_code == 201


def test_a_tenant_can_use_only_its_own_photos(
    client_of: Any, key_file: Path, pair: bytes, magenta_box: bytes
) -> None:
    everyone = bearer(new_key(key_file, read=("*",), write=("*",)))
    acme = bearer(new_key(key_file, read=(), write=("photos",), tenant="acme"))
    client = client_of(keys_file=key_file)
    red = client.post("/v1/search", json=SEARCH_BODY | {"k": 1}, headers=everyone).json()["hits"][0]
    own = client.post("/v1/search", json=SEARCH_BODY, headers=acme).json()["hits"]
    assert {hit["attributes"]["tenant"] for hit in own} == {"acme"}

    for where in ("area > 0", "area > 0 or area < 1", 'attr.tenant == "other" or area > 0'):
        hits = client.post("/v1/search", json=SEARCH_BODY | {"where": where}, headers=acme).json()[
            "hits"
        ]
        assert {hit["attributes"]["tenant"] for hit in hits} == {"acme"}
    out = client.post(
        "/v1/search", json=SEARCH_BODY | {"where": "area > 0) or (area > 0"}, headers=acme
    )
    assert out.status_code == 422

    assert client.get(red["image_url"], headers=acme).status_code == 404
    row = f"/v1/galleries/photos/images/{red['image_id']}"
    assert client.get(row, headers=acme).status_code == 404
    assert client.delete(row, headers=acme).status_code == 404
    like = {"gallery": "photos", "instance_id": red["instance_id"]}
    assert client.post("/v1/search/similar", json=like, headers=acme).status_code == 404

    files = {"image": ("m.png", magenta_box, "image/png")}
    place = "/v1/galleries/photos/images"
    claimed = {"attributes": '{"tenant": "other"}'}
    assert client.post(place, files=files, data=claimed, headers=acme).status_code == 422
    added = client.post(place, files=files, headers=acme).json()
    kept = client.get(f"{place}/{added['image_id']}", headers=acme).json()
    listed = client.get(place, headers=acme).json()["images"]
    assert {each["image_id"] for each in listed} == {added["image_id"]} | {
        hit["image_id"] for hit in own
    }
    assert all("/" not in each["uri"] for each in listed)
    assert kept["attributes"]["tenant"] == "acme"


def test_a_tenant_gets_neither_paths_nor_counts(
    client_of: Any, key_file: Path, backend: Any, magenta_box: bytes
) -> None:
    acme = bearer(new_key(key_file, read=(), write=("photos",), tenant="acme"))
    everyone = bearer(new_key(key_file, read=("*",), write=()))
    client = client_of(keys_file=key_file)
    files = {"image": ("m.png", magenta_box, "image/png")}
    added = client.post("/v1/galleries/photos/images", files=files, headers=acme)
    row = added.headers["location"]
    found = client.post("/v1/search", json=SEARCH_BODY | {"group_by": "image"}, headers=acme)
    about = [
        client.get(place, headers=acme) for place in ("/v1/galleries", "/v1/galleries/photos", row)
    ]
    hits = found.json()["hits"]
    assert {hit["uri"] for hit in hits} == {"green.png", "m.png"}
    for answer in (added, found, *about):
        assert "file:" not in answer.text
        assert str(backend._photos.uploads.parent) not in answer.text
    (version,) = about[1].json()["versions"]
    counts = ("num_images", "num_failed", "num_instances")
    assert [version[name] for name in counts] == [None] * 3
    GalleryOut.model_validate_json(about[1].content)
    own = client.get(row, headers=everyone).json()["uri"]
    for where in (f'uri == "{own}"', 'not (uri startswith "file:///srv")'):
        body = SEARCH_BODY | {"where": where}
        assert client.post("/v1/search", json=body, headers=everyone).status_code == 200
        refused = client.post("/v1/search", json=body, headers=acme)
        assert (refused.status_code, refused.json()["errors"][0]["field"]) == (422, "filter")


def test_a_filter_cannot_escape_from_the_condition_on_the_tenant() -> None:
    caller = Caller(key_id="a", tenant="acme", read=("*",))
    assert caller.restrict_filter(None) == 'attr.tenant == "acme"'
    with pytest.raises(FilterError):
        caller.restrict_filter("area > 0) or (area > 0")


@pytest.mark.parametrize(
    ("where", "allowed"),
    [
        ("(" * (MAX_DEPTH - 1) + "area > 0" + ")" * (MAX_DEPTH - 1), True),
        ("not " * (MAX_DEPTH - 2) + "(area > 0 or area > 1)", True),
        ("area > 0".ljust(MAX_LENGTH), True),
        ("(" * MAX_DEPTH + "area > 0" + ")" * MAX_DEPTH, False),
        ("area > 0".ljust(MAX_LENGTH + 1), False),
    ],
)
@pytest.mark.parametrize("path", ["/v1/search", "/v1/search/all"])
@pytest.mark.usefixtures("calibrated")
def test_the_limits_of_a_filter_are_those_of_what_the_user_wrote(
    client_of: Any, key_file: Path, where: str, allowed: bool, path: str
) -> None:
    tenant = "t" * MAX_NAME_LENGTH
    keys = [new_key(key_file, read=("photos",), write=(), tenant=each) for each in (tenant, "")]
    client = client_of(keys_file=key_file)
    for key in keys:
        answer = client.post(path, json=SEARCH_BODY | {"where": where}, headers=bearer(key))
        assert answer.status_code == (200 if allowed else 422)


def test_the_keys_file_contains_no_key_and_only_its_owner_can_read_it(key_file: Path) -> None:
    key = new_key(key_file, read=("*",), write=())
    text = key_file.read_text()
    assert key not in text
    assert key.rpartition("_")[2] not in text
    assert key_file.stat().st_mode & 0o077 == 0


def test_a_running_server_rejects_a_revoked_key(
    client_of: Any, key_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys_module, "CHECK_EVERY_S", 0.0)
    key = new_key(key_file, read=("*",), write=())
    client = client_of(keys_file=key_file)
    assert client.get("/v1/galleries", headers=bearer(key)).status_code == 200
    second = new_key(key_file, read=("*",), write=())
    assert client.get("/v1/galleries", headers=bearer(second)).status_code == 200
    revoke_key(key_file, key.split("_")[1])
    assert client.get("/v1/galleries", headers=bearer(key)).status_code == 401
    with pytest.raises(ConfigError, match="has no key"):
        revoke_key(key_file, key.split("_")[1])


def test_commands_that_run_at_the_same_time_undo_nothing(key_file: Path) -> None:
    revoked = [new_key(key_file, read=("*",), write=()) for _ in range(5)]
    with ThreadPoolExecutor(8) as pool:
        made = [pool.submit(new_key, key_file, read=("*",), write=()) for _ in range(20)]
        gone = [pool.submit(revoke_key, key_file, key.split("_")[1]) for key in revoked]
    for each in gone:
        each.result()
    ring = KeyRing(key_file)
    assert all(ring.caller(each.result()) is not None for each in made)
    assert not any(ring.caller(key) for key in revoked)
    assert sorted(path.name for path in key_file.parent.iterdir()) == [
        ".keys.yaml.lock",
        "keys.yaml",
    ]


@pytest.mark.parametrize("broken", ["keys: [{id: 1}]", "keys: [", "\0", "at: 2026-02-30", None])
def test_keys_expire_after_their_file_becomes_unusable(
    key_file: Path, caplog: pytest.LogCaptureFixture, broken: str | None
) -> None:
    now_s = 0.0
    key = new_key(key_file, read=("*",), write=())
    whole = key_file.read_text()
    ring = KeyRing(key_file, lambda: now_s)
    if broken is None:
        key_file.unlink()
    else:
        key_file.write_text(broken)
    now_s = 2.0
    assert ring.caller(key) is not None
    assert ring.problem()
    assert "the previous keys stay valid for 60 s" in caplog.text
    now_s += TRUSTED_S - 0.1
    assert ring.caller(key) is not None
    assert not ring.is_expired
    now_s += 2.0
    for _ in range(2):
        with pytest.raises(KeysUnusable):
            ring.caller(key)
        now_s += 2.0
    assert caplog.text.count("no key is accepted until") == 1
    with pytest.raises(ConfigError):
        KeyRing(key_file)
    key_file.write_text(whole)
    now_s += 2.0
    assert ring.caller(key) is not None
    assert (ring.problem(), ring.is_expired) == ("", False)


def test_requests_get_503_once_an_unusable_keys_file_has_expired(
    client_of: Any, key_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys_module, "CHECK_EVERY_S", 0.0)
    monkeypatch.setattr(keys_module, "TRUSTED_S", 0.0)
    key = new_key(key_file, read=("*",), write=())
    client = client_of(keys_file=key_file)
    assert client.get("/readyz").json()["checks"]["keys"] == "ok"
    whole = key_file.read_text()
    key_file.write_text("keys: [")
    answer = client.get("/v1/galleries", headers=bearer(key))
    assert answer.status_code == 503
    assert answer.json()["type"] == "/problems/keys-unusable"
    assert answer.headers["content-type"] == "application/problem+json"
    assert int(answer.headers["retry-after"]) >= 1
    assert "keys.yaml" not in answer.text
    ready = client.get("/readyz")
    assert (ready.status_code, ready.json()["checks"]["keys"]) == (503, "failing")
    assert client.get("/v1/about", headers=bearer(key)).json()["writes"] is False
    key_file.write_text(whole)
    assert client.get("/v1/galleries", headers=bearer(key)).status_code == 200
    assert client.get("/readyz").status_code == 200


def test_names_of_galleries_and_tenants_are_checked(key_file: Path) -> None:
    for wrong in ({"read": ("a b",)}, {"read": ("x",), "tenant": 'a" or true'}):
        with pytest.raises(ConfigError, match="is not allowed"):
            new_key(key_file, **{"write": (), **wrong})  # type: ignore[arg-type]
    assert not key_file.exists()


def test_each_key_has_its_own_rate_limit(client_of: Any, key_file: Path) -> None:
    first, second = (new_key(key_file, read=("*",), write=()) for _ in range(2))
    client = client_of(keys_file=key_file, limits=Limits(rate_per_s=0.1, burst=2))
    codes = [client.get("/v1/galleries", headers=bearer(first)).status_code for _ in range(3)]
    assert codes == [200, 200, 429]
    answer = client.get("/v1/galleries", headers=bearer(first))
    assert 1 <= int(answer.headers["retry-after"]) <= 10
    assert answer.json()["type"] == "/problems/rate-limited"
    assert client.get("/v1/galleries", headers=bearer(second)).status_code == 200


def test_a_bucket_refills_over_time() -> None:
    limit = RateLimit(2.0, burst=1)
    assert limit.take("a", None, 10.0) == 0.0
    assert limit.take("a", None, 10.0) == pytest.approx(0.5)
    assert limit.take("a", None, 10.5) == 0.0
    assert limit.take("b", 0.1, 10.0) == 0.0
    assert limit.take("b", 0.1, 11.0) == pytest.approx(9.0)
    assert RateLimit(None, 1).take("a", None, 0.0) == 0.0


@pytest.mark.parametrize("host", ["127.0.0.1", "127.3.2.1", "::1", "localhost"])
def test_loopback_needs_no_keys(host: str) -> None:
    check_bind(host, None)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org", ""])
def test_any_other_address_needs_keys(host: str) -> None:
    with pytest.raises(ConfigError, match="reir keys new"):
        check_bind(host, None)
    check_bind(host, Path("keys.yaml"))


def test_a_server_without_keys_rejects_foreign_web_pages(client: TestClient, pair: bytes) -> None:
    place = "/v1/galleries/photos/images"
    files = {"image": ("p.png", pair, "image/png")}
    for origin in ("https://evil.example", "null", "http://127.0.0.1:9"):
        answer = client.post(place, files=files, headers={"Origin": origin})
        assert answer.status_code == 403
    for host in ("evil.example", "127.0.0.1.evil.example", "[", ""):
        assert client.get("/v1/galleries", headers={"Host": host}).status_code == 403
    own = {"Origin": "http://127.0.0.1:8000"}
    assert client.post(place, files=files, headers=own).status_code == 201


def test_a_body_over_the_limit_is_rejected(client_of: Any) -> None:
    client = client_of(limits=Limits(body_bytes=2048, upload_bytes=4096))
    headers = {"Content-Type": "application/json", "Content-Length": str(10**12)}
    answer = client.post("/v1/search", content=b"{}", headers=headers)
    assert answer.status_code == 413
    assert answer.json()["type"] == "/problems/too-large"

    def chunks() -> Any:
        for _ in range(100):
            yield b" " * 100

    headers = {"Content-Type": "application/json"}
    assert client.post("/v1/search", content=chunks(), headers=headers).status_code == 413
    files = {"image": ("p.png", b"x" * 5000, "image/png")}
    data = {"expression": "x"}
    assert client.post("/v1/localize", files=files, data=data).status_code == 413
    files = {"image": ("p.png", b"x" * 3000, "image/png")}
    assert client.post("/v1/localize", files=files, data=data).status_code == 415


def test_the_number_of_uploads_in_progress_is_limited(
    client_of: Any, backend: Any, monkeypatch: pytest.MonkeyPatch, pair: bytes
) -> None:
    client = client_of(limits=Limits(max_ongoing_requests=1))
    files = {"image": ("p.png", pair, "image/png")}
    data = {"expression": "the red box"}
    plain, inner = backend.localize, []

    async def localize(*args: Any, **options: Any) -> Any:
        second = TestClient(client.app, base_url=str(client.base_url))
        ask = partial(second.post, "/v1/localize", files=files, data=data)
        inner.append(await asyncio.to_thread(ask))
        return await plain(*args, **options)

    monkeypatch.setattr(backend, "localize", localize)
    assert client.post("/v1/localize", files=files, data=data).status_code == 200
    assert inner[0].status_code == 503
    assert inner[0].headers["retry-after"] == "1"


def test_a_slow_request_times_out(
    client_of: Any, backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(*_: object) -> None:
        await asyncio.sleep(60)

    monkeypatch.setattr(backend, "search", never)
    answer = client_of(limits=Limits(request_timeout_s=0.05)).post("/v1/search", json=SEARCH_BODY)
    assert answer.status_code == 503
    assert answer.json()["type"] == "/problems/timed-out"
    assert answer.headers["retry-after"] == "1"


@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_a_slow_request_without_a_body_times_out(
    client_of: Any, backend: Any, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    async def never(*_: object) -> None:
        await asyncio.sleep(60)

    monkeypatch.setattr(backend, "image", never)
    monkeypatch.setattr(backend, "delete_image", never)
    client = client_of(limits=Limits(request_timeout_s=0.05))
    answer = client.request(method, "/v1/galleries/photos/images/0123456789abcdef0123")
    assert answer.status_code == 503
    assert answer.json()["type"] == "/problems/timed-out"
    assert answer.headers["retry-after"] == "1"


@pytest.mark.parametrize(
    ("header", "status"),
    [
        ((b"content-length", b"20"), 408),
        ((b"transfer-encoding", b"chunked"), 408),
        ((b"content-length", b"0"), 503),
    ],
)
def test_only_a_request_with_a_body_can_be_too_slow(
    header: tuple[bytes, bytes], status: int
) -> None:
    """The request arrives without its body, and the application waits for it."""

    async def forever(*_: object) -> Any:
        await asyncio.sleep(60)

    async def application(_scope: object, receive: Any, _send: object) -> None:
        await receive()

    async def send(message: Any) -> None:
        sent.append(message)

    sent = list[dict[str, Any]]()
    scope = {
        "type": "http",
        "method": "DELETE",
        "path": "/v1/x",
        "headers": [header, (b"host", b"localhost")],
        SCOPE_KEY: RequestState(request_id="1"),
    }
    middleware = AuthMiddleware(application, None, Limits(request_timeout_s=0.05))
    asyncio.run(middleware(scope, forever, send))
    assert sent[0]["status"] == status


def test_a_safe_request_id_of_the_client_is_kept(client: TestClient) -> None:
    sent = client.get("/healthz", headers={"X-Request-Id": "trace-0123456789"})
    assert sent.headers["x-request-id"] == "trace-0123456789"
    for odd in ("short", "x" * 200, "a b c d e f g h", "<script>alert(1)</script>"):
        assert client.get("/healthz", headers={"X-Request-Id": odd}).headers["x-request-id"] != odd


def test_every_answer_has_the_security_headers(client: TestClient) -> None:
    for place in ("/healthz", "/nowhere", "/v1/galleries"):
        headers = client.get(place).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["x-content-type-options"] == "nosniff"
        assert "server" not in headers


def test_logs_contain_route_templates_but_no_expressions(
    client_of: Any, key_file: Path, pair: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    key = new_key(key_file, read=(), write=("*",))
    client = client_of(keys_file=key_file)
    with caplog.at_level(logging.INFO, logger="reir_serving"):
        client.post("/v1/search", json=SEARCH_BODY, headers=bearer(key))
        client.get("/v1/images/x?gallery=photos", headers=bearer(key))
        files = {"image": ("p.png", pair, "image/png")}
        added = client.post("/v1/galleries/photos/images", files=files, headers=bearer(key))
        client.delete(added.headers["location"], headers=bearer(key))
    own = [each for each in caplog.records if each.name.startswith("reir_serving.a")]
    lines = [json.loads(each.getMessage()) for each in own]
    access = [line for line in lines if line["log"] == "access"]
    audit = [line for line in lines if line["log"] == "audit"]
    assert [line["route"] for line in access[:2]] == ["/v1/search", "/v1/images/{image_id}"]
    assert (access[1]["status"], access[1]["problem"]) == (404, "image-not-found")
    assert {line["key"] for line in lines} == {key.split("_")[1]}
    assert [line["action"] for line in audit] == ["add", "delete"]
    assert audit[0]["request_id"] == added.headers["x-request-id"]
    assert "red box" not in caplog.text
    assert key not in caplog.text
