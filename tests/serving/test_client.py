"""`reir.Client` with a server in this process, and with a server that misbehaves."""

from __future__ import annotations

import http.client
import re
import shutil
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

import reir
from reir.cli import main
from reir.client.http_client import FIRST_PAUSE_S, Client
from reir.errors import (
    AccessDenied,
    ConfigError,
    GalleryNotFound,
    ImageError,
    ImageFailure,
    ImageNotFound,
    Overloaded,
    QueryError,
    SchemaMismatch,
    ServerError,
    ServerUnavailable,
    StoreUnavailable,
)
from reir.operations.feedback import read_feedback
from reir.query.request import Query, Term
from reir_serving.middleware.keys import new_key


@pytest.fixture
def client(serve: Any, backend: Any) -> Iterator[Client]:
    with Client(serve(backend), patience_s=0.0) as made:
        yield made


def test_the_client_finds_what_the_library_finds(client: Client, backend: Any) -> None:
    assert reir.Client is Client
    local = reir.open("photos", store=backend.store, encoder=backend.encoder)
    here, there = local.search("the red box", k=2), client.search("the red box", "photos", k=2)
    assert there.hits == here.hits
    assert (there.gallery, there.version, there.expression) == ("photos", "v1", "the red box")


def test_the_client_asks_for_verification(client: Client, backend: Any) -> None:
    backend.queries.clear()
    there = client.search("the red box", "photos", verify=True, explain=True)
    assert backend.queries[0].verify
    assert there[0].evidence is not None
    assert there[0].evidence.colors == ()  # this model has no color head


def test_the_client_zooms_as_the_library_does(client: Client, backend: Any) -> None:
    local = reir.open("photos", store=backend.store, encoder=backend.encoder)
    here = local.search("the red box", k=2, zoom=True)
    there = client.search("the red box", "photos", k=2, zoom=True)
    assert there[0].zoom is not None
    assert [hit.zoom for hit in there] == [hit.zoom for hit in here]
    backend.queries.clear()
    client.ask([Query(terms=(Term(expression="the red box"),), zoom=True)], "photos")
    assert backend.queries[0].zoom


def test_options_and_terms_reach_the_server(client: Client, backend: Any) -> None:
    like = client.search("the red box", "photos", k=1).hits[0].instance_id
    backend.queries.clear()
    also = [Term(expression="the blue box", weight=-0.5), Term(instance_id=like)]
    client.search("the red box", "photos", also=also, localize=True, explain=True, where="area > 0")
    (query,) = backend.queries
    assert query.terms[1:] == tuple(also)
    assert (query.localize, query.explain, query.where) == (True, True, "area > 0")
    with pytest.raises(QueryError, match="cannot hold a vector"):
        client.search(
            "x", "photos", also=[Term(vector=backend.encoder.encode_expressions(["x"])[0])]
        )


def test_ask_sends_whole_queries(client: Client, backend: Any) -> None:
    like = Term(instance_id=client.search("the red box", "photos", k=1).hits[0].instance_id)
    words, unlike = Term(expression="the red box"), Term(expression="a cat", weight=-0.5)
    backend.queries.clear()
    queries = [
        Query(terms=(like, words, unlike), k=3, where="area > 0", localize=True),
        Query(terms=(unlike, like), per_image=2, explain=True),
    ]
    assert len(client.ask(queries, "photos")) == 2
    first, second = backend.queries
    assert first == replace(queries[0], terms=(words, like, unlike))
    assert second == replace(queries[1], terms=(like, unlike))
    with pytest.raises(QueryError, match="must have weight 1"):
        client.ask([Query(terms=(unlike,))], "photos")


