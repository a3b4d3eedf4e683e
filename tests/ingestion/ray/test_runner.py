"""Indexing on a real Ray gives the rows, counts and errors of the local runner."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from ray.data import DataContext

from reir.errors import CheckpointError, ConfigError, SourceError
from reir.index_report import IndexProgress, IndexReport
from reir.records import Instances, RgbImage
from reir.store import InstanceStore, open_store
from reir_ingestion import stages
from reir_ingestion.pipeline import IndexOptions, index
from reir_ingestion.ray.blocks import Batch, list_batches
from reir_ingestion.ray.runner import EncoderPoolOptions, ListingDatasource, index_on_ray
from reir_ingestion.sources import open_source
from reir_ingestion.stages import Job
from reir_testing import FakeEncoder
from reir_testing.ingestion import (
    CrashOnceEncoder,
    RecordBuffer,
    stored_rows,
    write_hostile_files,
    write_scenes,
)

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]

OF_ONE_RUN = {"gallery", "seconds", "stage_seconds", "peak_rss_bytes"}


class BrokenEncoder(FakeEncoder):
    def encode_images(self, images: Sequence[RgbImage]) -> list[Instances]:
        raise RuntimeError(f"device lost with {len(images)} images")


@pytest.fixture
def location(tmp_path: Path) -> str:
    return str(tmp_path / "store")


@pytest.fixture
def store(location: str) -> Iterator[InstanceStore]:
    store = open_store(location)
    yield store
    store.close()


def counts(report: IndexReport) -> dict[str, Any]:
    return {name: value for name, value in asdict(report).items() if name not in OF_ONE_RUN}


def test_both_runners_write_the_same_gallery(
    store: InstanceStore, location: str, tmp_path: Path
) -> None:
    folder = tmp_path / "photos"
    paths = write_scenes(folder, 24)
    hostile = write_hostile_files(folder, 20)
    options = IndexOptions(batch_size=7, prune=True)

    def run_both() -> IndexReport:
        here = index(folder, "here", store, FakeEncoder(), options=options)
        there = index_on_ray(folder, "there", location, FakeEncoder, options=options)
        assert counts(there) == counts(here)
        assert there.stage_seconds.keys() == here.stage_seconds.keys()
        assert stored_rows(store, "there") == stored_rows(store, "here")
        return there

    first = run_both()
    assert (first.new, first.num_listed, first.num_images) == (29, 44, 44)
    assert all(first.stage_seconds.values())

    os.utime(paths[3], ns=(1, 10**18))
    paths[0].write_bytes(paths[5].read_bytes())
    paths[1].unlink()
    paths[2].write_bytes(b"")
    Path(hostile[0].path).write_bytes(paths[6].read_bytes())
    write_scenes(folder / "more", 3, seed=8)
    second = run_both()
    assert (second.new, second.changed, second.removed, second.num_images) == (3, 2, 1, 46)
    (info,) = store.versions("there")
    assert info.num_images + store.num_stored("there", info.name) == len(
        stored_rows(store, "there")
    )


def test_an_encoder_that_dies_repeats_its_batch(
    store: InstanceStore, location: str, photos: Path, tmp_path: Path
) -> None:
    settings = pickle.dumps(DataContext.get_current())
    seen: list[IndexProgress] = []
    load = partial(CrashOnceEncoder, tmp_path / "died")
    options = IndexOptions(batch_size=3)
    report = index_on_ray(photos, "there", location, load, options=options, progress=seen.append)
    assert (tmp_path / "died").exists()
    assert (report.new, report.read, report.num_images) == (20, 20, 20)
    index(photos, "here", store, FakeEncoder())
    assert stored_rows(store, "there") == stored_rows(store, "here")
    assert (seen[-1].done, seen[-1].total, seen[-1].failed) == (20, 20, 0)
    assert pickle.dumps(DataContext.get_current()) == settings, "they are of the whole process"


def test_records_add_up_to_the_report(location: str, photos: Path) -> None:
    def images(sink: RecordBuffer, event: str) -> int:
        return sum(each["images"] for each in sink.of(event))

    sink, again = RecordBuffer(), RecordBuffer()
    report = index_on_ray(photos, "g", location, FakeEncoder, sinks=[sink])
    assert (images(sink, "batch"), images(sink, "unchanged")) == (report.new, 0)
    for stage in ("read", "decode", "encode"):  # the driver lists and stores, too
        spent_s = sum(each["stage_seconds"][stage] for each in sink.records)
        assert spent_s == pytest.approx(report.stage_seconds[stage])
    (photos / "bad.jpg").write_bytes(b"x")
    index_on_ray(photos, "g", location, FakeEncoder)
    report = index_on_ray(photos, "g", location, FakeEncoder, sinks=[again])
    assert (report.unchanged, report.failed_before) == (20, 1)
    assert (images(again, "batch"), images(again, "unchanged")) == (0, 21)


def test_a_model_that_refuses_everything_stops_the_job(
    location: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_scenes(tmp_path / "many", stages.MAX_CONSECUTIVE_REFUSALS)
    with pytest.raises(CheckpointError, match=r"refused 100 images in a row.*device lost"):
        index_on_ray(tmp_path / "many", "g", location, BrokenEncoder)


def test_invalid_arguments_raise_at_once(
    store: InstanceStore, location: str, photos: Path, tmp_path: Path
) -> None:
    with pytest.raises(SourceError, match="does not exist"):
        index_on_ray(tmp_path / "none", "g", location, FakeEncoder)
    with pytest.raises(ConfigError, match="Ray cannot index into memory:"):
        index_on_ray(photos, "g", "memory:", FakeEncoder)
    with pytest.raises(ConfigError, match=r"--num-gpus 2: this machine has 0 GPUs"):
        index_on_ray(photos, "g", location, FakeEncoder, pool=EncoderPoolOptions(num_gpus=2))
    with pytest.raises(ConfigError, match="num_workers must be 1 or more, got 0"):
        EncoderPoolOptions(max_encoders=0)
    with pytest.raises(ConfigError, match=r"num_gpus must be 0 or more, got -0.5"):
        EncoderPoolOptions(num_gpus=-0.5)
    assert store.galleries() == []


def test_the_listing_yields_blocks_with_their_counts(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "LEDGER_CHUNK", 8)
    closed = photos / "zz"
    closed.mkdir()
    scandir = os.scandir

    def refuse(path: Any) -> Any:
        if os.fsdecode(path) == str(closed):
            raise PermissionError(13, "no permission")
        return scandir(path)

    monkeypatch.setattr("os.scandir", refuse)
    job = Job(open_source(photos), "g", "v", IndexOptions())
    batches = [Batch.from_block(block) for block in list_batches(job)]
    assert [len(each.items) for each in batches] == [8, 8, 4, 0]
    assert sum(each.counters.counts()["unlisted"] for each in batches) == 1
    (task,) = ListingDatasource(job).get_read_tasks(1)
    assert [len(Batch.from_block(block).items) for block in task()] == [8, 8, 4, 0]
