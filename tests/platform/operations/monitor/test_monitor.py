"""The monitor measures a real store, and serves what it measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from reir.errors import ConfigError, StoreUnavailable
from reir.images.decode import canonical_uri
from reir.operations.canary import Canary, add_canaries
from reir.operations.gate.recall import search_recall
from reir.operations.lease import hold_lease
from reir.operations.monitor import checks, exporter, searches
from reir.operations.monitor.checks import CHECKS, GalleryFailure, MonitoredSystem
from reir.operations.monitor.exporter import Monitor, serve_metrics
from reir.operations.monitor.metrics import METRICS, RECALL, STORE_UP, MonitorCollector, Sample
from reir.operations.monitor.searches import LoggedSearches
from reir.operations.schedule.runs import run_schedule
from reir.operations.schedule.schedules import Schedule, add_schedule, remove_schedule
from reir.store import InstanceStore, open_store
from reir.store.memory import MemoryStore
from reir_ingestion.known_sources import known_source
from reir_ingestion.pipeline import index
from reir_ingestion.reindex.job import State
from reir_ingestion.sources import SourceOptions, open_source
from reir_ingestion.stages import IndexOptions
from reir_testing import FakeEncoder
from reir_testing.fake_models import COLORS, FAKE_KINDS, save_photos

G = "photos"


@pytest.fixture(autouse=True)
def fake_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reir.encoders.KINDS", FAKE_KINDS)


@pytest.fixture
def system(tmp_path: Path) -> Iterator[MonitoredSystem]:
    """An embedded store with a gallery, canaries, a failed photo and a schedule."""
    photos = save_photos(tmp_path / "photos")
    (photos / "bad.jpg").write_bytes(b"no image")
    folder = tmp_path / "store"
    with closing(open_store(str(folder))) as store:
        options = IndexOptions(origin=known_source(photos, SourceOptions()))
        index(open_source(photos), G, store, FakeEncoder(), options=options)
        canaries = [
            Canary(expression=f"the {color} one", uri=canonical_uri(photos / f"{color}.png"))
            for color in COLORS
        ]
        wrong = Canary(expression="the blue one", uri=canonical_uri(photos / "red.png"))
        absent = Canary(expression="the white one", absent=True)
        add_canaries(store, G, [*canaries, wrong, absent])
        yield MonitoredSystem(
            store=store,
            store_folder=folder,
            galleries=None,
            searches=LoggedSearches(tmp_path / "searches"),
            schedules=(tmp_path / "schedules.yaml", tmp_path / "runs"),
        )


def values_of(collector: MonitorCollector) -> dict[str, float]:
    registry = CollectorRegistry()
    registry.register(collector)
    return {
        ",".join([sample.name, *sample.labels.values()]): sample.value
        for family in registry.collect()
        for sample in family.samples
    }


def measure(system: MonitoredSystem) -> dict[str, float]:
    monitor = Monitor(system, interval_s=60, deep_interval_s=900)
    assert monitor.run_due() == list(CHECKS)
    return values_of(monitor.collector)


def log_searches(folder: Path, *presence: float | None) -> None:
    """Write a search log, oldest first."""
    (folder / G).mkdir(parents=True, exist_ok=True)
    lines: list[dict[str, object]] = [
        {
            "time": f"2026-11-24T00:00:00.{number:06d}+00:00",
            "event": "search",
            "request_id": "x",
            "version": "v",
            "tenant": "",
            "expression": f"the {COLORS[number % len(COLORS)]} one",
            "k": 10,
            "where": None,
            "presence": value,
            "found": True,
            "hits": [],
        }
        for number, value in enumerate(presence)
    ]
    path = folder / G / "2026-11-24-host-1.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


# ------------------------------------------------------------------------------------ the checks


def test_a_healthy_system(system: MonitoredSystem) -> None:
    values = measure(system)
    prefix = "reir_monitor_"
    assert values[f"{prefix}store_up"] == 1
    assert 0 < values[f"{prefix}store_size_bytes"] < values[f"{prefix}store_free_bytes"]
    assert values[f"{prefix}store_free_bytes"] < values[f"{prefix}store_disk_bytes"]
    assert values[f"{prefix}photos,{G},indexed"] == len(COLORS)
    assert values[f"{prefix}photos,{G},failed"] == 1
    assert values[f"{prefix}failed_photos,{G},not_an_image"] == 1
    assert values[f"{prefix}instances,{G}"] == len(COLORS)
    assert values[f"{prefix}versions,{G}"] == 1
    assert time.time() - values[f"{prefix}index_timestamp_seconds,{G}"] < 60
    assert values[f"{prefix}recall_ratio,{G}"] == 1
    assert values[f"{prefix}canary_br_ratio,{G},1"] == pytest.approx(
        len(COLORS) / (len(COLORS) + 1)
    )
    assert values[f"{prefix}canary_br_ratio,{G},10"] == 1
    assert values[f"{prefix}canary_absent_ratio,{G}"] == 0, "the fake model finds something always"
    assert values[f"{prefix}canaries,{G},present"] == len(COLORS) + 1
    assert values[f"{prefix}canaries,{G},absent"] == 1
    assert 0 < values[f"{prefix}search_latency_seconds,{G}"] < 5
    for check in CHECKS:
        assert values[f"{prefix}check_failed,{check}"] == 0


def test_a_search_that_returns_wrong_neighbors_lowers_the_recall(system: MonitoredSystem) -> None:
    """As with a damaged copy, whose vectors are not those of record."""

    class Damaged:
        def __getattr__(self, name: str) -> object:
            return getattr(system.store, name)

        def search(self, gallery, version, vectors, _limit, **options):  # type: ignore[no-untyped-def]
            wrong = np.roll(vectors, 3, axis=1)
            return system.store.search(gallery, version, wrong, 4, **options)

    values = measure(replace(system, store=Damaged()))  # type: ignore[arg-type]
    assert values[f"reir_monitor_recall_ratio,{G}"] < 0.6


def test_recall_is_measured_with_what_users_searched_for(
    system: MonitoredSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    original = search_recall

    def record(store: InstanceStore, gallery: str, version: str, queries: object) -> list[float]:
        asked.append(len(queries))  # type: ignore[arg-type]
        return original(store, gallery, version, queries)  # type: ignore[arg-type]

    monkeypatch.setattr(checks, "search_recall", record)
    measure(system)
    assert asked == []
    assert system.searches is not None
    log_searches(system.searches.folder, *[0.5] * 20)
    measure(system)
    assert asked == [len(COLORS)]


def test_presence_of_recent_searches_is_compared_with_those_before(
    system: MonitoredSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(searches, "RECENT", 60)
    assert system.searches is not None
    log_searches(system.searches.folder, *[0.8] * 70, None, *[0.3] * 60)
    values = measure(system)
    assert values[f"reir_monitor_presence_mean_ratio,{G},recent"] == pytest.approx(0.3)
    assert values[f"reir_monitor_presence_mean_ratio,{G},before"] == pytest.approx(0.8)
    log_searches(system.searches.folder, *[0.3] * 40)
    assert not [key for key in measure(system) if "presence" in key]


def test_a_store_whose_folder_is_gone_is_down(system: MonitoredSystem) -> None:
    assert system.store_folder is not None
    away = system.store_folder.with_name("away")
    system.store_folder.rename(away)
    samples = {each.metric: each.value for each in checks.check_store(system)}
    assert samples == {STORE_UP: 0}, "its server still answers, from open files"
    away.rename(system.store_folder)
    samples = {each.metric: each.value for each in checks.check_store(system)}
    assert samples[STORE_UP] == 1


def test_backups_and_reindexing_jobs_are_told(system: MonitoredSystem) -> None:
    system.store.put_document("backup", f"{G}/v1", {"ended_s": 100.0})
    system.store.put_document("backup", f"{G}/v2", {"ended_s": 300.0})
    later_s = time.time() + 1000
    system.store.put_document("reindex", G, {"state": "done", "updated_s": later_s})
    values = measure(system)
    assert values[f"reir_monitor_backup_timestamp_seconds,{G}"] == 300
    assert values[f"reir_monitor_reindex_state,{G},done"] == 1
    assert values[f"reir_monitor_index_timestamp_seconds,{G}"] == later_s
    system.store.put_document("reindex", G, {"state": "checking", "updated_s": later_s})
    values = measure(system)
    assert values[f"reir_monitor_reindex_timestamp_seconds,{G}"] == later_s
    assert values[f"reir_monitor_index_timestamp_seconds,{G}"] < later_s


def test_a_reindexing_job_that_nobody_works_on_is_told(system: MonitoredSystem) -> None:
    stopped = f"reir_monitor_reindex_stopped,{G}"
    for state in State:
        system.store.put_document("reindex", G, {"state": state.value, "updated_s": 1.0})
        assert measure(system)[stopped] == (not state.is_end)
        with hold_lease(system.store, f"reindex/{G}"):
            assert measure(system)[stopped] == 0


def test_schedules_are_told(system: MonitoredSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not [key for key in measure(system) if "schedule" in key and "check" not in key]
    monkeypatch.setattr(
        "reir.operations.schedule.runs._REIR", [sys.executable, "-c", "exit('data' != 'x')"]
    )
    assert system.schedules is not None
    file, folder = system.schedules
    nightly = Schedule(command=("data", "check"), cron="0 3 * * *", added_s=1_700_000_000.0)
    add_schedule(file, "nightly", nightly)
    run_schedule(folder, "nightly", nightly)
    values = measure(system)
    assert values["reir_monitor_scheduler_up"] == 0
    assert values["reir_monitor_schedule_failed,nightly"] == 1
    assert values["reir_monitor_schedule_success_timestamp_seconds,nightly"] == 1_700_000_000
    assert values["reir_monitor_schedule_due_timestamp_seconds,nightly"] < time.time()
    remove_schedule(file, "nightly")
    add_schedule(file, "nightly", nightly.model_copy(update={"added_s": time.time()}))
    assert measure(system)["reir_monitor_schedule_failed,nightly"] == 0, "another schedule failed"


def test_a_store_that_is_gone_is_told_and_other_values_stay(system: MonitoredSystem) -> None:
    class Gone:
        def __getattr__(self, name: str) -> object:
            raise StoreUnavailable("milvus:19530", "connection refused")

    monitor = Monitor(system, interval_s=0, deep_interval_s=900)
    monitor.run_due()
    monitor._system = replace(system, store=Gone())  # type: ignore[arg-type]
    monitor.run_due()
    values = values_of(monitor.collector)
    assert values["reir_monitor_store_up"] == 0
    assert values["reir_monitor_check_failed,galleries"] == 1
    assert values["reir_monitor_check_failed,store"] == 0
    assert values[f"reir_monitor_photos,{G},indexed"] == len(COLORS)


def test_a_gallery_that_cannot_be_measured_hides_no_other(
    system: MonitoredSystem, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    photos = save_photos(tmp_path / "more")
    index(open_source(photos), "album", system.store, FakeEncoder())
    canary = Canary(expression="the red one", uri=canonical_uri(photos / "red.png"))
    add_canaries(system.store, "album", [canary])
    monitor = Monitor(system, interval_s=0, deep_interval_s=0)
    monitor.run_due()
    assert system.searches is not None
    log_searches(system.searches.folder, *[0.8] * 60)
    (system.searches.folder / "album").mkdir()
    (system.searches.folder / "album" / "2026-11-24-host-1.jsonl").write_text("garbage\n")
    add_canaries(system.store, G, [Canary(expression="the green thing", absent=True)])
    add_canaries(system.store, "album", [Canary(expression="x" * 600, absent=True)])
    system.store.put_document("backup", "album/v1", {})  # of a release that did not note the time
    system.store.put_document("backup", f"{G}/v1", {"ended_s": 100.0})
    monitor.run_due()
    values, prefix = values_of(monitor.collector), "reir_monitor_"
    assert values[f"{prefix}presence_mean_ratio,{G},recent"] == pytest.approx(0.8)
    assert values[f"{prefix}canaries,{G},absent"] == 2
    assert values[f"{prefix}backup_timestamp_seconds,{G}"] == 100
    assert values[f"{prefix}canaries,album,present"] == 1, "the last value stays"
    assert values[f"{prefix}canaries,album,absent"] == 0, "the last value stays"
    for check in ("galleries", "searches", "quality"):
        assert values[f"{prefix}check_failed,{check}"] == 1
        assert f"check {check} failed for gallery album: " in caplog.text
    assert f"for gallery {G}" not in caplog.text


class UnansweringStore(MemoryStore):
    """A store that does not answer questions about versions.

    Attributes:
        is_down: whether it does not answer any others either, from the first of these on.
        asked: galleries whose versions were asked for.
    """

    def __init__(self, *, is_down: bool) -> None:
        super().__init__()
        self.is_down, self.asked = is_down, list[str]()

    def galleries(self) -> list[str]:
        if self.is_down and self.asked:
            raise StoreUnavailable("milvus:19530", "connection refused")
        return ["album", "photos"]

    def live_version(self, gallery: str) -> str:
        self.asked.append(gallery)
        if self.is_down or gallery == "album":
            raise StoreUnavailable("milvus:19530", "deadline exceeded")
        return "v1"


def test_a_store_that_is_down_is_not_asked_about_every_gallery(system: MonitoredSystem) -> None:
    """Each question is tried several times, and nothing else is measured meanwhile."""
    store = UnansweringStore(is_down=True)
    with pytest.raises(StoreUnavailable):
        list(checks.check_searches(replace(system, store=store)))
    assert store.asked == ["album"]


def test_a_gallery_whose_questions_take_too_long_hides_no_other(system: MonitoredSystem) -> None:
    store = UnansweringStore(is_down=False)
    (failure,) = checks.check_searches(replace(system, store=store, searches=None))
    assert isinstance(failure, GalleryFailure)
    assert failure.gallery == "album"
    assert store.asked == ["album", "photos"]


def test_a_bug_in_one_check_does_not_end_the_monitor(
    system: MonitoredSystem, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: MonitoredSystem) -> Iterator[Sample]:
        raise KeyError("state")

    monkeypatch.setattr(exporter, "CHECKS", {**CHECKS, "schedules": fail})
    values = measure(system)
    assert values["reir_monitor_check_failed,schedules"] == 1
    assert values["reir_monitor_check_failed,quality"] == 0
    assert "check schedules failed: " in caplog.text
    assert "Traceback" in caplog.text


def test_series_of_a_deleted_gallery_disappear(system: MonitoredSystem) -> None:
    monitor = Monitor(system, interval_s=0, deep_interval_s=0)
    monitor.run_due()
    system.store.drop_gallery(G)
    monitor.run_due()
    assert not [key for key in values_of(monitor.collector) if f",{G}" in key]


def test_only_the_galleries_that_were_named_are_measured(system: MonitoredSystem) -> None:
    assert not [key for key in measure(replace(system, galleries=("cats",))) if f",{G}" in key]


# -------------------------------------------------------------------------------------- the loop


def test_checks_run_at_their_intervals(system: MonitoredSystem) -> None:
    now = [1000.0]
    monitor = Monitor(system, interval_s=60, deep_interval_s=150, clock=lambda: now[0])
    quick = [name for name in CHECKS if name != "quality"]
    assert monitor.run_due() == [*quick, "quality"]
    assert monitor.run_due() == []
    now[0] += 60
    assert monitor.run_due() == quick
    now[0] += 90
    assert monitor.run_due() == [*quick, "quality"]


def test_labels_are_checked() -> None:
    with pytest.raises(ValueError, match="recall_ratio has labels"):
        RECALL.sample(1.0)
    with pytest.raises(ValueError, match="store_up has labels"):
        STORE_UP.sample(1.0, "photos")


def test_every_metric_is_exported_even_without_a_value() -> None:
    names = {family.name for family in MonitorCollector().collect()}
    assert names == {metric.name for metric in METRICS}


def test_metrics_are_served_until_the_server_is_closed() -> None:
    collector = MonitorCollector()
    collector.replace("x", [STORE_UP.sample(1)])
    port, close = serve_metrics(collector, "127.0.0.1", 0)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        assert b"reir_monitor_store_up 1.0" in answer.read()
    with pytest.raises(ConfigError, match=f"cannot serve metrics on 127.0.0.1:{port}"):
        serve_metrics(collector, "127.0.0.1", port)
    close()
    exporter.serve_metrics(collector, "127.0.0.1", port)[1]()


def test_the_command_prints_all_values_once(tmp_path: Path) -> None:
    program = "from reir.cli.main import main; main()"
    environment = {**os.environ, "REIR_HOME": str(tmp_path), "REIR_STORE": str(tmp_path / "store")}
    shown = subprocess.run(
        [sys.executable, "-c", program, "monitor", "--once", "--json"],
        capture_output=True,
        env=environment,
        check=True,
    )
    values = {each["metric"]: each["value"] for each in json.loads(shown.stdout)}
    assert values["reir_monitor_store_up"] == 1
