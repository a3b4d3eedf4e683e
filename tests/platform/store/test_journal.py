"""The journal file: frames, torn tails, damage, compaction."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from reir.records import IndexedImage
from reir.store.journal import (
    Frame,
    Journal,
    JournalDamagedError,
    delete_frame,
    live_frames,
    put_frame,
)

DIM = 8

MakeImage = Callable[..., IndexedImage]


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    Journal.create(tmp_path / "j.journal")
    return Journal(tmp_path / "j.journal", DIM)


def contents(frames: list[Frame]) -> list[tuple[list[str], list[str]]]:
    return [([put.image_id for put in frame.puts], list(frame.deletes)) for frame in frames]


def test_frames_come_back_in_order(journal: Journal, make_image: MakeImage) -> None:
    image = make_image("é", 3, attributes={"a": None, "b": 2.5})
    journal.append(put_frame([image, make_image("b", 0)]))
    journal.append(delete_frame(["b", "c"]))
    frames = list(journal.read())
    assert contents(frames) == [(["é", "b"], []), ([], ["b", "c"])]
    put, rows = next(frames[0].parts())
    assert (put.uri, put.num_instances, put.attributes) == (
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


def test_a_torn_tail_is_skipped_and_then_cut_off(journal: Journal, make_image: MakeImage) -> None:
    first, second = put_frame([make_image("a")]), put_frame([make_image("b")])
    journal.append(first)
    for torn in range(1, len(second)):
        journal.path.write_bytes(first + second[:torn])
        assert contents(list(journal.read())) == [(["a"], [])]
    Journal(journal.path, DIM).append(delete_frame(["a"]))
    assert contents(list(journal.read())) == [(["a"], []), ([], ["a"])]


def test_damage_is_noticed_wherever_it_is(journal: Journal, make_image: MakeImage) -> None:
    frame = put_frame([make_image("a", 1)])
    journal.append(frame)
    journal.append(delete_frame(["b"]))
    whole = journal.path.read_bytes()
    for position in range(len(frame)):
        journal.path.write_bytes(
            whole[:position] + bytes([whole[position] ^ 0xFF]) + whole[position + 1 :]
        )
        try:
            found = contents(list(journal.read()))
        except JournalDamagedError:
            continue
        assert found == [], "a length that points beyond the file reads as a torn tail"


def test_replacing_the_file_is_noticed(journal: Journal) -> None:
    assert journal.is_current
    Journal.create(journal.path)
    assert not journal.is_current
    again = Journal(journal.path, DIM)
    journal.path.unlink()
    assert not again.is_current


def test_compaction_keeps_what_is_live(journal: Journal, make_image: MakeImage) -> None:
    rng = np.random.default_rng(1)
    state: dict[str, bytes] = {}
    for seed in range(40):
        names = [str(name) for name in rng.choice(list("abcdefgh"), 3, replace=False)]
        if seed % 4 == 3:
            journal.append(delete_frame(names))
            for name in names:
                state.pop(name, None)
            continue
        images = [make_image(name, int(rng.integers(4)), seed=seed) for name in names]
        journal.append(put_frame(images))
        for image in images:
            assert image.instances is not None
            state[image.record.image_id] = image.instances.vectors.tobytes()
    size = journal.size
    Journal.create(journal.path, live_frames(journal))
    compacted = Journal(journal.path, DIM)
    kept = [part for frame in compacted.read() for part in frame.parts()]
    assert {put.image_id: rows[:, 5:].tobytes() for put, rows in kept} == state
    assert len(kept) == len(state)
    assert compacted.size < size
