"""Listing folders, patterns and single files."""

from __future__ import annotations

import os
import random
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reir.errors import SourceError
from reir.images.decode import canonical_uri, path_of_uri
from reir.store import open_store
from reir.store.memory import MemoryStore
from reir_ingestion.pipeline import IndexOptions, index
from reir_ingestion.sources import SourceFile, SourceOptions, local, open_source, patterns
from reir_ingestion.sources.contract import Source
from reir_testing import FakeEncoder
from reir_testing.ingestion import write_scenes


def make(root: Path, *names: str | bytes) -> None:
    for name in names:
        path = os.path.join(os.fsencode(root), os.fsencode(name))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        Path(os.fsdecode(path)).write_bytes(b"x")


FOLLOWING = SourceOptions(follow_links=True)


def listed(source: Source) -> list[str]:
    """Paths below the root, as listed."""
    assert isinstance(source, local.LocalSource)
    return [os.fsdecode(os.path.relpath(path, source.root)) for path in source.paths()]


def path_of(file: SourceFile) -> str:
    return os.fspath(path_of_uri(file.uri))


def test_a_folder_is_listed_by_suffix_in_order_without_hidden_names(tmp_path: Path) -> None:
    make(tmp_path, "b.JPG", "a.png", "z/1.webp", "c/d/2.jpeg", "c/1.tiff", "notes.txt", "jpg")
    make(tmp_path, ".hidden.jpg", ".thumbs/x.jpg", "c/.x/y.png", "._a.png")
    expected = ["a.png", "b.JPG", "c/1.tiff", "c/d/2.jpeg", "z/1.webp"]
    assert listed(open_source(tmp_path)) == expected
    assert listed(open_source(str(tmp_path) + "/")) == expected


def test_files_come_with_size_and_time(tmp_path: Path) -> None:
    make(tmp_path, "a.jpg")
    os.utime(tmp_path / "a.jpg", ns=(5, 1_234_567_891))
    (file,) = open_source(tmp_path).files()
    assert (file.size_bytes, file.mtime_ns) == (1, 1_234_567_891)
    assert file.uri == canonical_uri(tmp_path / "a.jpg")


def test_a_time_beyond_64_bits_is_clamped(tmp_path: Path) -> None:
    """In nanoseconds, the years after 2262 do not fit into the ledger."""
    (path,) = write_scenes(tmp_path / "photos", 1)
    os.utime(path, (10**10, 10**10))
    (file,) = open_source(tmp_path / "photos").files()
    assert file.mtime_ns == 2**63 - 1
    with closing(open_store(str(tmp_path / "store"))) as store:
        assert index(tmp_path / "photos", "g", store, FakeEncoder()).new == 1
        assert index(tmp_path / "photos", "g", store, FakeEncoder()).unchanged == 1


def test_the_order_does_not_depend_on_the_file_system(tmp_path: Path) -> None:
    names = [f"{folder}{n}.jpg" for folder in ("", "x/", "x/y/") for n in range(20)]
    for seed in range(2):
        shuffled = names[:]
        random.Random(seed).shuffle(shuffled)
        make(tmp_path / str(seed), *shuffled)
    one, other = (listed(open_source(tmp_path / str(seed))) for seed in range(2))
    assert one == other
    assert sorted(one) == sorted(names)


def test_names_in_any_encoding_are_listed(tmp_path: Path) -> None:
    names = [b"new\nline.jpg", b"caf\xe9.jpg", b"\xff\xfe/\x80.png", "写真.webp".encode()]
    make(tmp_path, *names)
    files = list(open_source(tmp_path).files())
    found = {os.path.relpath(os.fsencode(path_of(file)), os.fsencode(tmp_path)) for file in files}
    assert found == set(names)
    assert all(file.size_bytes == 1 for file in files)


