"""What travels through Ray Data: batches in blocks, and the stages as functions of such blocks.

Imports no Ray: `jobs.py` strings these together.
"""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import pyarrow as pa

from reir.models.seams import InstanceEncoder
from reir.store import InstanceStore, open_store
from reir_ingestion.report import Tally
from reir_ingestion.stages import Encoded, Job, Refusals, batches, encode, listed, loader, look_up

_PARCEL = "parcel"


@dataclass(frozen=True)
class Parcel:
    """A batch on its way, and what was counted of it so far.

    Attributes:
        items: files, tasks or photos; an `Encoded` after the model. May be empty.
        tally: of all stages up to now.
    """

    items: Any
    tally: Tally

    def packed(self) -> pa.Table:
        """Return a block of one row."""
        data = pa.array([pickle.dumps(self, protocol=pickle.HIGHEST_PROTOCOL)], pa.large_binary())
        return pa.table({_PARCEL: data})

    @staticmethod
    def unpacked(block: pa.Table) -> Parcel:
        """Return the parcel of a block that a worker of this job packed."""
        parcel: Parcel = pickle.loads(block[_PARCEL][0].as_buffer())
        return parcel


def _packed(parts: Iterable[Any], tally: Tally) -> Iterator[pa.Table]:
    """Pack batches with what was counted since the one before; at least one, to keep the counts."""
    empty = True
    for part in parts:
        yield Parcel(part, tally.take()).packed()
        empty = False
    if empty:
        yield Parcel([], tally).packed()


def list_parcels(job: Job) -> Iterator[pa.Table]:
    """List the source; the last parcel is empty and tells of folders that could not be listed."""
    tally = Tally()
    return _packed(chain(listed(job, tally), [[]]), tally)


def look_up_parcel(block: pa.Table, *, job: Job, location: str) -> Iterator[pa.Table]:
    """Listed files -> batches of files to read."""
    parcel = Parcel.unpacked(block)
    tasks = iter(look_up(job, worker_store(location), parcel.items, parcel.tally))
    chunks = iter(lambda: list(islice(tasks, job.options.batch_size)), [])
    return _packed(chunks, parcel.tally)


def read_parcel(block: pa.Table, *, job: Job) -> Iterator[pa.Table]:
    """Files to read -> photos, a batch of large ones in several parts."""
    parcel = Parcel.unpacked(block)
    photos = map(loader(job, parcel.tally), parcel.items)
    return _packed(batches(photos, job.options.batch_size), parcel.tally)


class EncodeParcel:
    """Photos -> instances, in an actor that holds the model.

    Args:
        load: returns the encoder.
    """

    def __init__(self, load: Callable[[], InstanceEncoder]) -> None:
        self._encoder = load()
        self._refusals = Refusals()

    def __call__(self, block: pa.Table) -> pa.Table:
        """Encode one parcel."""
        parcel = Parcel.unpacked(block)
        encoded = encode(self._encoder, parcel.items, parcel.tally)
        return Parcel(self._refusals.check(encoded), parcel.tally).packed()


def joined_parcels(parcels: Iterable[Parcel], at_least: int) -> Iterator[Parcel]:
    """Join so many parcels of encoded batches to one; the last may be of fewer."""
    remaining = iter(parcels)
    while found := list(islice(remaining, at_least)):
        tally = Tally()
        for parcel in found:
            tally.add(parcel.tally)
        yield Parcel(Encoded.joined([each.items for each in found]), tally)


@functools.lru_cache(maxsize=1)
def worker_store(location: str) -> InstanceStore:
    """The store, opened once by each worker."""
    return open_store(location)