def test_a_server_reads_the_expression_that_the_library_reads(client: Client, backend: Any) -> None:
    like = Term(instance_id=client.search("the red box", "photos", k=1).hits[0].instance_id)
    weak, words = Term(expression="the blue box", weight=0.5), Term(expression="the red box")
    for terms in ((words, weak), (weak, like, words), (weak, words, replace(weak, weight=1.0))):
        query = Query(terms=terms)
        backend.queries.clear()
        (result,) = client.ask([query], "photos")
        (sent,) = backend.queries
        assert sent.expression == query.expression == result.expression
        assert sorted(sent.terms, key=repr) == sorted(terms, key=repr)
    with pytest.raises(QueryError, match="must have weight 1; put an expression") as caught:
        client.ask([Query(terms=(weak, words))], "photos")
    assert caught.value.field == "terms"


def test_batches_and_similar(client: Client, backend: Any, pair: bytes, tmp_path: Path) -> None:
    first, second = client.search_batch(["the red box", "the green box"], "photos", k=1)
    assert first.hits[0].image_id != second.hits[0].image_id
    client.similar(first.hits[0].instance_id, "photos", expression="but blue")
    assert backend.queries[-1].terms[0].instance_id == first.hits[0].instance_id
    (tmp_path / "a b.png").write_bytes(pair)
    for like in (pair, tmp_path / "a b.png"):
        client.similar(like, "photos", box=(0.5, 0.2, 1.0, 0.8), k=1)
        assert backend.queries[-1].terms[0].vector is not None


def test_photos_are_added_looked_up_and_deleted(client: Client, magenta_box: bytes) -> None:
    added = client.add_image(magenta_box, "photos", {"year": 2024})
    (hit,) = client.search("the magenta box", "photos", where="attr.year == 2024").hits
    assert hit.image_id == added.image_id
    found = client.image(added.image_id, "photos")
    assert found is not None
    record, rows = found
    assert (record.width_px, rows[0].instance_id) == (120, hit.instance_id)
    assert client.picture(added.image_id, "photos") == magenta_box
    small = client.picture(added.image_id, "photos", width=40, boxes=True)
    assert small is not None
    assert small.startswith(b"\xff\xd8")
    assert client.delete_image(added.image_id, "photos")
    assert not client.delete_image(added.image_id, "photos")
    assert client.image(added.image_id, "photos") is None
    assert client.picture(added.image_id, "photos") is None


def test_localization_and_galleries(client: Client, pair: bytes) -> None:
    found = client.localize(pair, "the blue box", k=1)
    assert found.boxes[0].box[0] == pytest.approx(70 / 120, abs=0.01)
    assert [each.name for each in client.galleries()] == ["other", "photos"]
    assert client.galleries()[1].versions[0].spec.dim == 16
    assert client.ready()


def test_feedback_is_recorded(serve: Any, backend: Any, tmp_path: Path) -> None:
    log = tmp_path / "searches"
    with Client(serve(backend, search_log=log), patience_s=0.0) as client:
        hit = client.search("the red box", "photos", k=1)[0]
        assert client.feedback("photos", "the red box", "right", hit.instance_id)
        assert client.feedback("photos", "the red box", "wrong", instance_id=hit.instance_id)
        assert client.feedback("photos", "a giraffe", "absent")
        with pytest.raises(QueryError, match="the verdict 'right' needs the hit"):
            client.feedback("photos", "the red box", "right")
        with pytest.raises(QueryError, match="not allowed with the verdict 'absent'"):
            client.feedback("photos", "the red box", "absent", hit.instance_id)
        with pytest.raises(ImageNotFound):
            client.feedback("photos", "the red box", "right", f"{hit.image_id}#99")
        with pytest.raises(GalleryNotFound):
            client.feedback("none", "the red box", "absent")
        assert client.feedback(
            "photos", "the red box", "box", image_id=hit.image_id, box=(0.1, 0.1, 0.5, 0.5)
        )
        with pytest.raises(QueryError, match="box is missing"):
            client.feedback("photos", "the red box", "box", image_id=hit.image_id)
        said = read_feedback(log, "photos")
        assert [(each.verdict, each.instance_id) for each in said] == [
            ("right", hit.instance_id),
            ("wrong", hit.instance_id),
            ("absent", ""),
            ("box", ""),
        ]
        assert said[-1].box == (0.1, 0.1, 0.5, 0.5)
        shutil.rmtree(log)
        assert not client.feedback("photos", "a giraffe", "absent")