def test_broken_links_and_special_files_are_listed(tmp_path: Path) -> None:
    os.symlink("gone", tmp_path / "broken.jpg")
    os.symlink("loop.jpg", tmp_path / "loop.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    files = list(open_source(tmp_path).files())
    assert [Path(path_of(file)).name for file in files] == ["broken.jpg", "loop.jpg", "pipe.jpg"]
    assert all((file.size_bytes, file.mtime_ns) == (0, 0) for file in files)


def test_links_to_folders_are_followed_once_and_loops_end(tmp_path: Path) -> None:
    make(tmp_path / "photos", "real/1.jpg")
    make(tmp_path / "elsewhere", "2.jpg", "deep/3.jpg")
    os.symlink(tmp_path / "photos", tmp_path / "photos" / "a_loop")
    os.symlink(tmp_path / "photos" / "real", tmp_path / "photos" / "a_second_way")
    os.symlink(tmp_path / "elsewhere", tmp_path / "photos" / "more")
    os.symlink(tmp_path / "photos", tmp_path / "elsewhere" / "back")
    assert listed(open_source(tmp_path / "photos", FOLLOWING)) == [
        "real/1.jpg",
        "more/2.jpg",
        "more/deep/3.jpg",
    ]
    assert listed(open_source(tmp_path / "photos")) == ["real/1.jpg"]


def test_a_link_to_a_file_is_an_image(tmp_path: Path) -> None:
    make(tmp_path, "elsewhere/1.bin", "photos/.kept/2.bin")
    os.symlink(tmp_path / "elsewhere" / "1.bin", tmp_path / "photos" / "x.jpg")
    os.symlink(".kept/2.bin", tmp_path / "photos" / "y.jpg")
    one, two = open_source(tmp_path / "photos", FOLLOWING).files()
    assert path_of(one) == str(tmp_path / "photos" / "x.jpg")
    assert (one.size_bytes, two.size_bytes) == (1, 1)


def test_symlinks_that_leave_the_folder_are_skipped_and_counted(tmp_path: Path) -> None:
    make(tmp_path, "secret.jpg", "photos-2/a.jpg", "photos/in.jpg")
    os.symlink(tmp_path / "secret.jpg", tmp_path / "photos" / "1.jpg")
    os.symlink("../photos-2", tmp_path / "photos" / "2")
    os.symlink("../photos-2/gone.jpg", tmp_path / "photos" / "3.jpg")
    os.symlink("in.jpg", tmp_path / "photos" / "4.jpg")
    os.symlink(tmp_path / "photos", tmp_path / "way in")
    for root in (tmp_path / "photos", tmp_path / "way in", tmp_path / "photos" / "*"):
        source = open_source(root)
        assert listed(source) == ["4.jpg", "in.jpg"]
        assert isinstance(source, local.LocalSource)
        assert source.skipped == {"links out of the folder": 3}


def test_files_that_are_not_photos_are_counted_by_suffix(
    tmp_path: Path, store: MemoryStore
) -> None:
    write_scenes(tmp_path, 2)
    make(tmp_path, "a.CR2", "b.cr2", "c/d.mov", "photo", ".hidden.jpg", ".thumbs/1.jpg", "x.\xe9")
    report = index(tmp_path, "g", store, FakeEncoder())
    expected = {".cr2": 2, ".mov": 1, "no suffix": 1, "hidden": 2, ".\\xe9": 1}
    assert (report.new, report.skipped) == (2, expected)
    rows = {name: (value, remark) for name, value, remark in report._rows()}
    assert rows["skipped"] == ("7", ".cr2 2, hidden 2, .\\xe9 1, .mov 1, no suffix 1")
    assert index(tmp_path / "0*", "g", store, FakeEncoder()).skipped == {}
    with pytest.raises(SourceError, match=r"contains no images; .*skipped: \.mov 1"):
        open_source(tmp_path / "c")


TREE = (
    "1.jpg",
    "2.png",
    "a/3.jpg",
    "a/b/4.jpg",
    "ab/5.jpg",
    "ab/b/6.jpg",
    "x[1]/7.jpg",
    "a/.h/8.jpg",
)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.jpg", ["1.jpg"]),
        ("?.*", ["1.jpg", "2.png"]),
        ("**/*.jpg", ["1.jpg", "a/3.jpg", "a/b/4.jpg", "ab/5.jpg", "ab/b/6.jpg", "x[1]/7.jpg"]),
        ("a/**/*.jpg", ["3.jpg", "b/4.jpg"]),
        ("a*/*.jpg", ["a/3.jpg", "ab/5.jpg"]),
        ("a*/b/*", ["a/b/4.jpg", "ab/b/6.jpg"]),
        ("**/b/*", ["a/b/4.jpg", "ab/b/6.jpg"]),
        ("**/b/**", ["a/b/4.jpg", "ab/b/6.jpg"]),
        ("a[b]/*", ["ab/5.jpg"]),
        ("x[1]/*.jpg", []),
        ("x[[]1]/*.jpg", ["x[1]/7.jpg"]),
    ],
)
def test_globs(tmp_path: Path, pattern: str, expected: list[str]) -> None:
    make(tmp_path, *TREE)
    if not expected:
        with pytest.raises(SourceError, match="contains no images"):
            open_source(tmp_path / pattern)
        return
    assert listed(open_source(tmp_path / pattern)) == expected


