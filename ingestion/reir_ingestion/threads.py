"""The stages of indexing within one process, each in threads of its own.

    listing, ledger look-up, decoding    a few reader threads
    the model, batch by batch            a few encoder threads, which share the cores
    the store, batch by batch            one writer thread

All stages overlap and every queue between them is bounded, by images and by bytes.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from reir.models.seams import InstanceEncoder
from reir.store.contract import InstanceStore
from reir_ingestion import stages
from reir_ingestion.readahead import Bounds, ReadAhead
from reir_ingestion.report import Tally
from reir_ingestion.stages import (
    Job,
    Keeper,
    Refusals,
    batches,
    encode,
    gathered,
    listed,
    loader,
    look_up,
)
from reir_ingestion.writer import Writer


def run_in_threads(
    job: Job, tally: Tally, *, store: InstanceStore, encoder: InstanceEncoder
) -> Tally:
    """Index every image of the source that is new, has changed or is to be tried again.

    Args:
        job: what to do.
        tally: counts along; is what is returned.
        store: where instances and ledger go.
        encoder: the model; called from several threads at once.
    """
    options, keeper = job.options, Keeper(job, store)
    reading = ReadAhead(
        (task for files in listed(job, tally) for task in look_up(job, store, files, tally)),
        loader(job, tally),
        lambda loaded: loaded.num_bytes,
        Bounds(options.num_readers, 2 * options.batch_size, stages.MAX_AHEAD_BYTES),
    )
    encoding = ReadAhead(
        (keeper.claim(batch, tally) for batch in batches(iter(reading), options.batch_size)),
        partial(encode, encoder, tally=tally),
        lambda _: 0,
        Bounds(options.num_encoders, options.num_encoders + 1),
    )
    tally.queues.update(decoded=reading.num_waiting, encoded=encoding.num_waiting)
    refusals = Refusals()
    with (
        cores_shared(options.num_encoders),
        Writer(partial(keeper.write, tally=tally)) as writer,
        reading,
        encoding,
    ):
        checked = map(refusals.check, encoding)
        for encoded in gathered(checked, options.images_a_write):
            writer.put(encoded)
    return tally


@contextmanager
def beside(name: str, work: Callable[[threading.Event], None]) -> Iterator[None]:
    """Run `work` in a thread of its own meanwhile; its event is set when the block ends."""
    stop = threading.Event()
    thread = threading.Thread(target=work, args=(stop,), name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@contextmanager
def cores_shared(num_threads: int) -> Iterator[None]:
    """Have each of so many threads use its share of the cores in torch, if torch is in use."""
    torch = sys.modules.get("torch")
    if torch is None or num_threads == 1:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before // num_threads))  # also of threads that start later
    try:
        yield
    finally:
        torch.set_num_threads(before)
