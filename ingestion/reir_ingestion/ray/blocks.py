"""The stages of indexing as functions of Ray Data blocks, each of which holds one batch.

This module does not import Ray; `ray/runner.py` builds the dataset from these functions.
"""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import pyarrow as pa

from reir.models.interfaces import InstanceEncoder
from reir.store import InstanceStore, open_store
from reir_ingestion.report import RunCounters
from reir_ingestion.stages import (
    EncodedBatch,
    Job,
    RefusalGuard,
    encode_batch,
    group_batches,
    image_loader,
    list_chunks,
    look_up,
)

_COLUMN = "batch"


@dataclass(frozen=True)
class Batch:
    """A batch on its way through the stages, with the counts of the stages that it has passed.

    The counts travel with the batch, so that a batch that is made twice is counted once.

    Attributes:
        items: files, images to read, or loaded images; an `EncodedBatch` after the model. May be
            empty.
        counters: counts of all stages so far.
    """

    items: Any
    counters: RunCounters

    def to_block(self) -> pa.Table:
        """Return a block of one row."""
        # Pickled, because Arrow has no type for pixels of several sizes. As `large_binary`, because
        # the offsets of plain `binary` end at 2 GiB.
        data = pa.array([pickle.dumps(self, protocol=pickle.HIGHEST_PROTOCOL)], pa.large_binary())
        return pa.table({_COLUMN: data})

    @staticmethod
    def from_block(block: pa.Table) -> Batch:
        """Return the batch in a block that a worker of this job made."""
        batch: Batch = pickle.loads(block[_COLUMN][0].as_buffer())
        return batch


def _to_blocks(parts: Iterable[Any], counters: RunCounters) -> Iterator[pa.Table]:
    """Yield at least one block: one per part, with the counts since the previous part."""
    empty = True
    for part in parts:
        yield Batch(part, counters.drain()).to_block()
        empty = False
    if empty:  # without a block, the counts would be lost
        yield Batch([], counters).to_block()


def list_batches(job: Job) -> Iterator[pa.Table]:
    """List the source; the last batch is empty and counts the folders that cannot be listed."""
    counters = RunCounters()
    # Without the empty batch, what is counted after the last chunk would be lost.
    return _to_blocks(chain(list_chunks(job, counters), [[]]), counters)


def look_up_batch(block: pa.Table, *, job: Job, location: str) -> Iterator[pa.Table]:
    """Turn a block of listed files into blocks of images that have to be read."""
    batch = Batch.from_block(block)
    images = iter(look_up(job, worker_store(location), batch.items, batch.counters))
    chunks = iter(lambda: list(islice(images, job.options.batch_size)), [])
    return _to_blocks(chunks, batch.counters)


def read_batch(block: pa.Table, *, job: Job) -> Iterator[pa.Table]:
    """Turn a block of images to read into blocks of loaded images; large photos take several."""
    batch = Batch.from_block(block)
    images = map(image_loader(job, batch.counters), batch.items)
    return _to_blocks(group_batches(images, job.options.batch_size), batch.counters)


class BatchEncoder:
    """Turns loaded images into instances; runs as an actor that holds the model.

    Args:
        load: returns the encoder.
    """

    def __init__(self, load: Callable[[], InstanceEncoder]) -> None:
        self._encoder = load()
        self._guard = RefusalGuard()

    def __call__(self, block: pa.Table) -> pa.Table:
        """Encode one batch."""
        batch = Batch.from_block(block)
        encoded = encode_batch(self._encoder, batch.items, batch.counters)
        return Batch(self._guard.check(encoded), batch.counters).to_block()


def join_batches(batches: Iterable[Batch], size: int) -> Iterator[Batch]:
    """Join every `size` encoded batches into one; the last one may consist of fewer."""
    remaining = iter(batches)
    while group := list(islice(remaining, size)):
        counters = RunCounters()
        for batch in group:
            counters.add(batch.counters)
        yield Batch(EncodedBatch.concatenate([batch.items for batch in group]), counters)


@functools.lru_cache(maxsize=1)
def worker_store(location: str) -> InstanceStore:
    """Return the store, which each worker process opens once.

    A connection cannot be sent to another process, so workers get the location of the store.
    """
    return open_store(location)
