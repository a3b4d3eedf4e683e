"""Counting a run from many threads, and showing what came out."""

from __future__ import annotations

import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from rich.console import Console

from reir.records import ImageRecord
from reir_ingestion.report import MAX_WARNINGS, IndexReport, Progress, Tally


def row(reason: str = "", num_instances: int = 0, **others: Any) -> ImageRecord:
    status: Any = "failed" if reason else "indexed"
    return ImageRecord(
        image_id="x",
        uri="file:///x",
        status=status,
        reason=reason,
        num_instances=num_instances,
        **others,
    )


def report(**changes: Any) -> IndexReport:
    counts = Tally().counts() | {"seconds": 2.0, "peak_rss_bytes": 50 * 2**20} | changes
    fixed = {
        "gallery": "pets",
        "version": "abc",
        "num_images": 7,
        "num_instances": 30,
        "kept_versions": {},
    }
    return IndexReport(
        **{**fixed, "missing": 0, "removed": 0, "merged": 0, "look_alikes": 0, **counts}
    )


def test_every_image_is_counted_once() -> None:
    tally = Tally()
    images = [row(num_instances=3, size_bytes=9), row("empty"), row(same_as="another")]
    tally.written(images, ["new", "new", "changed"])
    tally.skipped([row(), row("empty"), row("truncated")])
    tally.skipped([row()], read=True)
    found = report(**tally.counts())
    assert (found.new, found.changed, found.unchanged) == (1, 1, 2)
    assert found.failed == {"empty": 2, "truncated": 1}
    assert (found.failed_before, found.instances, found.read) == (2, 3, 4)
    assert found.num_listed == 7


def test_progress_is_told_after_each_change() -> None:
    seen: list[Progress] = []
    tally = Tally(seen.append)
    tally.written([row(), row("empty")], ["new", "new"])
    tally.listed(4)
    tally.skipped([row("empty")])
    assert seen == [Progress(2, None, 1), Progress(2, 4, 1), Progress(3, 4, 2)]


def test_the_shares_of_the_stages_add_up() -> None:
    seen: list[Progress] = []
    tally = Tally(seen.append)
    tally._seconds |= {"list": 1.0, "read": 1.0, "decode": 1.0, "encode": 177.0}
    tally.written([row()], ["new"])
    (now,) = seen
    assert sum(now.shares.values()) == pytest.approx(1)
    assert now.percent == {"list": 1, "read": 0, "decode": 1, "encode": 98, "store": 0}
    assert sum(now.percent.values()) == 100
    assert Progress(0, None, 0).percent == {}


def test_counts_from_many_threads_add_up() -> None:
    seen: list[int] = []
    tally = Tally(lambda now: seen.append(now.done))

    def work(_: int) -> None:
        with tally.stage("decode"):
            tally.written([row(num_instances=2)], ["new"])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(400)))
    counts = tally.counts()
    assert (counts["new"], counts["instances"], counts["read"]) == (400, 800, 400)
    assert seen == list(range(1, 401))
    assert counts["stage_seconds"]["decode"] > 0
    assert counts["stage_seconds"]["store"] == 0


def counted() -> Tally:
    tally = Tally()
    images = [row(num_instances=3, size_bytes=9), row("empty"), row(same_as="another")]
    tally.written(images, ["new", "new", "changed"])
    tally.skipped([row(), row("empty")], read=True)
    tally.not_listed("folder", OSError("no"))
    with tally.stage("decode"), tally.stage("store"):
        pass
    return tally


def numbers(counts: dict[str, Any]) -> dict[str, Any]:
    """The counts without clock and memory, every number by a name of its own."""
    flat: dict[str, Any] = {}
    for name, value in counts.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{key}": each for key, each in numbers(value).items()}
        elif name not in ("seconds", "peak_rss_bytes"):
            flat[name] = value
    return flat


def test_tallies_of_other_processes_add_up_count_by_count() -> None:
    one = counted()
    sent = pickle.loads(pickle.dumps(one))
    assert numbers(sent.counts()) == numbers(one.counts())
    assert sum(value == 0 for value in numbers(one.counts()).values()) == 3  # stages not entered
    sent.add(one)
    assert numbers(sent.counts()) == {k: 2 * v for k, v in numbers(one.counts()).items()}
    assert numbers(one.counts()) == numbers(pickle.loads(pickle.dumps(one)).counts())


def test_what_is_taken_is_counted_once() -> None:
    seen: list[Progress] = []
    tally, total = counted(), Tally(seen.append)
    expected = numbers(tally.counts())
    taken = tally.take()
    assert numbers(taken.counts()) == expected
    assert numbers(tally.counts()) == numbers(Tally().counts())
    tally.written([row()], ["new"])
    assert numbers(taken.counts()) == expected
    for each in (taken, tally):
        total.add(each)
    assert total.counts()["new"] == expected["new"] + 1
    assert [each.done for each in seen] == [5, 6]


def test_rate() -> None:
    assert report(read=10, seconds=4.0).images_per_s == 2.5
    assert report(read=0, seconds=0.0).images_per_s == 0.0


def test_json_holds_every_figure() -> None:
    found = report(new=3, failed={"empty": 2}, read=5, kept_versions={"old": 9})
    values = json.loads(json.dumps(found.to_dict()))
    assert values["failed"] == {"empty": 2}
    assert values["kept_versions"] == {"old": 9}
    assert (values["num_failed"], values["num_listed"], values["images_per_s"]) == (2, 5, 2.5)
    assert set(values["stage_seconds"]) == {"list", "read", "decode", "encode", "store"}


def shown(found: IndexReport) -> str:
    console = Console(width=200, record=True, file=None, quiet=False, force_terminal=False)
    with console.capture() as capture:
        console.print(found.table())
    return capture.get()


def test_the_table_shows_what_there_is_and_nothing_else() -> None:
    plain = shown(report(new=1234))
    assert "pets" in plain
    assert "1,234" in plain
    for absent in ("gone from source", "removed", "not listed", "known before"):
        assert absent not in plain
    full = shown(report(failed={"empty": 4}, failed_before=3, missing=2, removed=5, unlisted=1))
    for present in ("empty", "3 known before", "--prune removes them", "removed", "not listed"):
        assert present in full


def test_parts_that_cannot_be_listed_are_counted_and_some_are_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tally = Tally()
    for number in range(100):
        tally.not_listed(f"list.jsonl line {number}\n", ValueError("no JSON"))
    assert tally.counts()["unlisted"] == 100
    assert len(caplog.messages) == MAX_WARNINGS
    assert caplog.messages[0] == "'list.jsonl line 0\\n' cannot be listed: no JSON"