def test_feedback_with_a_key_is_recorded_once(serve: Any, backend: Any, tmp_path: Path) -> None:
    log = tmp_path / "searches"
    with Client(serve(backend, search_log=log), patience_s=0.0) as client:
        for _ in range(2):
            assert client.feedback("photos", "a giraffe", "absent", idempotency_key="k1")
        with pytest.raises(QueryError, match="'k1' was used for other feedback"):
            client.feedback("photos", "a zebra", "absent", idempotency_key="k1")
        for key in ("caf\u00e9", "a\nb", "x" * 256):
            with pytest.raises(QueryError, match="printable ASCII"):
                client.feedback("photos", "a zebra", "absent", idempotency_key=key)
    assert len(read_feedback(log, "photos")) == 1


def test_the_command_sends_feedback_to_a_server(
    serve: Any, backend: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "searches"
    server = serve(backend, search_log=log)
    with Client(server) as client:
        hit = client.search("the red box", "photos", k=1)[0]
    about = ("--box", hit.image_id, "0.1", "0.2", "0.5", "0.6")
    for words in (("--right", hit.instance_id), ("--absent",), about):
        words = ("feedback", "photos", "the red box", *words, "--server", server, "--json")
        assert main.run(words) == 0
    said = read_feedback(log, "photos")
    assert [each.verdict for each in said] == ["right", "absent", "box"]
    assert said[-1].box == (0.1, 0.2, 0.5, 0.6)
    shutil.rmtree(log)
    capsys.readouterr()
    assert main.run(["feedback", "photos", "a giraffe", "--absent", "--server", server]) == 1
    assert "cannot write feedback at the moment" in " ".join(capsys.readouterr().err.split())


class LosesAnswers(BaseHTTPRequestHandler):
    """Receives requests; closes the connection without an answer to the first ones."""

    keys: ClassVar[list[str]] = []
    num_lost = 3

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.keys.append(self.headers["Idempotency-Key"] or "")
        if len(self.keys) > self.num_lost:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"recorded": true, "answers": []}')

    def log_message(self, *_: Any) -> None:
        pass


def test_lost_feedback_is_sent_again_with_the_same_key() -> None:
    LosesAnswers.keys.clear()
    with HTTPServer(("127.0.0.1", 0), LosesAnswers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        pauses: list[float] = []
        with Client(f"http://127.0.0.1:{server.server_port}", sleep=pauses.append) as client:
            assert client.feedback("photos", "a giraffe", "absent")
            assert len(pauses) == 3
            assert len(LosesAnswers.keys) == 4
            assert len(set(LosesAnswers.keys)) == 1
            assert client.feedback("photos", "a giraffe", "absent")
            assert len(set(LosesAnswers.keys)) == 2
            LosesAnswers.keys.clear()
            with pytest.raises(ServerUnavailable):
                client.search_batch(["a giraffe"], "photos")
            assert LosesAnswers.keys == [""], "other requests have no key and are not repeated"
        server.shutdown()


def test_feedback_needs_a_search_log(client: Client) -> None:
    with pytest.raises(ServerError, match=r"501: .*reir serve --search-log FOLDER"):
        client.feedback("photos", "a giraffe", "absent")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (StoreUnavailable("x", "y"), StoreUnavailable),
        (SchemaMismatch("differ"), SchemaMismatch),
        (Overloaded("the queue"), ServerUnavailable),
        (RuntimeError("bug"), ServerError),
        (QueryError("k", "is odd"), QueryError),
    ],
    ids=lambda each: each.__name__ if isinstance(each, type) else "",
)
def test_problems_become_the_errors_of_the_library(
    client: Client, backend: Any, error: Exception, expected: type[Exception]
) -> None:
    backend.error = error
    with pytest.raises(expected):
        client.search("the red box", "photos")


