"""Stopping after too many failures, and retries of reads."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from reir.errors import ConfigError, ImageError, ImageFailure, ImageUnreachable, TooManyFailures
from reir.images.decode import read_bytes
from reir.records import ImageRecord
from reir.store.memory import MemoryStore
from reir_ingestion import failures, loading
from reir_ingestion.failures import FailureBudget, FailureLimit
from reir_ingestion.pipeline import IndexOptions, index
from reir_ingestion.sources import SourceOptions, local, open_source
from reir_testing import FakeEncoder
from reir_testing.ingestion import stored_rows

FAILS_TO_READ = Path("/proc/self/mem")
"""A regular file whose first byte gives a true EIO on Linux."""


def row(number: int, reason: str = "") -> ImageRecord:
    uri = f"file:///{number}.jpg"
    status = "failed" if reason else "indexed"
    return ImageRecord(
        image_id=str(number),
        uri=uri,
        status=status,  # type: ignore[arg-type]
        reason=reason,
        detail="what was found" if reason else "",
    )


@pytest.mark.parametrize(
    ("text", "listed", "allowed"),
    [
        ("0", 10**6, 0),
        ("100", 10, 100),
        ("1%", 200_000, 2000),
        ("1 %", 10, 10),  # of at least a thousand
        ("0.5%", 1000, 5),
        ("0.7%", 1000, 7),
        ("5.8%", 1000, 58),
        ("0.15%", 1000, 1),
        ("100%", 5000, 5000),
    ],
)
def test_failure_limits(text: str, listed: int, allowed: int) -> None:
    assert FailureLimit.parse(text).allowed(listed) == allowed


@pytest.mark.parametrize("text", ["", "-1", "1.5", "101%", "%", "many", "1e3"])
def test_invalid_failure_limits_raise(text: str) -> None:
    with pytest.raises(ConfigError, match=r"such as 100 or 1%, got "):
        FailureLimit.parse(text)


def test_the_error_names_numbers_reasons_and_examples() -> None:
    budget = FailureBudget(FailureLimit.parse("3"))
    budget.spend([row(1, "empty"), row(2), row(3, "truncated"), row(4, "empty")], None)
    with pytest.raises(TooManyFailures) as caught:
        budget.spend([row(5), row(6, "empty")], 9)
    message = str(caught.value)
    assert "4 of the 6 images tried have failed, but max_failures 3 allows only 3" in message
    assert (
        "empty 3 (such as file:///1.jpg: what was found); truncated 1 (such as file:///3" in message
    )


def test_a_percentage_is_taken_of_the_whole_source_once_it_is_known() -> None:
    budget = FailureBudget(FailureLimit.parse("10%"))
    budget.spend([row(n, "empty") for n in range(100)], None)
    with pytest.raises(TooManyFailures):
        budget.spend([row(101, "empty")], None)
    FailureBudget(budget.limit).spend([row(n, "empty") for n in range(101)], 2000)


def test_without_a_limit_everything_may_fail() -> None:
    FailureBudget(None).spend([row(n, "empty") for n in range(5000)], 5000)


def test_a_run_with_too_many_failures_stops_and_keeps_its_batches(
    store: MemoryStore, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failures, "MIN_IMAGES", 27)
    for number in range(5, 12):
        (photos / f"{number:03}.bad.jpg").write_bytes(b"")
    options = IndexOptions(batch_size=2, num_encoders=1, max_failures=FailureLimit.parse("15%"))
    with pytest.raises(
        TooManyFailures, match=r"5 of the .* 15% allows only 4: empty 5 \(such as file:"
    ):
        index(photos, "g", store, FakeEncoder(), options=options)
    kept = list(store.iter_images("g", store.live_version("g")))
    assert sum(each.status == "indexed" for each in kept) >= 5
    assert 5 <= sum(each.status == "failed" for each in kept) <= 7
    report = index(photos, "g", store, FakeEncoder(), options=IndexOptions())
    assert (report.num_failed, report.num_images) == (7, 27)
    # those known to fail were not tried
    report = index(photos, "g", store, FakeEncoder(), options=options)
    assert (report.failed_before, report.read) == (7, 0)


@pytest.mark.skipif(not FAILS_TO_READ.exists(), reason="needs Linux's /proc")
def test_a_failing_disk_is_retried_and_then_recorded(
    store: MemoryStore, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (photos / "bad sector.jpg").symlink_to(FAILS_TO_READ)
    with pytest.raises(ImageUnreachable) as caught:
        read_bytes(photos / "bad sector.jpg")
    assert caught.value.reason == ImageFailure.UNREADABLE
    assert os.strerror(errno.EIO) in caught.value.detail
    attempts: list[Path] = []

    def note(path: Path) -> bytes:
        attempts.append(path)
        return read_bytes(path)

    monkeypatch.setattr(loading, "READ_RETRY_PAUSES_S", (0.0, 0.01))
    monkeypatch.setattr(local, "read_bytes", note)
    source = open_source(photos, SourceOptions(follow_links=True))
    report = index(source, "g", store, FakeEncoder())
    assert (report.new, report.failed) == (20, {"unreadable": 1})
    assert sum("bad sector" in str(each) for each in attempts) == 3
    (photos / "bad sector.jpg").unlink()
    (photos / "bad sector.jpg").write_bytes(next(photos.glob("*.png")).read_bytes())
    assert index(photos, "g", store, FakeEncoder()).changed == 1


def test_reads_are_retried_until_the_file_server_is_back(
    store: MemoryStore, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[Path] = set()

    def flaky(path: Path) -> bytes:
        if path not in seen:
            seen.add(path)
            raise ImageUnreachable(ImageFailure.UNREADABLE, "stale file handle")
        return read_bytes(path)

    monkeypatch.setattr(loading, "READ_RETRY_PAUSES_S", (0.0,))
    monkeypatch.setattr(local, "read_bytes", flaky)
    report = index(photos, "g", store, FakeEncoder())
    assert (report.new, report.num_failed) == (20, 0)


def test_indexed_photos_stay_while_their_source_is_unreachable(
    store: MemoryStore, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index(photos, "g", store, FakeEncoder())
    before = stored_rows(store, "g")
    changed = min(photos.iterdir())
    os.utime(changed, ns=(1, 10**18))

    def unreachable(_: object) -> bytes:
        raise ImageError(ImageFailure.UNREACHABLE, "no answer")

    with monkeypatch.context() as patch:
        patch.setattr(local, "read_bytes", unreachable)
        report = index(photos, "g", store, FakeEncoder())
    assert (report.unchanged, report.failed) == (19, {"unreachable": 1})
    assert stored_rows(store, "g") == before
    assert index(photos, "g", store, FakeEncoder()).unchanged == 20


def test_permanent_read_errors_are_not_retried(
    store: MemoryStore, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (photos / "folder.jpg").mkdir()
    (photos / "link.jpg").symlink_to("gone")

    def no_pause(_: float) -> None:
        raise AssertionError("nothing to wait for")

    monkeypatch.setattr("reir_ingestion.retries.time.sleep", no_pause)
    report = index(photos, "g", store, FakeEncoder())
    assert report.failed == {"missing": 1}
    with pytest.raises(ImageError, match="unreadable"):
        read_bytes(photos / "folder.jpg")