def test_an_existing_name_with_brackets_is_not_a_pattern(tmp_path: Path) -> None:
    make(tmp_path, *TREE)
    assert listed(open_source(tmp_path / "x[1]")) == ["7.jpg"]


def test_a_pattern_skips_folders_that_cannot_match(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, *TREE)
    scanned: list[str] = []
    scan = local._scan

    def note(
        folder: bytes, suffixes: tuple[str, ...], inside: bytes | None
    ) -> local._FolderEntries:
        scanned.append(os.path.relpath(os.fsdecode(folder), tmp_path))
        return scan(folder, suffixes, inside)

    monkeypatch.setattr(local, "_scan", note)
    source = open_source(tmp_path / "a*/*.jpg")
    scanned.clear()
    list(source.uris())
    assert scanned == [".", "a", "ab"]


SEGMENTS = st.lists(st.sampled_from([b"a", b"b", b"ab"]), max_size=4).map(tuple)
PATTERNS = st.lists(st.sampled_from([b"a", b"*", b"?b", b"**"]), max_size=4).map(tuple)


@given(SEGMENTS, PATTERNS)
def test_no_folder_above_a_match_is_skipped(
    parts: tuple[bytes, ...], pattern: tuple[bytes, ...]
) -> None:
    if patterns.matches(parts, pattern):
        above = [parts[:length] for length in range(len(parts))]
        assert all(patterns.may_match_below(folder, pattern) for folder in above)


def test_a_single_file_may_have_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, ".scan.bin")
    monkeypatch.chdir(tmp_path)
    (file,) = open_source(".scan.bin").files()
    assert path_of(file) == str(tmp_path / ".scan.bin")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none", "source '.*none' does not exist; give a folder"),
        ("none/*.jpg", "there is no folder '.*none'"),
        ("*.gif", r"source '.*\*.gif' contains no images; looked for files ending in .avif .bmp"),
        ("empty", "source '.*empty' contains no images"),
    ],
)
def test_errors_for_sources_without_images(tmp_path: Path, name: str, message: str) -> None:
    make(tmp_path, "1.jpg", "empty/readme.txt")
    with pytest.raises(SourceError, match=message):
        open_source(tmp_path / name)


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "pictures/1.jpg")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert listed(open_source("~/pictures")) == ["1.jpg"]


@pytest.mark.parametrize("name", ["~photo.jpg", "~nosuchuser/1.jpg"])
def test_a_name_may_begin_like_the_home_of_somebody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match="does not exist"):
        open_source(name)
    make(tmp_path, name)
    (file,) = open_source(name).files()
    assert path_of(file) == str(tmp_path / name)