def test_invalid_requests_raise_the_errors_of_the_library(client: Client) -> None:
    with pytest.raises(GalleryNotFound):
        client.search("the red box", "none")
    with pytest.raises(QueryError) as wrong:
        client.search("the red box", "photos", k=5000)
    assert wrong.value.field == "k"
    with pytest.raises(ImageError) as no_photo:
        client.localize(b"<svg/>", "the red box")
    assert no_photo.value.reason == ImageFailure.NOT_AN_IMAGE


def test_a_key_is_sent(
    serve: Any, backend: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = tmp_path / "keys.yaml"
    key = new_key(keys, read=("photos",), write=())
    address = serve(backend, keys_file=keys)
    with Client(address) as anonymous, pytest.raises(AccessDenied, match="REIR_API_KEY"):
        anonymous.galleries()
    with Client(address, key=key) as known:
        assert [each.name for each in known.galleries()] == ["photos"]
        with pytest.raises(AccessDenied):
            known.add_image(b"x", "photos")
    monkeypatch.setenv("REIR_API_KEY", key)
    with Client(address) as from_environment:
        assert from_environment.search("the red box", "photos").hits


class BusyServer(BaseHTTPRequestHandler):
    """Answers 503 with `Retry-After`, then 429 without it, then 200.

    Closes the connection after each answer without announcing it.
    """

    protocol_version = "HTTP/1.1"
    num_requests = 0

    def do_GET(self) -> None:
        type(self).num_requests += 1
        body = b'{"galleries": []}'
        status = {1: 503, 2: 429}.get(type(self).num_requests, 200)
        self.send_response(status)
        if status == 503:
            self.send_header("Retry-After", "3")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Log nothing."""


@pytest.fixture
def busy_server() -> Iterator[str]:
    BusyServer.num_requests = 0
    with HTTPServer(("127.0.0.1", 0), BusyServer) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_the_client_retries_when_a_busy_server_said_to(busy_server: str) -> None:
    waited: list[float] = []
    with Client(busy_server, patience_s=10.0, sleep=waited.append) as client:
        assert client.galleries() == []
        assert waited == [3.0, 2 * FIRST_PAUSE_S]
        assert client.galleries() == []  # the server has closed the connection


def test_the_client_stops_retrying_after_patience_s(busy_server: str) -> None:
    with (
        Client(busy_server, patience_s=2.0, sleep=lambda _: None) as client,
        pytest.raises(ServerError, match="503"),
    ):
        client.galleries()
    assert BusyServer.num_requests == 1


def test_a_server_that_does_not_run() -> None:
    with socket.create_server(("127.0.0.1", 0)) as bound:
        port = bound.getsockname()[1]
    client = Client(f"http://127.0.0.1:{port}")
    assert not client.ready()
    with pytest.raises(ServerUnavailable, match="reir serve"):
        client.galleries()


@pytest.mark.parametrize(
    "address", ["ftp://x", "http://", "http://host:99999", "http://h:80a", "http://[::1"]
)
def test_an_address_that_is_not_valid(address: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"{address!r} is not valid; expected http://")):
        Client(address)


@pytest.mark.parametrize(
    ("address", "place"),
    [("http://[::1]", ("::1", 80)), ("http://[::1]:8000", ("::1", 8000))],
)
def test_an_ipv6_address(
    address: str, place: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[tuple[str, int]] = []

    def refuse(place: tuple[str, int], *_: object) -> None:
        opened.append(place)
        raise ConnectionRefusedError

    # Test machines need not have IPv6.
    monkeypatch.setattr(socket, "create_connection", refuse)
    with pytest.raises(ServerUnavailable):
        Client(address, patience_s=0.0).galleries()
    assert opened == [place]


def test_a_request_after_an_interrupted_one_is_answered(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(http.client.HTTPConnection, "getresponse", interrupt)
        with pytest.raises(KeyboardInterrupt):
            client.galleries()
    assert "photos" in [each.name for each in client.galleries()]
