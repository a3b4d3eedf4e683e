"""The stages of indexing as one streaming Ray Data job, on this machine or on a cluster.

    listing            one task; a block for every few hundred files, so no process holds them all
    ledger look-up     a few tasks; what is unchanged ends here
    read and decode    as many tasks as there are CPUs for
    find duplicates    one task, which asks the keeper
    encode             a pool of actors, which grows and shrinks; each loads its model once
    store              tasks that have the keeper write; one at a time into an embedded store

The keeper is one actor that knows what the whole run has to know, see `stages.Keeper`.

A block is one `Parcel`: a batch, and what the stages counted of it so far. A block that was made
twice, since a process died, is counted once, and writing it twice changes nothing. Ray Data holds
a stage back when too many bytes are under way.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
from ray.data import (
    ActorPoolStrategy,
    DataContext,
    Dataset,
    Datasink,
    Datasource,
    ExecutionResources,
    ReadTask,
    TaskPoolStrategy,
)
from ray.data.block import BlockMetadata
from ray.data.datasource import WriteResult
from ray.exceptions import RayError

from reir.cores import num_cores
from reir.errors import ConfigError
from reir.models.seams import InstanceEncoder
from reir.sinks import Record, Sink
from reir.store import VersionSpec, default_location, is_embedded, open_store
from reir_ingestion.actors import cluster, our_errors
from reir_ingestion.loading import Loaded
from reir_ingestion.parcels import (
    EncodeParcel,
    Parcel,
    joined_parcels,
    list_parcels,
    look_up_parcel,
    read_parcel,
    worker_store,
)
from reir_ingestion.pipeline import (
    ShowProgress,
    as_source,
    cut_as_asked,
    index_with,
    version_spec,
)
from reir_ingestion.report import IndexReport, Tally
from reir_ingestion.sources import Source
from reir_ingestion.stages import (
    MAX_AHEAD_BYTES,
    Encoded,
    IndexOptions,
    Job,
    Keeper,
)
from reir_ingestion.threads import beside

LOOK_UPS = 2
WRITERS = 4
"""Tasks that write to a Milvus server at the same time."""

READS_A_WORKER = 1000
"""Batches after which a reader is replaced, so that what image libraries leak stays small."""

LOST_ENCODERS = 10
"""So many encoders in a row may die while they load their model."""

PROGRESS_S = 0.5


@dataclass(frozen=True, kw_only=True)
class Workers:
    """Who encodes.

    Attributes:
        most: encoders, at most; None takes one for each GPU, or without GPUs all CPUs but those
            that readers need.
        num_gpus: GPUs of one encoder, a fraction if several share one; None takes one where the
            cluster has any.

    Raises:
        ConfigError: a number is out of range.
    """

    most: int | None = None
    num_gpus: float | None = None

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.most is not None and self.most < 1:
            raise ConfigError(f"num_workers must be 1 or more, got {self.most}")
        if self.num_gpus is not None and self.num_gpus < 0:
            raise ConfigError(f"num_gpus must be 0 or more, got {self.num_gpus}")


@dataclass(frozen=True)
class Pool:
    """`Workers` on a given cluster.

    Attributes:
        most: encoders, at most.
        first: encoders to start with, as many as there is room for.
        num_gpus: GPUs of each.
    """

    most: int
    first: int
    num_gpus: float


def index_on_ray(  # noqa: PLR0913 - the whole job; all but its four parts are by name
    source: Source | str | Path,
    gallery: str,
    location: str | None,
    load: Callable[[], InstanceEncoder],
    *,
    options: IndexOptions | None = None,
    workers: Workers | None = None,
    progress: ShowProgress | None = None,
    sinks: Sequence[Sink] = (),
) -> IndexReport:
    """Bring a gallery up to date with a source, with Ray Data; otherwise as `pipeline.index`.

    Ray is the cluster that `RAY_ADDRESS` names, or one that is started here for this run. Every
    machine must see the source; an embedded store is reached on this machine only, so its reads
    and writes stay here.

    Args:
        source: folder, file or glob; see `open_source`.
        gallery: name; made when absent.
        location: of the store, as `open_store` takes it.
        load: returns the encoder; picklable, called once by each worker.
        options: see `IndexOptions`.
        workers: see `Workers`.
        progress: called from one thread.
        sinks: likewise; of what is skipped unread they hear at the end.

    Raises:
        ConfigError: an option or the gallery's name is not allowed, the store is of one process
            only, or this machine lacks the GPUs.
        WorkersUnavailable: Ray could not start, or failed during the job.
        ReirError: what a stage raised, see `pipeline.index`.
    """
    found, place = as_source(source), _shared_location(location)
    options = options or IndexOptions()
    with (
        cluster(num_cores() + _readers(num_cores())),
        our_errors(),
        closing(open_store(place)) as store,
    ):
        pool = _pool(workers or Workers())
        load = functools.partial(_load, load, options)
        run = functools.partial(run_on_ray, location=place, load=load, pool=pool)
        spec = _spec_of(load, options, pool)
        return index_with(
            run, found, gallery, store, spec, options=options, progress=progress, sinks=sinks
        )


def run_on_ray(
    job: Job, live: Tally, *, location: str, load: Callable[[], InstanceEncoder], pool: Pool
) -> Tally:
    """Take a job through all stages with Ray Data.

    Args:
        job: what to do.
        live: told while the run goes on, if it shows progress.
        location: of a store that other processes reach.
        load: returns the encoder.
        pool: of encoders.

    Returns:
        What was counted; every image once, however often its batch was made.
    """
    # An embedded store listens on this machine only.
    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    place = here if is_embedded(location) else None
    keeper = (
        ray.remote(KeeperActor)
        .options(
            num_cpus=0,
            max_concurrency=2 + WRITERS,
            max_restarts=-1,
            max_task_retries=-1,
            **({"label_selector": place} if place else {}),
        )
        .remote(job, location)
    )
    options = job.options
    sink = StoreSink(keeper, max(1, options.images_a_write // options.batch_size))
    with _settings(pool), _shown(keeper, live):
        _encoded(job, location, load, pool, place, keeper).write_datasink(
            sink,
            concurrency=1 if is_embedded(location) else WRITERS,
            ray_remote_args={"num_cpus": 0} | ({"label_selector": place} if place else {}),
        )
    return sink.tally


def _encoded(  # noqa: PLR0913 - one by one is clearer than a bag
    job: Job,
    location: str,
    load: Callable[[], InstanceEncoder],
    pool: Pool,
    place: dict[str, str] | None,
    keeper: Any,
) -> Dataset:
    """The stages before the last; differing arguments keep Ray Data from fusing two of them."""
    one_parcel: dict[str, Any] = {"batch_size": 1, "batch_format": "pyarrow"}
    # Stages that wait more than they compute take no CPU: the listing lives as long as the job.
    files = ray.data.read_datasource(Listing(job), override_num_blocks=1, concurrency=1, num_cpus=0)
    tasks = files.map_batches(
        look_up_parcel,
        fn_kwargs={"job": job, "location": location},
        compute=TaskPoolStrategy(LOOK_UPS),
        num_cpus=0,
        label_selector=place,
        **one_parcel,
    )
    photos = tasks.map_batches(
        read_parcel, fn_kwargs={"job": job}, num_cpus=1, max_calls=READS_A_WORKER, **one_parcel
    )
    claimed = photos.map_batches(
        claim_parcel,
        fn_kwargs={"keeper": keeper},
        compute=TaskPoolStrategy(1),
        num_cpus=0,
        **one_parcel,
    )
    return claimed.map_batches(
        EncodeParcel,
        fn_constructor_args=(load,),
        compute=ActorPoolStrategy(min_size=1, max_size=pool.most, initial_size=pool.first),
        num_gpus=pool.num_gpus or None,
        **one_parcel,
    )


class Listing(Datasource):  # type: ignore[misc]  # Ray has no types
    """The files of a job: one read task, which yields a block for every chunk of the listing."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self._job = job

    def estimate_inmemory_data_size(self) -> int | None:
        """Nobody knows before the listing has ended."""
        return None

    def get_read_tasks(
        self,
        parallelism: int,  # noqa: ARG002 - of a contract
        per_task_row_limit: int | None = None,  # noqa: ARG002
        data_context: DataContext | None = None,  # noqa: ARG002
    ) -> list[ReadTask]:
        """Return the one task."""
        job = self._job
        unknown = BlockMetadata(num_rows=None, size_bytes=None, exec_stats=None, input_files=None)
        return [ReadTask(lambda: list_parcels(job), unknown)]


