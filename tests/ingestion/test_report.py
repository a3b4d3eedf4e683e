"""Counters of a run and the report at its end."""

from __future__ import annotations

import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from rich.console import Console

from reir.index_report import IndexProgress, IndexReport
from reir.records import ImageRecord
from reir_ingestion.report import MAX_WARNINGS, RunCounters
from reir_testing.ingestion import RecordBuffer


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
    counts = RunCounters().counts() | {"seconds": 2.0, "peak_rss_bytes": 50 * 2**20} | changes
    fixed = {
        "gallery": "pets",
        "version": "abc",
        "num_images": 7,
        "num_instances": 30,
        "kept_versions": {},
    }
    return IndexReport(
        **{**fixed, "missing": 0, "removed": 0, "merged": 0, "near_duplicates": 0, **counts}
    )


def test_every_image_is_counted_once() -> None:
    counters = RunCounters()
    images = [row(num_instances=3, size_bytes=9), row("empty"), row(same_as="another")]
    counters.add_written(images, ["new", "new", "changed"])
    counters.add_unchanged([row(), row("empty"), row("truncated")])
    counters.add_unchanged([row()], read=True)
    found = report(**counters.counts())
    assert (found.new, found.changed, found.unchanged) == (1, 1, 2)
    assert found.failed == {"empty": 2, "truncated": 1}
    assert (found.failed_before, found.instances, found.read) == (2, 3, 4)
    assert found.num_listed == 7
    counters.add_erased(2)
    assert report(**counters.counts()).num_listed == 9


def test_progress_is_reported_after_each_change() -> None:
    seen: list[IndexProgress] = []
    counters = RunCounters(seen.append)
    counters.add_written([row(), row("empty")], ["new", "new"])
    counters.set_total(4)
    counters.add_unchanged([row("empty")])
    assert seen == [IndexProgress(2, None, 1), IndexProgress(2, 4, 1), IndexProgress(3, 4, 2)]


def test_the_shares_of_the_stages_add_up() -> None:
    seen: list[IndexProgress] = []
    counters = RunCounters(seen.append)
    counters._seconds |= {"list": 1.0, "read": 1.0, "decode": 1.0, "encode": 177.0}
    counters.add_written([row()], ["new"])
    (now,) = seen
    assert sum(now.shares.values()) == pytest.approx(1)
    assert now.percent == {"list": 1, "read": 0, "decode": 1, "encode": 98, "store": 0}
    assert sum(now.percent.values()) == 100
    assert IndexProgress(0, None, 0).percent == {}


def test_counts_from_many_threads_add_up() -> None:
    seen: list[int] = []
    counters = RunCounters(lambda now: seen.append(now.done))

    def work(_: int) -> None:
        with counters.stage("decode"):
            counters.add_written([row(num_instances=2)], ["new"])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(400)))
    counts = counters.counts()
    assert (counts["new"], counts["instances"], counts["read"]) == (400, 800, 400)
    assert seen == list(range(1, 401))
    assert counts["stage_seconds"]["decode"] > 0
    assert counts["stage_seconds"]["store"] == 0


def counted() -> RunCounters:
    counters = RunCounters()
    images = [row(num_instances=3, size_bytes=9), row("empty"), row(same_as="another")]
    counters.add_written(images, ["new", "new", "changed"])
    counters.add_unchanged([row(), row("empty")], read=True)
    counters.add_unlisted("folder", OSError("no"))
    counters.add_erased(3)
    with counters.stage("decode"), counters.stage("store"):
        pass
    return counters


def numbers(counts: dict[str, Any]) -> dict[str, Any]:
    """The counts without clock and memory, every number by a name of its own."""
    flat: dict[str, Any] = {}
    for name, value in counts.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{key}": each for key, each in numbers(value).items()}
        elif name not in ("seconds", "peak_rss_bytes"):
            flat[name] = value
    return flat


def test_counters_of_other_processes_add_up() -> None:
    one = counted()
    sent = pickle.loads(pickle.dumps(one))
    assert numbers(sent.counts()) == numbers(one.counts())
    assert sum(value == 0 for value in numbers(one.counts()).values()) == 3  # stages not entered
    sent.add(one)
    assert numbers(sent.counts()) == {k: 2 * v for k, v in numbers(one.counts()).items()}
    assert numbers(one.counts()) == numbers(pickle.loads(pickle.dumps(one)).counts())


def test_drained_counts_are_counted_once() -> None:
    seen: list[IndexProgress] = []
    counters, total = counted(), RunCounters(seen.append)
    expected = numbers(counters.counts())
    taken = counters.drain()
    assert numbers(taken.counts()) == expected
    assert numbers(counters.counts()) == numbers(RunCounters().counts())
    counters.add_written([row()], ["new"])
    assert numbers(taken.counts()) == expected
    for each in (taken, counters):
        total.add(each)
    assert total.counts()["new"] == expected["new"] + 1
    assert [each.done for each in seen] == [8, 9]


def test_seconds_of_another_process_are_emitted_once() -> None:
    elsewhere, buffer, sink = RunCounters(), RecordBuffer(), RecordBuffer()
    elsewhere.sinks = [buffer]
    elsewhere._seconds["decode"] = 0.5
    elsewhere.add_written([row()], ["new"])
    live = RunCounters(sinks=[sink])
    live.forward(buffer.records[0])
    live.set_total(2)  # another thread sends a record before the counts arrive
    live.add(elsewhere.drain())
    live._seconds["list"] = 1.0
    live.emit("end")
    assert [each["event"] for each in sink.records] == ["batch", "listed", "end"]
    for stage, spent_s in {"decode": 0.5, "list": 1.0}.items():
        assert sum(each["stage_seconds"][stage] for each in sink.records) == spent_s
    assert all(each >= 0 for record in sink.records for each in record["stage_seconds"].values())


def test_images_per_second() -> None:
    assert report(read=10, seconds=4.0).images_per_s == 2.5
    assert report(read=0, seconds=0.0).images_per_s == 0.0


def test_the_json_report_has_every_figure() -> None:
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


def test_the_table_has_only_rows_that_apply() -> None:
    plain = shown(report(new=1234))
    assert "pets" in plain
    assert "1,234" in plain
    for absent in ("gone from source", "removed", "not listed", "in an earlier run"):
        assert absent not in plain
    full = shown(report(failed={"empty": 4}, failed_before=3, missing=2, removed=5, unlisted=1))
    for present in (
        "empty",
        "3 in an earlier run",
        "--prune removes them",
        "removed",
        "not listed",
    ):
        assert present in full


def test_unlisted_parts_are_counted_and_some_get_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    counters = RunCounters()
    for number in range(100):
        counters.add_unlisted(f"list.jsonl line {number}\n", ValueError("no JSON"))
    assert counters.counts()["unlisted"] == 100
    assert len(caplog.messages) == MAX_WARNINGS
    assert caplog.messages[0] == "'list.jsonl line 0\\n' cannot be listed: no JSON"
