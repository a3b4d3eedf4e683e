"""Run the stages of indexing in threads of this process.

    listing, ledger look-up, decoding    a few reader threads
    the model, batch by batch            a few encoder threads, which share the cores
    the store, batch by batch            one writer thread

All stages overlap. The queues between them are bounded: that of decoded images by number and bytes,
the others by number.
"""

from __future__ import annotations

from functools import partial

from reir.models.interfaces import InstanceEncoder
from reir.store.contract import InstanceStore
from reir_ingestion import stages
from reir_ingestion.parallel_map import Bounds, ParallelMap
from reir_ingestion.report import RunCounters
from reir_ingestion.stages import (
    Coordinator,
    Job,
    RefusalGuard,
    encode_batch,
    group_batches,
    image_loader,
    list_chunks,
    look_up,
    merge_batches,
)
from reir_ingestion.threads import BackgroundWriter, share_cores


def run_in_threads(
    job: Job, counters: RunCounters, *, store: InstanceStore, encoder: InstanceEncoder
) -> RunCounters:
    """Index every image of the source that is new, has changed or has to be tried again.

    Args:
        job: what to index.
        counters: updated during the run, and returned.
        store: receives instances and ledger rows.
        encoder: the model; called from several threads at once.
    """
    options, coordinator = job.options, Coordinator(job, store)
    reading = ParallelMap(
        (
            image
            for files in list_chunks(job, counters)
            for image in look_up(job, store, files, counters)
        ),
        image_loader(job, counters),
        lambda image: image.num_bytes,
        # Two batches: the model takes one while the readers fill the next.
        Bounds(options.num_readers, 2 * options.batch_size, stages.MAX_QUEUED_BYTES),
    )
    # Encoded batches contain no pixels, so their bytes need no limit. One of them may wait for the
    # writer while all encoders work.
    encoding = ParallelMap(
        (
            coordinator.mark_duplicates(batch, counters)
            for batch in group_batches(iter(reading), options.batch_size)
        ),
        partial(encode_batch, encoder, counters=counters),
        lambda _: 0,
        Bounds(options.num_encoders, options.num_encoders + 1),
    )
    counters.queues.update(decoded=reading.num_waiting, encoded=encoding.num_waiting)
    # Checks batches in the order of the listing. In the threads of the encoders, it would depend on
    # timing which images are refused one after another.
    guard = RefusalGuard()
    # The blocks end in reverse order: first the encoders stop, then the readers that feed them,
    # and the writer last, so that everything that was encoded is written.
    with (
        share_cores(options.num_encoders),
        BackgroundWriter(partial(coordinator.write, counters=counters)) as writer,
        reading,
        encoding,
    ):
        checked = map(guard.check, encoding)
        for batch in merge_batches(checked, options.images_per_write):
            writer.put(batch)
    return counters