class KeeperActor:
    """`Keeper` in a process of its own, and what it has to tell the driver.

    A keeper that died starts anew, and knows what is in the store. Equal photos that were under
    way may then both be encoded.
    """

    def __init__(self, job: Job, location: str) -> None:
        self._keeper = Keeper(job, worker_store(location))
        self._written, self._records = Tally(), _Kept()

    def claim(self, batch: Sequence[Loaded]) -> list[Loaded]:
        """See `Keeper.claim`."""
        return self._keeper.claim(batch, Tally())

    def write(self, encoded: Encoded, tally: Tally) -> Tally:
        """Write a batch; returns what all stages counted of it."""
        tally.sinks = (self._records,)
        self._keeper.write(encoded, tally)
        self._written.add(tally)
        return tally

    def take(self) -> tuple[Tally, list[Record]]:
        """Return what was counted and told since the last call."""
        return self._written.take(), self._records.take()


class _Kept:
    """A sink that keeps its records until they are taken."""

    def __init__(self) -> None:
        self._records: deque[Record] = deque()

    def write(self, record: Record) -> None:
        """Take one record."""
        self._records.append(record)

    def close(self) -> None:
        """Nothing to do."""

    def take(self) -> list[Record]:
        """Return the records so far, and forget them."""
        return [self._records.popleft() for _ in range(len(self._records))]


