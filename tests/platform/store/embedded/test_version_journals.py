"""Journals that do not match the store are detected and rebuilt, with a warning."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

from reir.errors import StoreUnavailable
from reir.records import IndexedImage
from reir.store.embedded import journal_reader
from reir.store.embedded.journal import (
    _STAMP,
    _START,
    Change,
    JournalImage,
    _end,
    _stamp,
    put_change,
)
from reir.store.embedded.version_journals import VersionJournals
from reir.store.names import instances_collection

DIM = 8
NAME = instances_collection("g", "v1")

MakeImage = Callable[..., IndexedImage]


class FakeSource:
    """A version with a few photos, which counts how often it is compared."""

    def __init__(self, images: Iterable[IndexedImage]) -> None:
        self.images = {image.record.image_id: image for image in images}
        self.unfinished_ids: set[str] = set()
        self.num_comparisons = 0

    def dim(self) -> int:
        return DIM

    def difference(self, holders: Mapping[str, JournalImage]) -> str:
        self.num_comparisons += 1
        return "" if holders.keys() - self.unfinished_ids == self.images.keys() else "others"

    def unfinished(self) -> Set[str]:
        return self.unfinished_ids

    def changes(self) -> Iterator[Change]:
        yield put_change(self.images.values(), DIM)


@pytest.fixture
def stored(make_image: MakeImage) -> FakeSource:
    return FakeSource(make_image(f"s{number}") for number in range(8))


@pytest.fixture
def journal(tmp_path: Path, stored: FakeSource) -> Path:
    """A journal written photo by photo, by a process that has ended."""
    journals = VersionJournals(tmp_path)
    with journals.writing(NAME):
        journals.create(NAME, DIM)
        for image in stored.images.values():
            journals.put(NAME, DIM, [image])
    journals.close()
    return tmp_path / f"{NAME}.journal"


def answers(journals: VersionJournals, stored: FakeSource) -> dict[str, float]:
    query = np.random.default_rng(3).standard_normal((1, DIM)).astype(np.float32)
    hits = journals.search(NAME, stored, (query, 999, None), "v1")[0]
    return {hit.instance_id: round(hit.score, 5) for hit in hits}


def cut_to_half(journal: Path) -> None:
    os.truncate(journal, journal.stat().st_size // 2)


def cut_to_nothing(journal: Path) -> None:
    os.truncate(journal, journal.read_bytes().index(b"frm2"))


def flip_a_length(journal: Path) -> None:
    data = bytearray(journal.read_bytes())
    data[data.index(b"frm2") + 7] ^= 0xFF
    journal.write_bytes(data)


def flip_a_row(journal: Path) -> None:
    (rows,) = journal.parent.glob("*.rows")
    with rows.open("r+b") as file:
        file.seek(400)
        file.write(b"?")


def restore_an_older_journal(journal: Path) -> None:
    """All checksums are right, but the last frames are missing."""
    data = bytearray(journal.read_bytes())
    frames = [at for at in range(len(data)) if data[at : at + 4] == b"frm2"]
    end_row = int.from_bytes(data[frames[3] + 8 : frames[3] + 16], "little")
    data[_START.size : frames[0]] = _end(frames[4], end_row)
    journal.write_bytes(data[: frames[4]])


def lose_power(journal: Path) -> None:
    """Neither the last frames nor their stamp reached the disk."""
    restore_an_older_journal(journal)
    state = journal.stat()
    another_boot = b"0" * 36
    stamp = _stamp(another_boot, state.st_ino, state.st_size, state.st_ctime_ns)
    journal.with_suffix(".stamp").write_bytes(stamp)


def restore_an_older_journal_and_its_stamp(journal: Path) -> None:
    """Copied into the same files, as `cp -a` of a backup does."""
    restore_an_older_journal(journal)
    stamp = journal.with_suffix(".stamp")
    boot, file, _, changed_ns, _ = _STAMP.unpack(stamp.read_bytes())
    stamp.write_bytes(_stamp(boot, file, journal.stat().st_size, changed_ns))


def lose_the_journal(journal: Path) -> None:
    journal.unlink()


def lose_the_stamp(journal: Path) -> None:
    restore_an_older_journal(journal)
    journal.with_suffix(".stamp").unlink()


def corrupt_the_stamp(journal: Path) -> None:
    restore_an_older_journal(journal)
    stamp = journal.with_suffix(".stamp")
    boot, file, end, changed_ns, checksum = _STAMP.unpack(stamp.read_bytes())
    stamp.write_bytes(_STAMP.pack(boot, file, end // 2, changed_ns, checksum))


KINDS_OF_DAMAGE = (
    cut_to_half,
    cut_to_nothing,
    flip_a_length,
    flip_a_row,
    restore_an_older_journal,
    lose_power,
    lose_the_stamp,
    corrupt_the_stamp,
    restore_an_older_journal_and_its_stamp,
    lose_the_journal,
)


@pytest.mark.parametrize("damage", KINDS_OF_DAMAGE)
def test_a_damaged_or_outdated_journal_is_rebuilt_with_a_warning(
    stored: FakeSource,
    journal: Path,
    damage: Callable[[Path], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected = answers(VersionJournals(journal.parent), stored)
    assert len(expected) == 24
    damage(journal)
    journals = VersionJournals(journal.parent)
    with caplog.at_level(logging.WARNING):
        if damage is not flip_a_row:  # counting does not read rows
            assert journals.count(NAME, stored) == 24
        assert answers(journals, stored) == expected
    (warning,) = [each.getMessage() for each in caplog.records]
    assert warning.startswith(
        "the search copy of version v1 of gallery g did not match the store and has been rebuilt ("
    )
    assert answers(VersionJournals(journal.parent), stored) == expected
    assert len(caplog.records) == 1


@pytest.mark.parametrize("damage", [lose_power, restore_an_older_journal_and_its_stamp])
def test_a_later_write_does_not_hide_lost_frames(
    stored: FakeSource, journal: Path, make_image: MakeImage, damage: Callable[[Path], None]
) -> None:
    damage(journal)
    stored.images["new"] = make_image("new")
    writer = VersionJournals(journal.parent)
    with writer.writing(NAME):
        writer.put(NAME, DIM, [stored.images["new"]])
    assert len(answers(VersionJournals(journal.parent), stored)) == 27
    assert stored.num_comparisons > 0


def test_a_reader_notices_that_its_open_journal_was_truncated(
    stored: FakeSource, journal: Path
) -> None:
    journals = VersionJournals(journal.parent)
    expected = answers(journals, stored)
    cut_to_half(journal)
    assert answers(journals, stored) == expected
    assert answers(VersionJournals(journal.parent), stored) == expected


def test_a_journal_is_compared_only_without_a_valid_stamp(
    stored: FakeSource, journal: Path, make_image: MakeImage
) -> None:
    answers(VersionJournals(journal.parent), stored)
    assert stored.num_comparisons == 0
    journal.with_suffix(".stamp").unlink()
    for _ in range(2):
        answers(VersionJournals(journal.parent), stored)
        assert stored.num_comparisons == 1
    journal.write_bytes(journal.read_bytes())
    copy = journal.with_suffix(".copy")
    copy.write_bytes(journal.read_bytes())
    copy.replace(journal)  # as restoring a backup does
    answers(VersionJournals(journal.parent), stored)
    assert stored.num_comparisons == 2
    writer = VersionJournals(journal.parent)
    with writer.writing(NAME):
        writer.put(NAME, DIM, [make_image("new")])
    answers(VersionJournals(journal.parent), stored)
    assert stored.num_comparisons == 2


def test_an_unfinished_write_of_a_killed_writer_is_no_difference(
    stored: FakeSource, journal: Path, make_image: MakeImage, caplog: pytest.LogCaptureFixture
) -> None:
    writer = VersionJournals(journal.parent)
    with writer.writing(NAME):
        writer.put(NAME, DIM, [make_image("unfinished")])
    stored.unfinished_ids.add("unfinished")
    journal.with_suffix(".stamp").unlink()
    journals = VersionJournals(journal.parent)
    assert len(answers(journals, stored)) == 27
    assert journals.compare(NAME, stored) == 0
    assert not caplog.records


def test_compare_finds_every_difference(
    stored: FakeSource, journal: Path, make_image: MakeImage
) -> None:
    journals = VersionJournals(journal.parent)
    expected = answers(journals, stored)
    assert journals.compare(NAME, stored) == 0
    journals.put(NAME, DIM, [make_image("s3", seed=1), make_image("s7", attributes={"a": 1})])
    journals.delete(NAME, DIM, ["s5"])
    assert journals.compare(NAME, stored) == 3
    assert answers(journals, stored) == expected
    assert journals.compare(NAME, stored) == 0
    cut_to_half(journal)
    assert journals.compare(NAME, stored) > 0
    assert answers(journals, stored) == expected


@pytest.mark.parametrize("damage", [lose_power, lose_the_stamp, cut_to_half, flip_a_row])
def test_compaction_does_not_hide_lost_frames(
    stored: FakeSource,
    journal: Path,
    damage: Callable[[Path], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected = answers(VersionJournals(journal.parent), stored)
    damage(journal)
    journals = VersionJournals(journal.parent)
    for _ in range(2):
        with journals.writing(NAME):
            journals.compact(NAME, stored)
        assert answers(VersionJournals(journal.parent), stored) == expected
        assert len(caplog.records) == 1


def test_a_search_that_compacts_does_not_hide_lost_frames(
    tmp_path: Path,
    stored: FakeSource,
    make_image: MakeImage,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(journal_reader, "COMPACT_ABOVE_ROWS", 20)
    writer = VersionJournals(tmp_path)
    with writer.writing(NAME):
        writer.create(NAME, DIM)
        for image in (make_image("s0", 40), make_image("s0", 40), *stored.images.values()):
            writer.put(NAME, DIM, [image])
    lose_power(tmp_path / f"{NAME}.journal")
    assert len(answers(VersionJournals(tmp_path), stored)) == 24
    assert len(caplog.records) == 1


@pytest.mark.parametrize("failure", [StoreUnavailable("lite", "gone"), KeyboardInterrupt()])
def test_a_comparison_that_failed_is_made_again(
    stored: FakeSource, journal: Path, failure: BaseException
) -> None:
    expected = answers(VersionJournals(journal.parent), stored)
    lose_power(journal)
    journals = VersionJournals(journal.parent)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stored, "difference", Mock(side_effect=failure))
        with pytest.raises(type(failure)):
            answers(journals, stored)
    assert answers(journals, stored) == expected


def held_files(folder: Path) -> list[str]:
    """Files of a folder that this process has open or mapped, including deleted ones."""
    held = [line.split(maxsplit=5)[-1] for line in Path("/proc/self/maps").read_text().splitlines()]
    for each in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            held.append(os.readlink(each))
    return [each for each in held if each.startswith(str(folder))]


@pytest.mark.parametrize("by_another_process", [True, False])
def test_the_files_of_a_dropped_version_are_released(
    stored: FakeSource, journal: Path, by_another_process: bool
) -> None:
    """Otherwise a server in which galleries are indexed again and again would fill up."""
    journals = VersionJournals(journal.parent)
    with journals.writing(NAME):
        journals.put(NAME, DIM, stored.images.values())
    expected = answers(journals, stored)
    assert held_files(journal.parent)
    dropping = VersionJournals(journal.parent) if by_another_process else journals
    with dropping.writing(NAME):
        dropping.drop(NAME)
    if by_another_process:
        other = instances_collection("g", "v2")
        assert journals.count(other, stored) == journals.count(other, stored) == 24
        assert NAME not in "".join(held_files(journal.parent))
        assert answers(journals, stored) == expected, "the version was made anew"
    else:
        assert held_files(journal.parent) == []


@pytest.mark.timeout(60)
def test_a_drop_does_not_wait_for_a_search_that_waits_for_its_lock(
    stored: FakeSource, journal: Path
) -> None:
    journal.with_suffix(".stamp").unlink()
    journals = VersionJournals(journal.parent)
    found: list[int] = []
    search = threading.Thread(target=lambda: found.append(len(answers(journals, stored))))
    with journals.writing(NAME):
        search.start()
        time.sleep(0.3)  # enough for the search to begin to wait
        journals.drop(NAME)
        journals.create(NAME, DIM)
        journals.put(NAME, DIM, stored.images.values())
    search.join(timeout=20)
    assert found == [24]
