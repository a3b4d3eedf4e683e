"""Listing and reading buckets, on a local S3 server."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError
from pyarrow.fs import FileSystem

from reir.errors import ImageError, ImageFailure, SourceError
from reir.object_storage import open_filesystem
from reir.store.memory import MemoryStore
from reir_ingestion.pipeline import IndexOptions, index
from reir_ingestion.sources import (
    Source,
    SourceFile,
    bucket_reader,
    network_retries,
    open_source,
    s3_pages,
)
from reir_ingestion.sources.s3_pages import Page, S3Pages
from reir_testing import FakeEncoder
from reir_testing.s3 import Bucket


def keys(source: Source) -> list[str]:
    return [uri.split("/", 4)[4] for uri in source.uris()]


TREE = ("1.jpg", "2.PNG", "a/3.jpg", "a/b/4.jpg", "ab/5.jpg", "notes.txt", ".h.jpg", "a/.t/6.jpg")


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("", ["1.jpg", "2.PNG", "a/3.jpg", "a/b/4.jpg", "ab/5.jpg"]),
        ("a", ["a/3.jpg", "a/b/4.jpg"]),
        ("a/", ["a/3.jpg", "a/b/4.jpg"]),
        ("**/*.jpg", ["1.jpg", "a/3.jpg", "a/b/4.jpg", "ab/5.jpg"]),
        ("a*/*.jpg", ["a/3.jpg", "ab/5.jpg"]),
        ("a/b/4.jpg", ["a/b/4.jpg"]),
    ],
)
def test_prefixes_globs_and_objects(bucket: Bucket, pattern: str, expected: list[str]) -> None:
    for key in TREE:
        bucket.put(key)
    assert keys(open_source(bucket.source(pattern))) == expected


def test_an_object_comes_with_its_size_time_and_canonical_uri(bucket: Bucket) -> None:
    bucket.put("a b/caf\u00e9 100%.jpg", b"12345")
    source = open_source(bucket.source("a%20b"))
    (file,) = source.files()
    assert file.uri == f"s3://{bucket.name}/{bucket.prefix}/a%20b/caf%C3%A9%20100%25.jpg"
    assert file.size_bytes == 5
    assert file.mtime_ns > 1.6e18
    assert source.read(file) == b"12345"
    assert "endpoint" not in file.uri
    again = pickle.loads(pickle.dumps(source))
    assert again.read(file) == b"12345"
    assert again == source


def test_errors_for_buckets_without_images(bucket: Bucket) -> None:
    bucket.put("texts/readme.txt")
    for key, messages in (("none", "there is nothing under"), ("texts", "contains no images")):
        with pytest.raises(SourceError, match=messages) as caught:
            open_source(bucket.source(key))
        assert key in str(caught.value)
    with pytest.raises(SourceError, match="there is nothing under 's3://no-such-bucket-of-reir/x'"):
        open_source(f"s3://no-such-bucket-of-reir/x{bucket.options}")


def test_only_deleted_objects_of_the_source_are_lost(bucket: Bucket) -> None:
    uris = [bucket.put(key) for key in ("a/1.jpg", "a/b/2.jpg", "ab/3.jpg")]
    folder, glob = open_source(bucket.source("a")), open_source(bucket.source("a/*.jpg"))
    bucket.delete("a/1.jpg")
    bucket.delete("a/b/2.jpg")
    bucket.put("a/9.jpg")
    assert [folder.has_lost(uri) for uri in uris] == [True, True, False]
    assert [glob.has_lost(uri) for uri in uris] == [True, False, False]
    assert not folder.has_lost("file:///a/1.jpg")


def test_a_missing_object_is_reported_as_missing(bucket: Bucket) -> None:
    uri = bucket.put("1.jpg")
    source = open_source(bucket.source())
    with pytest.raises(ImageError) as caught:
        source.read(SourceFile(uri.replace("1.jpg", "2.jpg"), 1, 1))
    assert caught.value.reason is ImageFailure.MISSING


def test_an_unreachable_server_is_reported_with_the_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        network_retries, "RETRY_PAUSES_S", ()
    )  # the client of S3 tries for seconds itself
    away = "?endpoint_override=http://127.0.0.1:9&scheme=http&region=us-east-1"
    with pytest.raises(SourceError, match=r"s3://bucket/photos cannot be listed: .*1 attempts"):
        open_source(f"s3://bucket/photos{away}")


def test_a_folder_of_many_pages_is_listed_as_it_streams_in(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str | None] = []
    page = S3Pages.page

    def counted(pages: S3Pages, name: str, prefix: str, token: str | None) -> Page:
        asked.append(token)
        return page(pages, name, prefix, token)

    monkeypatch.setattr(S3Pages, "page", counted)
    monkeypatch.setattr(s3_pages, "PAGE_OBJECTS", 10)
    wanted = [f"{number:05}.jpg" for number in range(25)]
    for name in wanted:
        bucket.put(f"many/{name}")
    listed = open_source(bucket.source("many")).uris()
    assert next(listed).endswith("00000.jpg")
    early = len(asked)
    names = ["00000.jpg", *(uri.rpartition("/")[2] for uri in listed)]
    assert names == wanted
    assert asked[early - 1] is None, "the first file needs one page"
    assert len(asked) == early + 2
    assert None not in asked[early:]


def test_pages_and_whole_folders_have_the_same_entries(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_pages, "PAGE_OBJECTS", 2)
    for key in TREE:
        bucket.put(key)
    name = bucket_reader.split_uri(bucket.source()[: -len(bucket.options) - 1])
    found = bucket_reader.BucketReader("", bucket.options.removeprefix("?"))
    paged = sorted(found.folder(name), key=lambda entry: entry.name)
    assert paged == found._whole_folder(name)


def test_odd_keys_are_listed_once(bucket: Bucket) -> None:
    for key in ("odd/", "odd//double.jpg", "odd/a//b/deep.jpg", "odd/ space .jpg", "odd/x/"):
        bucket.put(key)
    source = open_source(bucket.source("odd"))
    assert keys(source) == ["odd/%20space%20.jpg", "odd//double.jpg", "odd/a//b/deep.jpg"]
    (_, double, _) = source.files()
    with pytest.raises(ImageError, match="Empty path component") as caught:
        source.read(double)
    assert caught.value.reason is ImageFailure.UNREADABLE
    assert not source.has_lost(double.uri)
    bucket.delete("odd//double.jpg")
    assert open_source(bucket.source("odd")).has_lost(double.uri)


class Refusing:
    """A client of S3 that answers some calls with an error before it works."""

    def __init__(self, client: Any, statuses: list[int]) -> None:
        self.client, self.statuses = client, statuses

    def list_objects_v2(self, **asked: Any) -> Any:
        if self.statuses:
            status = self.statuses.pop(0)
            answer = {"Error": {"Code": "Odd"}, "ResponseMetadata": {"HTTPStatusCode": status}}
            raise ClientError(answer, "ListObjectsV2")
        return self.client.list_objects_v2(**asked)


@pytest.mark.parametrize(
    ("statuses", "messages"),
    [([503, 429], None), ([503] * 3, "3 attempts"), ([403], "cannot be listed: .*ListObjectsV2")],
)
def test_pages_are_retried_after_temporary_errors(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch, statuses: list[int], messages: str | None
) -> None:
    monkeypatch.setattr(network_retries, "RETRY_PAUSES_S", (0.0, 0.0))
    bucket.put("1.jpg")
    source = open_source(bucket.source())
    pages = bucket_reader._pages("", bucket.name, bucket.options.removeprefix("?"))
    monkeypatch.setattr(pages, "_client", Refusing(pages._client, list(statuses)))
    if messages is None:
        assert keys(source) == ["1.jpg"]
    else:
        with pytest.raises(SourceError, match=messages):
            list(source.uris())


class Flaky:
    """A file system that fails some times before it works."""

    def __init__(self, filesystem: FileSystem, messages: str, failures: int) -> None:
        self.filesystem, self.messages, self.failures, self.calls = (
            filesystem,
            messages,
            failures,
            0,
        )

    def open_input_file(self, path: str) -> object:
        self.calls += 1
        if self.calls <= self.failures:
            raise OSError(self.messages)
        return self.filesystem.open_input_file(path)


@pytest.mark.parametrize(
    ("messages", "failures", "reason", "calls"),
    [
        ("AWS Error NETWORK_CONNECTION during HeadObject operation", 2, None, 3),
        ("AWS Error SLOW_DOWN during HeadObject operation", 9, ImageFailure.UNREACHABLE, 3),
        ("AWS Error ACCESS_DENIED during HeadObject operation", 9, ImageFailure.UNREADABLE, 1),
    ],
)
def test_reads_are_retried_after_temporary_errors(
    bucket: Bucket,
    monkeypatch: pytest.MonkeyPatch,
    messages: str,
    failures: int,
    reason: ImageFailure | None,
    calls: int,
) -> None:
    monkeypatch.setattr(network_retries, "RETRY_PAUSES_S", (0.0, 0.0))
    bucket.put("1.jpg", b"12")
    source = open_source(bucket.source())
    (file,) = source.files()
    flaky = Flaky(open_filesystem(bucket.source())[0], messages, failures)
    monkeypatch.setattr(bucket_reader, "_filesystem", lambda *_: flaky)
    if reason is None:
        assert source.read(file) == b"12"
    else:
        with pytest.raises(ImageError) as caught:
            source.read(file)
        assert caught.value.reason is reason
        assert messages in caught.value.detail
    assert flaky.calls == calls


def test_the_life_of_a_gallery_in_a_bucket(
    bucket: Bucket, photos: Path, store: MemoryStore
) -> None:
    names = sorted(path.name for path in photos.iterdir())
    for name in names:
        bucket.put(f"p/{name}", (photos / name).read_bytes())
    bucket.put("p/bad.jpg", b"no image")
    options = IndexOptions(prune=True)

    def run() -> tuple[int, int, int, int, int]:
        done = index(bucket.source("p"), "g", store, FakeEncoder(), options=options)
        return done.new, done.changed, done.unchanged, done.num_failed, done.removed

    assert run() == (20, 0, 0, 1, 0)
    assert run() == (0, 0, 20, 1, 0)
    bucket.put(f"p/{names[0]}", (photos / names[1]).read_bytes())
    bucket.delete(f"p/{names[2]}")
    bucket.put("p/renamed.png", (photos / names[2]).read_bytes())
    assert run() == (1, 1, 18, 1, 1)