def claim_parcel(block: pa.Table, *, keeper: Any) -> pa.Table:
    """Photos -> photos, of which the duplicates have lost their pixels."""
    parcel = Parcel.unpacked(block)
    # the keeper needs to know that there are pixels, not which
    light = [
        each if each.pixels is None else replace(each, pixels=each.pixels[:1, :1].copy())
        for each in parcel.items
    ]
    with parcel.tally.stage("list"), our_errors():
        claimed = ray.get(keeper.claim.remote(light))
    items = [
        replace(each, pixels=None, same_as=answer.same_as) if answer.same_as else each
        for each, answer in zip(parcel.items, claimed, strict=True)
    ]
    return Parcel(items, parcel.tally).packed()


class StoreSink(Datasink[Tally]):  # type: ignore[misc]  # Ray has no types
    """Has the keeper write encoded batches.

    Args:
        keeper: handle of a `KeeperActor`.
        parcels_a_write: batches that are written together, at least.

    Attributes:
        tally: after the run, what all its tasks counted.
    """

    def __init__(self, keeper: Any, parcels_a_write: int) -> None:
        self._keeper = keeper
        self._parcels_a_write = parcels_a_write
        self.tally = Tally()

    @property
    def min_rows_per_write(self) -> int | None:
        """A parcel is a row; None leaves it to Ray."""
        return self._parcels_a_write if self._parcels_a_write > 1 else None

    def write(self, blocks: Iterable[pa.Table], ctx: Any) -> Tally:  # noqa: ARG002 - of a contract
        """Returns what was counted of these blocks by all stages."""
        total = Tally()
        for parcel in joined_parcels(map(Parcel.unpacked, blocks), self._parcels_a_write):
            with our_errors():
                total.add(ray.get(self._keeper.write.remote(parcel.items, parcel.tally)))
        return total

    def on_write_complete(self, write_result: WriteResult[Tally]) -> None:
        """Add up what the tasks returned."""
        for tally in write_result.write_returns:
            self.tally.add(tally)


