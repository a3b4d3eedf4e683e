"""The exact index gives the same results as a plain loop."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reir.errors import GalleryNotFound, SchemaMismatch
from reir.records import FloatArray, IndexedImage, JsonValue
from reir.store.embedded import exact_index, filter_columns, int8_codes, journal_reader
from reir.store.embedded.exact_index import ExactIndex
from reir.store.embedded.journal import Journal, delete_change, put_change
from reir.store.embedded.journal_reader import JournalReader
from reir.store.filters import parse

DIM = 8

MakeImage = Callable[..., IndexedImage]
FullDisk = Callable[[], AbstractContextManager[None]]


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    Journal.create(tmp_path / "j.journal", DIM)
    return Journal(tmp_path / "j.journal", DIM, to_write=True)


class FakeMaintainer:
    """A maintainer without a store to compare the journal with."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def ensure_journal(self) -> int:
        if not self._path.exists():
            raise GalleryNotFound("gone")
        return DIM

    def verify(self) -> None:
        pass

    def repair(self, why: str) -> None:
        raise AssertionError(why)


@pytest.fixture
def reader(journal: Journal) -> JournalReader:
    lock = journal.path.with_suffix(".lock")
    return JournalReader(journal.path, lock, FakeMaintainer(journal.path))


def query(seed: int = 0) -> FloatArray:
    return np.random.default_rng(seed).standard_normal((1, DIM)).astype(np.float32)


def slow_scores(images: dict[str, IndexedImage], query_D: FloatArray, where: str) -> list[float]:
    """Scores of every instance that the filter keeps, best first; one instance at a time."""
    smallest = float(where.removeprefix("area >= "))
    scores = []
    for image in images.values():
        assert image.instances is not None
        for area, vector in zip(image.instances.areas, image.instances.vectors, strict=True):
            if area >= np.float32(smallest):
                scores.append(
                    sum(float(a) * float(b) for a, b in zip(vector, query_D, strict=True))
                )
    return sorted(scores, reverse=True)


@settings(max_examples=40, deadline=None)
@given(
    steps=st.lists(
        st.tuples(st.booleans(), st.sampled_from("abcdef"), st.integers(0, 12)), max_size=25
    ),
    limit=st.integers(1, 40),
    smallest=st.sampled_from([0.0, 0.05, 0.5, 2.0]),
)
def test_results_match_a_plain_loop(
    tmp_path_factory: pytest.TempPathFactory,
    make_image: MakeImage,
    steps: list[tuple[bool, str, int]],
    limit: int,
    smallest: float,
) -> None:
    path = tmp_path_factory.mktemp("exact") / "j.journal"
    Journal.create(path, DIM)
    journal = Journal(path, DIM, to_write=True)
    images: dict[str, IndexedImage] = {}
    for seed, (put, name, count) in enumerate(steps):
        if put:
            images[name] = make_image(name, count, seed=seed)
            journal.append(put_change([images[name]], DIM))
        else:
            images.pop(name, None)
            journal.append(delete_change([name], DIM))
    index = ExactIndex(DIM)
    for frame in journal.read():
        index.apply(frame)
    journal.close()
    where = f"area >= {smallest}"
    hits = index.select(parse(where)).search(query(), limit)[0]
    expected = slow_scores(images, query()[0], where)[:limit]
    np.testing.assert_allclose([hit.score for hit in hits], expected, atol=1e-5)
    assert len({hit.instance_id for hit in hits}) == len(hits)
    assert len(index) == sum(image.record.num_instances for image in images.values())


def test_rows_are_found_before_and_after_they_have_codes(
    journal: Journal, make_image: MakeImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exact_index, "_CODES_FROM_ROWS", 100)
    monkeypatch.setattr(int8_codes, "_ROWS_PER_CALL", 40)
    num_codes: list[int] = []
    best = int8_codes.Int8Snapshot.best

    def counted(
        snapshot: int8_codes.Int8Snapshot, *args: Any
    ) -> tuple[npt.NDArray[np.int64], float]:
        num_codes.append(len(snapshot.codes))
        return best(snapshot, *args)

    monkeypatch.setattr(int8_codes.Int8Snapshot, "best", counted)
    images: dict[str, IndexedImage] = {}
    index = ExactIndex(DIM)
    for step in range(80):
        name = str(step % 60)  # the last ones replace the first
        images[name] = make_image(name, 10, seed=step)
        journal.append(put_change([images[name]], DIM))
        for frame in list(journal.read())[-1:]:
            index.apply(frame)
        (hits,) = index.select(None).search(query(step), 2)
        wanted = slow_scores(images, query(step)[0], "area >= 0")[:2]
        np.testing.assert_allclose([hit.score for hit in hits], wanted, atol=1e-5)
    assert len(num_codes) > 20
    assert 100 <= min(num_codes) < max(num_codes) == 800
    assert min(num_codes) % 40 == 0


