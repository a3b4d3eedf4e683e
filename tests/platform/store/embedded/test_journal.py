"""The journal and its rows: frames, partial frames, damage, compaction."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest

from reir.records import IndexedImage
from reir.store.embedded.journal import (
    Change,
    Frame,
    Journal,
    JournalDamagedError,
    delete_change,
    live_changes,
    put_change,
)

DIM = 8
START = 16
"""Bytes before the recorded end; damage to those is detected when a journal is opened."""

MakeImage = Callable[..., IndexedImage]
FullDisk = Callable[[], AbstractContextManager[None]]


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    Journal.create(tmp_path / "j.journal", DIM)
    return Journal(tmp_path / "j.journal", DIM, to_write=True)


def put(*images: IndexedImage) -> Change:
    return put_change(images, DIM)


def delete(*image_ids: str) -> Change:
    return delete_change(image_ids, DIM)


def rows_file(journal: Journal) -> Path:
    (found,) = journal.path.parent.glob("*.rows")
    return found


def contents(frames: list[Frame]) -> list[tuple[list[str], list[str]]]:
    changes = [frame.change for frame in frames]
    return [([put.image_id for put in each.puts], list(each.deletes)) for each in changes]


def test_frames_are_read_in_order(journal: Journal, make_image: MakeImage) -> None:
    image = make_image("é", 3, attributes={"a": None, "b": 2.5})
    journal.append(put(image, make_image("b", 0)))
    journal.append(delete("b", "c"))
    frames = list(journal.read())
    assert contents(frames) == [(["é", "b"], []), ([], ["b", "c"])]
    first, rows = next(frames[0].change.parts())
    assert (first.uri, first.num_instances, first.attributes) == (
        image.record.uri,
        3,
        {"a": None, "b": 2.5},
    )
    assert image.instances is not None
    np.testing.assert_array_equal(rows[:, :4], image.instances.boxes)
    np.testing.assert_array_equal(rows[:, 4], image.instances.objectness)
    np.testing.assert_array_equal(rows[:, 5:], image.instances.vectors)
    assert contents(list(journal.read(frames[0].end))) == [([], ["b", "c"])]


def test_an_empty_journal_has_no_frames(journal: Journal) -> None:
    assert list(journal.read()) == []


def test_a_partial_frame_is_ignored_and_then_cut_off(
    journal: Journal, make_image: MakeImage
) -> None:
    """A writer leaves one if it is killed while it writes a frame or before it records the end."""
    journal.append(put(make_image("a")))
    before = journal.path.read_bytes()
    journal.append(put(make_image("b")))
    after = before + journal.path.read_bytes()[len(before) :]
    journal.path.write_bytes(after)
    assert contents(list(journal.read())) == [(["a"], []), (["b"], [])]
    for torn in range(len(before) + 1, len(after)):
        journal.path.write_bytes(after[:torn])
        assert contents(list(journal.read())) == [(["a"], [])]
    last = make_image("c", 2)
    Journal(journal.path, DIM, to_write=True).append(put(last))
    frames = list(journal.read())
    assert contents(frames) == [(["a"], []), (["c"], [])]
    assert last.instances is not None
    np.testing.assert_array_equal(frames[1].table[-2:, 5:], last.instances.vectors)
    assert len(frames[1].table) == 5, "the rows of the torn frame were overwritten"


def test_damage_at_every_byte_is_detected(journal: Journal, make_image: MakeImage) -> None:
    journal.append(put(make_image("a", 1)))
    journal.append(delete("b"))
    whole = journal.path.read_bytes()
    for position in range(START, len(whole)):
        data = bytearray(whole)
        data[position] ^= 0xFF
        journal.path.write_bytes(data)
        with pytest.raises(JournalDamagedError):
            list(journal.read())


def test_truncation_to_every_length_is_detected(journal: Journal, make_image: MakeImage) -> None:
    """New readers, a reader that had read everything, and writers all notice it."""
    journal.append(put(make_image("a", 1)))
    journal.append(delete("b"))
    whole = journal.path.read_bytes()
    for length in range(START, len(whole)):
        journal.path.write_bytes(whole[:length])
        with pytest.raises(JournalDamagedError):
            list(journal.read())
        with pytest.raises(JournalDamagedError):
            list(journal.read(len(whole)))
        with pytest.raises(JournalDamagedError):
            journal.append(delete("c"))
        with pytest.raises(JournalDamagedError):
            Journal(journal.path, DIM, to_write=True).append(delete("c"))
        with pytest.raises(JournalDamagedError):
            journal.images()


def test_damage_of_the_rows_is_detected(journal: Journal, make_image: MakeImage) -> None:
    journal.append(put(make_image("a", 2)))
    rows = rows_file(journal)
    with rows.open("r+b") as file:
        file.seek(60)
        file.write(b"?")
    with pytest.raises(JournalDamagedError, match=r"rows of .* have a wrong checksum"):
        list(journal.read())
    with rows.open("r+b") as file:
        file.truncate(100)
    with pytest.raises(JournalDamagedError, match="ends before row 2"):
        list(Journal(journal.path, DIM).read())
    rows.unlink()
    with pytest.raises(JournalDamagedError, match="cannot be opened"):
        Journal(journal.path, DIM)


@pytest.mark.parametrize(
    "start", [b"", b"rjn1" + bytes(40), b"rjn2" + bytes(40), b"rjn3" + bytes(12)]
)
def test_another_format_or_dimension_is_treated_as_damage(journal: Journal, start: bytes) -> None:
    journal.path.write_bytes(start)
    with pytest.raises(JournalDamagedError):
        Journal(journal.path, DIM)


def test_many_rows_are_mapped_as_one_array(journal: Journal, make_image: MakeImage) -> None:
    """The rows do not fit into one step of the file; earlier arrays do not change."""
    images = [make_image(str(number), 400) for number in range(60)]
    for image in images:
        journal.append(put(image))
    frames = list(journal.read())
    table = frames[-1].table
    assert table.shape == (24_000, 5 + DIM)
    assert not table.flags.writeable
    assert all(np.shares_memory(frame.table, table) for frame in frames)
    wanted = [image.instances.vectors for image in images if image.instances]
    np.testing.assert_array_equal(table[:, 5:], np.concatenate(wanted))
    Journal.remove(journal.path)
    np.testing.assert_array_equal(table[:, 5:], np.concatenate(wanted))
    assert list(journal.path.parent.iterdir()) == []


def test_a_replaced_file_is_detected(journal: Journal) -> None:
    assert journal.is_current
    Journal.create(journal.path, DIM)
    assert len(list(journal.path.parent.iterdir())) == 3, "old rows are gone"
    assert not journal.is_current
    again = Journal(journal.path, DIM)
    journal.path.unlink()
    assert not again.is_current


def test_compaction_keeps_live_images(journal: Journal, make_image: MakeImage) -> None:
    rng = np.random.default_rng(1)
    state: dict[str, bytes] = {}
    for seed in range(40):
        names = [str(name) for name in rng.choice(list("abcdefgh"), 3, replace=False)]
        if seed % 4 == 3:
            journal.append(delete(*names))
            for name in names:
                state.pop(name, None)
            continue
        images = [make_image(name, int(rng.integers(4)), seed=seed) for name in names]
        journal.append(put(*images))
        for image in images:
            assert image.instances is not None
            state[image.record.image_id] = image.instances.vectors.tobytes()
    *_, last = journal.read()
    Journal.create(journal.path, DIM, live_changes(journal))
    compacted = Journal(journal.path, DIM)
    frames = list(compacted.read())
    kept = [part for frame in frames for part in frame.change.parts()]
    assert {image.image_id: rows[:, 5:].tobytes() for image, rows in kept} == state
    assert len(kept) == len(state)
    assert journal.images() == {image.image_id: image for image, _ in kept}
    assert len(frames[-1].table) == sum(image.num_instances for image, _ in kept)
    assert len(frames[-1].table) < len(last.table)
    assert compacted.size < journal.size


def test_a_journal_that_cannot_be_written_leaves_no_files(
    journal: Journal, make_image: MakeImage, full_disk: FullDisk
) -> None:
    journal.append(put(make_image("a")))
    before = sorted(journal.path.parent.iterdir())
    with full_disk(), pytest.raises(OSError, match="File too large"):
        Journal.create(journal.path, DIM, [put(make_image("b"))])
    assert sorted(journal.path.parent.iterdir()) == before
    assert contents(list(Journal(journal.path, DIM).read())) == [(["a"], [])]
    assert journal.has_valid_stamp


def test_a_journal_is_read_in_several_parts_if_need_be(
    journal: Journal, make_image: MakeImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux returns at most 2 GiB at once; here 100 bytes stand for them."""
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, at: pread(file, min(size, 100), at))
    for name in "abc":
        journal.append(put(make_image(name)))
    assert contents(list(journal.read())) == [(["a"], []), (["b"], []), (["c"], [])]
    assert list(journal.images()) == ["a", "b", "c"]