@contextmanager
def _shown(keeper: Any, live: Tally) -> Iterator[None]:
    """Bring `live` and its sinks up to date, now and then and at the end, if anybody looks."""
    if live.on_progress is None and not live.sinks:
        yield
        return

    def watch(stop: threading.Event) -> None:
        stopped = False
        while not stopped:
            stopped = stop.wait(PROGRESS_S)
            try:
                tally, records = ray.get(keeper.take.remote())
            except RayError:  # the cluster is gone; the run itself says so
                return
            live.add(tally)
            for record in records:
                live.pass_on(record)

    with beside("reir-progress", watch):
        yield


def _load(load: Callable[[], InstanceEncoder], options: IndexOptions) -> InstanceEncoder:
    return cut_as_asked(load(), options)


def _spec_of(load: Callable[[], InstanceEncoder], options: IndexOptions, pool: Pool) -> VersionSpec:
    """Ask a worker, since the machine of this process may lack the GPU or the memory."""

    def ask() -> VersionSpec:
        return version_spec(load(), options)

    asked = ray.remote(num_cpus=1, num_gpus=pool.num_gpus, max_calls=1)(ask)
    spec: VersionSpec = ray.get(asked.remote())
    return spec


def _readers(cpus: int) -> int:
    """CPUs that encoders leave to readers: encoders that hold all of them would wait for ever."""
    return max(1, cpus // 4)


def _pool(workers: Workers) -> Pool:
    """Fit the workers to the cluster.

    Raises:
        ConfigError: it was started on this machine, which has too few GPUs.
    """
    found = ray.cluster_resources()
    cpus, gpus = int(found.get("CPU", 1)), found.get("GPU", 0.0)
    num_gpus = min(1.0, gpus) if workers.num_gpus is None else workers.num_gpus
    if num_gpus > gpus and not os.environ.get("RAY_ADDRESS"):
        raise ConfigError(
            f"--num-gpus {num_gpus:g}: this machine has {gpus:g} GPUs; use fewer, or name a "
            f"cluster with RAY_ADDRESS"
        )
    fitting = max(1, int(gpus / num_gpus) if num_gpus else cpus - _readers(cpus))
    most = workers.most or fitting
    return Pool(most, min(most, fitting), num_gpus)


def _shared_location(location: str | None) -> str:
    """Return the location of a store in a form that every process understands.

    Raises:
        ConfigError: the store is in the memory of one process.
    """
    place = default_location() if location is None else location
    if place == "memory:":
        raise ConfigError("a store in memory is of one process; name a folder or a Milvus server")
    return str(Path(place).expanduser().resolve()) if is_embedded(place) else place


@contextmanager
def _settings(pool: Pool) -> Iterator[None]:
    """Set Ray Data up for this job, and put its settings back, which are of the whole process."""
    context = DataContext.get_current().copy()
    context.target_max_block_size = 1  # byte: so every row, a whole batch, is a block of its own
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True  # of equal photos the first is encoded
    context.print_on_execution_start = False
    context.raise_original_map_exception = True
    context.max_consecutive_actor_init_deaths = LOST_ENCODERS
    context.execution_options.resource_limits = ExecutionResources.for_limits(
        object_store_memory=2 * MAX_AHEAD_BYTES * pool.most
    )
    with _quiet(), DataContext.current(context), warnings.catch_warnings():
        # few batches, fewer than tasks may run: nothing to warn of
        warnings.filterwarnings("ignore", "The maximum number of concurrent tasks")
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """Let Ray Data log what may be wrong, but not that it shows no progress of its own."""
    levels = {"ray.data": logging.WARNING, "ray.data._internal.progress": logging.ERROR}
    before = {name: logging.getLogger(name).level for name in levels}
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