@pytest.mark.parametrize("share", [0.01, 0.05, 0.5, 0.99, 1.0])
def test_filters_of_any_selectivity(journal: Journal, make_image: MakeImage, share: float) -> None:
    images = [make_image(f"{number:03}", 10) for number in range(100)]
    journal.append(put_change(images, DIM))
    index = ExactIndex(DIM)
    for frame in journal.read():
        index.apply(frame)
    last = f"{int(share * 100) - 1:03}"
    queries = np.concatenate([query(seed) for seed in range(30)])
    found = index.select(parse(f'image_id <= "{last}"')).search(queries, 7)
    vectors = np.concatenate(
        [image.instances.vectors for image in images[: int(share * 100)] if image.instances]
    )
    scores = -np.sort(-(queries @ vectors.T), axis=1)[:, :7]
    for hits, row in zip(found, scores, strict=True):
        np.testing.assert_allclose([hit.score for hit in hits], row[: len(hits)], atol=1e-5)
        assert len(hits) == min(7, len(vectors))
        assert all(hit.image_id <= last for hit in hits)


def test_a_reader_sees_what_another_process_appends(
    journal: Journal, reader: JournalReader, make_image: MakeImage
) -> None:
    assert reader.search(query(), 3, None, "v") == [[]]
    for count in range(1, 6):
        journal.append(put_change([make_image(str(count), 2)], DIM))
        assert len(reader.search(query(), 100, None, "v")[0]) == 2 * count
    journal.append(delete_change(["1", "2"], DIM))
    assert len(reader.search(query(), 100, None, "v")[0]) == 6


def test_a_reader_sees_a_replaced_and_a_deleted_journal(
    journal: Journal, reader: JournalReader, make_image: MakeImage
) -> None:
    journal.append(put_change([make_image("old", 5)], DIM))
    assert len(reader.search(query(), 9, None, "v")[0]) == 5
    Journal.create(journal.path, DIM, [put_change([make_image("new", 2)], DIM)])
    assert {hit.image_id for hit in reader.search(query(), 9, None, "v")[0]} == {"new"}
    journal.path.unlink()
    with pytest.raises(GalleryNotFound):
        reader.search(query(), 9, None, "v")


def test_a_reader_refuses_another_dimension(reader: JournalReader) -> None:
    with pytest.raises(SchemaMismatch, match="dimension 8, got 3"):
        reader.search(np.ones((1, 3), dtype=np.float32), 1, None, "v")