def test_only_deleted_files_of_the_source_are_lost(tmp_path: Path) -> None:
    make(tmp_path, "a/1.jpg", "a/b/2.jpg", "ab/3.jpg")
    folder, glob = open_source(tmp_path / "a"), open_source(tmp_path / "a" / "*.jpg")
    single = open_source(tmp_path / "a" / "1.jpg")
    uris = {n: canonical_uri(tmp_path / n) for n in ("a/1.jpg", "a/b/2.jpg", "ab/3.jpg")}
    everything = (folder, glob, single)
    assert not any(source.has_lost(uri) for source in everything for uri in uris.values())
    for name in uris:
        (tmp_path / name).unlink()
    assert [folder.has_lost(uri) for uri in uris.values()] == [True, True, False]
    assert [glob.has_lost(uri) for uri in uris.values()] == [True, False, False]
    assert [single.has_lost(uri) for uri in uris.values()] == [True, False, False]
    (tmp_path / "a" / "b").rmdir()
    assert folder.has_lost(uris["a/b/2.jpg"])
    assert not folder.has_lost("s3://bucket/a/1.jpg")


def test_a_file_that_cannot_be_reached_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, "1.jpg", "a/2.jpg")
    source = open_source(tmp_path)

    def refuse(path: bytes) -> os.stat_result:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr("reir_ingestion.sources.local.os.lstat", refuse)
    assert not source.has_lost(canonical_uri(tmp_path / "a" / "2.jpg"))


def test_a_folder_that_cannot_be_listed_counts_as_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, "1.jpg", "a/2.jpg")
    scandir = os.scandir

    def refuse(path: bytes) -> object:
        if path.endswith(b"/a"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr("reir_ingestion.sources.local.os.scandir", refuse)
    failures: list[tuple[str, Exception]] = []
    source = open_source(tmp_path)
    (file,) = source.files(lambda folder, error: failures.append((folder, error)))
    assert path_of(file) == str(tmp_path / "1.jpg")
    ((folder, error),) = failures
    assert folder == str(tmp_path / "a")
    assert isinstance(error, OSError)
    assert error.strerror == "Permission denied"


def test_paths_up_to_four_kib_are_indexed_and_longer_ones_reported(tmp_path: Path) -> None:
    segment = "\u5199\u771f" * 20  # 120 bytes
    here = os.open(tmp_path, os.O_RDONLY)
    length = len(os.fsencode(tmp_path))
    deepest = 0
    while length < 4300:
        os.mkdir(segment, dir_fd=here)
        below = os.open(segment, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
        length += 121
        if length + len("/1.jpg") < 4096:
            deepest = length
            with os.fdopen(os.open("1.jpg", os.O_WRONLY | os.O_CREAT, dir_fd=here), "wb") as file:
                file.write(b"x")
    os.close(here)
    failures: list[str] = []
    source = open_source(tmp_path)
    files = list(source.files(lambda part, _: failures.append(part)))
    assert max(len(os.fsencode(path_of(file))) for file in files) == deepest + len("/1.jpg") > 3900
    assert all(source.read(file) == b"x" for file in files)
    assert len(failures) == 1
    assert len(os.fsencode(failures[0])) > 4095
    store = MemoryStore()
    assert index(tmp_path, "g", store, FakeEncoder()).failed == {"not_an_image": len(files)}


def test_a_source_that_becomes_empty_is_an_error(tmp_path: Path) -> None:
    (path,) = write_scenes(tmp_path, 1)
    store = MemoryStore()
    assert index(tmp_path, "g", store, FakeEncoder()).new == 1
    path.unlink()
    with pytest.raises(
        SourceError, match="contains no images"
    ):  # an unmounted disk looks like this
        index(tmp_path, "g", store, FakeEncoder(), options=IndexOptions(prune=True))
    (info,) = store.versions("g")
    assert info.num_images == 1
