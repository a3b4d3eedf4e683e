"""Reading images over HTTP: allowed and refused addresses, changes, errors."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from reir.errors import ImageError, ImageFailure, SourceError
from reir.store import open_store
from reir.store.memory import MemoryStore
from reir_ingestion.pipeline import IndexOptions, index
from reir_ingestion.sources import (
    SourceFile,
    SourceOptions,
    network_retries,
    open_source,
    web_reader,
)
from reir_ingestion.sources.contract import UNKNOWN_TIME_NS
from reir_ingestion.sources.web_reader import WebReader, is_public
from reir_testing import FakeEncoder
from reir_testing.ingestion import write_scenes

ALLOWED = SourceOptions(allow_http=True, allow_private=True)


@dataclass
class Page:
    """What the server answers to one path."""

    body: bytes = b""
    code: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    failures: int = 0
    claims_bytes: int | None = None
    delay_s: float = 0.0
    byte_pause_s: float = 0.0


@dataclass
class Site:
    """A web server on this machine."""

    address: str
    pages: dict[str, Page] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    def put(self, path: str, body: bytes = b"", **options: object) -> str:
        self.pages[path] = Page(body, **options)  # type: ignore[arg-type]
        return self.address + path


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setattr(network_retries, "RETRY_PAUSES_S", (0.0, 0.0))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            served.asked.append(f"{self.command} {self.path}")
            page = served.pages.get(self.path, Page(code=404))
            if page.failures:
                page.failures -= 1
                page = Page(code=503)
            self.send_response(page.code)
            length = len(page.body) if page.claims_bytes is None else page.claims_bytes
            for name, value in {"Content-Length": str(length), **page.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                time.sleep(page.delay_s)
                if page.byte_pause_s:
                    with suppress(OSError):  # the reader may hang up
                        for byte in page.body:
                            self.wfile.write(bytes([byte]))
                            time.sleep(page.byte_pause_s)
                else:
                    self.wfile.write(page.body)

        do_HEAD = do_GET  # noqa: N815, the name is the base class's

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served = Site(f"http://127.0.0.1:{server.server_port}")
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
    yield served
    server.shutdown()
    server.server_close()


def failure(url: str, reader: WebReader, max_bytes: int = 1000) -> ImageError:
    with pytest.raises(ImageError) as caught:
        reader.read(url, max_bytes)
    return caught.value


READER = WebReader(allow_private=True)


def test_nothing_is_fetched_unless_allowed(site: Site, tmp_path: Path) -> None:
    url = site.put("/1.jpg", b"x")
    path = tmp_path / "list.txt"
    path.write_text(url)
    for options in (None, SourceOptions(allow_private=True)):
        with pytest.raises(SourceError, match="--allow-http permits that"):
            open_source(path, options)
        with pytest.raises(SourceError, match="--allow-http permits that"):
            open_source(site.address + "/list.txt", options)
    assert site.asked == []


def test_private_addresses_are_refused_unless_allowed(site: Site) -> None:
    url = site.put("/1.jpg", b"x")
    for address in (url, url.replace("127.0.0.1", "localhost"), url.replace("127.0.0.1", "0")):
        error = failure(address, WebReader())
        assert error.reason is ImageFailure.UNREADABLE
        assert "private address" in error.detail
        assert "--allow-private" in error.detail
    assert site.asked == []
    assert READER.read(url, 10) == b"x"


def test_a_redirect_to_a_private_address_is_refused(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = site.put("/secret.jpg", b"secret")
    url = site.put("/1.jpg", code=302, headers={"Location": secret.replace("127.0.0.1", "[::1]")})
    # the server of this test counts as public, every other address of this machine does not
    monkeypatch.setattr(web_reader, "is_public", lambda address: address == "127.0.0.1")
    error = failure(url, WebReader())
    assert (error.reason, "private address ::1" in error.detail) == (ImageFailure.UNREADABLE, True)
    site.put("/1.jpg", code=302, headers={"Location": "file:///etc/hostname"})
    assert failure(url, WebReader()).reason is ImageFailure.UNREADABLE
    site.put("/1.jpg", code=302, headers={"Location": "/secret.jpg"})
    assert WebReader().read(url, 10) == b"secret"


def test_the_connection_goes_to_the_address_that_was_checked(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter(["127.0.0.1", "10.0.0.1"])
    resolve = socket.getaddrinfo

    def once(host: str, port: int, *args: object, **named: object) -> object:
        if host == "rebound.example":
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (next(answers), port))]
        return resolve(host, port, *args, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", once)
    url = site.put("/1.jpg", b"x").replace("127.0.0.1", "rebound.example")
    assert READER.read(url, 10) == b"x"
    assert list(answers) == ["10.0.0.1"]


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1::1", True),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("127.0.0.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("::", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("::ffff:10.0.0.1", False),
        ("::ffff:93.184.216.34", True),
        ("64:ff9b::a00:1", False),
        ("2002:a00:1::", False),
    ],
)
def test_public_addresses(address: str, public: bool) -> None:
    assert is_public(address) is public


def test_the_reason_of_every_failure(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = {
        site.put("/gone.jpg", code=410): ImageFailure.MISSING,
        site.address + "/none.jpg": ImageFailure.MISSING,
        site.put("/forbidden.jpg", code=403): ImageFailure.UNREADABLE,
        site.put("/busy.jpg", failures=9): ImageFailure.UNREACHABLE,
        site.put("/cut.jpg", b"abc", claims_bytes=9): ImageFailure.UNREACHABLE,
        site.put("/large.jpg", bytes(1001)): ImageFailure.TOO_LARGE,
        site.put("/loop.jpg", code=302, headers={"Location": "/loop.jpg"}): ImageFailure.UNREADABLE,
        "http://127.0.0.1:9/away.jpg": ImageFailure.UNREACHABLE,
        "http://" + "x" * 300 + "/1.jpg": ImageFailure.UNREADABLE,
    }
    assert {url: failure(url, READER).reason for url in reasons} == reasons
    assert site.asked.count("GET /busy.jpg") == 3
    assert site.asked.count("GET /forbidden.jpg") == 1
    monkeypatch.setattr(web_reader, "CONNECT_TIMEOUT_S", 0.1)
    slow = site.put("/slow.jpg", b"x", delay_s=0.5)
    assert failure(slow, READER).reason is ImageFailure.UNREACHABLE
    flaky = site.put("/flaky.jpg", b"abc", failures=2)
    assert READER.read(flaky, 10) == b"abc"


def test_a_server_that_sends_byte_by_byte_is_given_up_at_the_deadline(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web_reader, "FETCH_TIMEOUT_S", 0.2)
    monkeypatch.setattr(network_retries, "RETRY_PAUSES_S", ())
    started_s = time.monotonic()
    error = failure(site.put("/drip.jpg", bytes(100), byte_pause_s=0.05), READER)
    assert time.monotonic() - started_s < 3
    assert (error.reason, "not complete after 0.2 s" in error.detail) == (
        ImageFailure.UNREACHABLE,
        True,
    )


@pytest.mark.parametrize(
    "headers",
    [
        {"Last-Modified": "Fri, 31 Dec 9999 23:59:59 GMT"},
        {"Content-Length": "9" * 25, "ETag": '"a"'},
        {"Content-Length": "9" * 5000, "ETag": '"a"'},
    ],
)
def test_sizes_and_times_beyond_64_bits_do_not_stop_a_run(
    site: Site, tmp_path: Path, headers: dict[str, str]
) -> None:
    (photo,) = write_scenes(tmp_path, 1)
    bad = site.put("/1.png", photo.read_bytes(), headers=headers)
    good = site.put("/2.png", photo.read_bytes())
    (tmp_path / "list.txt").write_text(f"{bad}\n{good}")
    source = open_source(tmp_path / "list.txt", ALLOWED)
    with closing(open_store(str(tmp_path / "store"))) as store:
        report = index(source, "g", store, FakeEncoder())
    assert (report.new + report.num_failed, report.num_listed) == (2, 2)


def test_an_etag_shows_changes_of_a_file_from_the_far_future(site: Site) -> None:
    seen = set()
    for etag in ('"a"', '"b"'):
        headers = {"Last-Modified": "Fri, 31 Dec 9999 23:59:59 GMT", "ETag": etag}
        (status,) = READER.statuses([site.put("/1.jpg", b"12", headers=headers)])
        assert status is not None
        seen.add(SourceFile("http://x/1.jpg", *status).mtime_ns)
    assert len(seen) == 2


def test_status_changes_with_the_headers(site: Site) -> None:
    modified = formatdate(1_700_000_000, usegmt=True)
    url = site.put("/1.jpg", b"12", headers={"Last-Modified": modified, "ETag": '"a"'})
    statuses = READER.statuses([url, site.put("/2.jpg", b"123"), site.address + "/none.jpg"])
    assert statuses[1:] == [(3, UNKNOWN_TIME_NS), None]
    first = statuses[0]
    assert first is not None
    assert (first.size_bytes, first.mtime_ns // 10**9) == (2, 1_700_000_000)
    assert READER.statuses([url]) == [first]
    seen = {first}
    for headers in (
        {"Last-Modified": modified, "ETag": '"b"'},
        {"Last-Modified": formatdate(1_700_000_001, usegmt=True), "ETag": '"a"'},
        {"Last-Modified": modified},
        {"ETag": '"a"'},
        {"Last-Modified": "yesterday", "ETag": '"c"'},
    ):
        site.put("/1.jpg", b"12", headers=headers)
        (status,) = READER.statuses([url])
        assert status is not None
        seen.add(status)
    assert len(seen) == 6
    site.put("/1.jpg", code=405)
    assert READER.statuses([url]) == [(0, UNKNOWN_TIME_NS)]


def test_the_life_of_a_gallery_on_the_web(site: Site, tmp_path: Path, store: MemoryStore) -> None:
    paths = write_scenes(tmp_path, 6)
    for number, path in enumerate(paths):
        site.put(f"/p/{path.name}", path.read_bytes(), headers={"ETag": f'"{number}"'})
    site.put("/p/plain.png", paths[0].read_bytes())
    names = [*(path.name for path in paths), "plain.png", "none.jpg"]

    assert run_list(site, store, names) == (7, 0, 0, 1, 0, 8)
    assert run_list(site, store, names) == (0, 0, 7, 1, 0, 2)  # of two no header tells anything
    site.put("/p/000.png", paths[2].read_bytes(), headers={"ETag": '"new"'})
    assert run_list(site, store, names[:-1]) == (0, 1, 6, 0, 1, 2)
    (record,) = [
        each
        for each in store.iter_images("g", store.live_version("g"))
        if each.uri.endswith("plain.png")
    ]
    assert record.uri == f"{site.address}/p/plain.png"


def run_list(site: Site, store: MemoryStore, names: list[str]) -> tuple[int, ...]:
    site.put("/p/list.txt?token=1", "\n".join(names).encode())
    source = open_source(site.address + "/p/list.txt?token=1", ALLOWED)
    done = index(source, "g", store, FakeEncoder(), options=IndexOptions(prune=True))
    return done.new, done.changed, done.unchanged, done.num_failed, done.removed, done.read


def test_addresses_have_a_canonical_form(site: Site, tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text(
        "HTTP://Example.ORG\nhttps://example.org/a b/\u5199.jpg?x=1&y=%20#part\nhttp://\n"
        "http://me:secret@example.org/1.jpg\n"
    )
    messages: list[str] = []
    source = open_source(path, ALLOWED)
    assert list(source.uris(lambda part, _: messages.append(part[-6:]))) == [
        "http://example.org/",
        "https://example.org/a%20b/%E5%86%99.jpg?x=1&y=%20",
    ]
    assert messages == ["line 3", "line 4"]
    with pytest.raises(ImageError) as caught:
        source.read(SourceFile("http://127.0.0.1:9/x.jpg", 0, 0))
    assert caught.value.reason is ImageFailure.UNREACHABLE