def test_replaced_rows_are_compacted_away(
    journal: Journal,
    reader: JournalReader,
    make_image: MakeImage,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(journal_reader, "COMPACT_ABOVE_ROWS", 20)
    sizes = []
    for seed in range(30):
        writer = Journal(journal.path, DIM, to_write=True)
        images = [make_image("a", 3, seed=seed), make_image("b", 2, seed=seed)]
        writer.append(put_change(images, DIM))
        writer.close()
        hits = reader.search(query(), 100, None, "v")[0]
        assert {hit.instance_id for hit in hits} == {"a#0", "a#1", "a#2", "b#0", "b#1"}
        image = make_image("a", 3, seed=seed).instances
        assert image is not None
        best = max(float(vector @ query()[0]) for vector in image.vectors)
        assert best == pytest.approx(max(h.score for h in hits if h.image_id == "a"), abs=1e-5)
        sizes.append(journal.path.stat().st_size)
        rows = list(journal.path.parent.glob("*.rows"))
        assert len(rows) == 1
    assert max(sizes) < 8 * sizes[0]


def test_a_search_works_although_the_disk_is_too_full_to_compact(
    journal: Journal,
    reader: JournalReader,
    make_image: MakeImage,
    monkeypatch: pytest.MonkeyPatch,
    full_disk: FullDisk,
) -> None:
    """Compaction is tried again once it would free twice as many rows."""
    monkeypatch.setattr(journal_reader, "COMPACT_ABOVE_ROWS", 20)
    (rows,) = journal.path.parent.glob("*.rows")

    def put(seed: int) -> None:
        journal.append(put_change([make_image("a", 8, seed=seed)], DIM))

    for seed in range(4):
        put(seed)
    files = {*journal.path.parent.iterdir(), journal.path.with_suffix(".lock")}
    with full_disk():
        assert len(reader.search(query(), 100, None, "v")[0]) == 8
    assert {*journal.path.parent.iterdir()} == files
    put(4)
    assert len(reader.search(query(), 100, None, "v")[0]) == 8
    assert rows.exists(), "32 of 40 rows are dead"
    for seed in range(5, 9):
        put(seed)
    assert len(reader.search(query(), 100, None, "v")[0]) == 8
    assert not rows.exists(), "64 of 72 rows were dead"


def test_a_selection_does_not_see_later_changes(journal: Journal, make_image: MakeImage) -> None:
    """A selection made before a change finds all old instances and no new ones."""
    index = ExactIndex(DIM)

    def change(seed: int) -> None:
        image = make_image("a", 2 + seed, seed=seed)
        journal.append(put_change([image, make_image(f"b{seed}", 1)], DIM))
        for frame in list(journal.read())[-1:]:
            index.apply(frame)

    change(0)
    before = [index.select(tree) for tree in (None, parse('image_id == "a"'))]
    wanted = [list(each.search(query(), 50)[0]) for each in before]
    for seed in range(1, 400):
        change(seed)
    assert [list(each.search(query(), 50)[0]) for each in before] == wanted
    now = index.select(parse('image_id == "a"')).search(query(), 500)[0]
    assert sorted(int(hit.instance_id.partition("#")[2]) for hit in now) == list(range(401))


def test_hits_are_a_sequence_that_later_changes_do_not_affect(
    journal: Journal, reader: JournalReader, make_image: MakeImage
) -> None:
    journal.append(put_change([make_image("a", 3), make_image("b", 2, seed=1)], DIM))
    (found,) = reader.search(query(), 4, None, "v")
    journal.append(put_change([make_image("a", 1, seed=2)], DIM))
    reader.search(query(), 4, None, "v")
    rows = list(found)
    assert (len(found), found[-1], found[1:3]) == (4, rows[3], rows[1:3])
    assert sorted((row.score for row in rows), reverse=True) == [row.score for row in rows]
    assert {row.image_id for row in rows} == {"a", "b"}
    with pytest.raises(IndexError):
        found[4]


def test_a_column_grows_with_the_index(journal: Journal, make_image: MakeImage) -> None:
    index = ExactIndex(DIM)
    values: list[JsonValue] = [True, 1, 1.5, "1", None, 1.0, "x", 2]
    kept_by: dict[str, Callable[[JsonValue], bool]] = {
        "attr.k == 1": lambda v: v == 1 and not isinstance(v, bool | str),
        "attr.k == true": lambda v: v is True,
        "attr.k >= 1.5": lambda v: isinstance(v, int | float) and v >= 1.5,
        'attr.k in ["1", "x"]': lambda v: isinstance(v, str),
        "x1 >= 0": lambda _: True,
    }
    for number, value in enumerate(values):
        journal.append(put_change([make_image(str(number), 2, attributes={"k": value})], DIM))
        for frame in list(journal.read())[-1:]:
            index.apply(frame)
        for where, kept in kept_by.items():
            hits = index.select(parse(where)).search(query(), 100)[0]
            wanted = [str(n) for n, v in enumerate(values[: number + 1]) if kept(v)]
            assert sorted(hit.image_id for hit in hits) == sorted(wanted * 2), where


def test_the_number_of_cached_columns_is_limited(journal: Journal, make_image: MakeImage) -> None:
    journal.append(put_change([make_image("a", 3, attributes={"k7": 1})], DIM))
    index = ExactIndex(DIM)
    for frame in journal.read():
        index.apply(frame)
    for number in (*range(50), 7):
        hits = index.select(parse(f"attr.k{number} == 1")).search(query(), 9)[0]
        assert len(hits) == (3 if number == 7 else 0)
    assert len(index._columns._columns) == filter_columns.MAX_COLUMNS


def test_vectors_are_not_copied(journal: Journal, make_image: MakeImage) -> None:
    """Two indexes search the same mapped pages."""
    journal.append(put_change([make_image("a", 100)], DIM))
    (frame,) = journal.read()
    indexes = [ExactIndex(DIM), ExactIndex(DIM)]
    for index in indexes:
        index.apply(frame)
    tables = [index.select(None).rows for index in indexes]
    assert np.shares_memory(tables[0], tables[1])
    assert not tables[0].flags.owndata
    assert not tables[0].flags.writeable
