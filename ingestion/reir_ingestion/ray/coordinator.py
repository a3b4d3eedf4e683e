"""The coordinator of a Ray job as an actor, and the two stages that call it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa
import ray
from ray.data import Datasink
from ray.data.datasource import WriteResult

from reir.sinks import Record
from reir_ingestion.loading import LoadedImage
from reir_ingestion.ray.blocks import Batch, join_batches, worker_store
from reir_ingestion.ray.cluster import translate_ray_errors
from reir_ingestion.report import RunCounters
from reir_ingestion.stages import Coordinator, EncodedBatch, Job


class CoordinatorActor:
    """`Coordinator` in a process of its own, with the counts and records for the driver.

    If the process dies, Ray starts it again, and it reads what is in the store. Equal photos that
    were in flight at that moment may then both be encoded.
    """

    def __init__(self, job: Job, location: str) -> None:
        self._coordinator = Coordinator(job, worker_store(location))
        self._written, self._records = RunCounters(), _RecordBuffer()

    def mark_duplicates(self, batch: Sequence[LoadedImage]) -> list[LoadedImage]:
        """See `Coordinator.mark_duplicates`."""
        # The caller measures the time; these counters are dropped.
        return self._coordinator.mark_duplicates(batch, RunCounters())

    def write(self, encoded: EncodedBatch, counters: RunCounters) -> RunCounters:
        """Write a batch; return its counts from all stages."""
        # Counters lose their sinks when they are pickled, so the record of this batch goes here.
        counters.sinks = (self._records,)
        looked_up = counters.counts()
        self._coordinator.write(encoded, counters)
        # The ledger look-up, which counted them, had no sinks.
        if num_unchanged := looked_up["unchanged"] + looked_up["failed_before"]:
            counters.emit("unchanged", images=num_unchanged, read=False)
        self._written.add(counters)
        return counters

    def drain(self) -> tuple[RunCounters, list[Record]]:
        """Return the counts and records since the last call."""
        return self._written.drain(), self._records.drain()


class _RecordBuffer:
    """A sink that keeps its records until they are drained."""

    def __init__(self) -> None:
        self._records: deque[Record] = deque()

    def write(self, record: Record) -> None:
        """Keep one record."""
        self._records.append(record)

    def close(self) -> None:
        """Do nothing; every sink has this method."""

    def drain(self) -> list[Record]:
        """Return the records so far, and forget them."""
        # Writers may append meanwhile. `popleft` is safe between threads; `clear` would lose what
        # they add.
        return [self._records.popleft() for _ in range(len(self._records))]


def mark_duplicates_in_batch(block: pa.Table, *, coordinator: Any) -> pa.Table:
    """Return the block with its duplicates marked and without their pixels."""
    batch = Batch.from_block(block)
    # The coordinator only checks whether there are pixels, so one pixel per image is sent to it.
    light = [
        each if each.pixels is None else replace(each, pixels=each.pixels[:1, :1].copy())
        for each in batch.items
    ]
    with batch.counters.stage("list"), translate_ray_errors():
        answers = ray.get(coordinator.mark_duplicates.remote(light))
    items = [
        replace(each, pixels=None, same_as=answer.same_as) if answer.same_as else each
        for each, answer in zip(batch.items, answers, strict=True)
    ]
    return Batch(items, batch.counters).to_block()


class StoreDatasink(Datasink[RunCounters]):  # type: ignore[misc]  # Ray has no types
    """Passes encoded batches to the coordinator, which writes them.

    Args:
        coordinator: handle of a `CoordinatorActor`.
        batches_per_write: smallest number of batches that are written together.

    Attributes:
        counters: after the run, the counts of all its tasks.
    """

    def __init__(self, coordinator: Any, batches_per_write: int) -> None:
        self._coordinator = coordinator
        self._batches_per_write = batches_per_write
        self.counters = RunCounters()

    @property
    def min_rows_per_write(self) -> int | None:
        """How many rows, which are batches, Ray bundles for one write; None leaves it to Ray."""
        return self._batches_per_write if self._batches_per_write > 1 else None

    def write(self, blocks: Iterable[pa.Table], ctx: Any) -> RunCounters:  # noqa: ARG002 - part of Ray's interface
        """Write blocks; return their counts from all stages."""
        total = RunCounters()
        for batch in join_batches(map(Batch.from_block, blocks), self._batches_per_write):
            with translate_ray_errors():
                total.add(ray.get(self._coordinator.write.remote(batch.items, batch.counters)))
        return total

    def on_write_complete(self, write_result: WriteResult[RunCounters]) -> None:
        """Add up the counts that the tasks returned."""
        # Ray passes one result per block, even if a task ran twice, so every image counts once.
        for counters in write_result.write_returns:
            self.counters.add(counters)
