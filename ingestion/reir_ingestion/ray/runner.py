"""Run the stages of indexing as one streaming Ray Data job, on this machine or on a cluster.

    listing            one task; a block for every few hundred files, so no process keeps them all
    ledger look-up     a few tasks; unchanged images end here
    read and decode    as many tasks as there are free CPUs
    find duplicates    one task, which asks the coordinator
    encode             a pool of actors, which grows and shrinks; each loads its model once
    store              tasks that call the coordinator; one at a time for an embedded store

The coordinator is one actor, for decisions that need all batches of a run; see
`stages.Coordinator`.

A block contains one `Batch`: the images, and the counts of the stages so far. If a process dies and
a batch is made twice, it is counted once, and writing it twice changes nothing. Ray Data pauses a
stage when too many bytes wait for the next one.
"""

from __future__ import annotations

import functools
import logging
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.data import (
    ActorPoolStrategy,
    DataContext,
    Dataset,
    Datasource,
    ExecutionResources,
    ReadTask,
    TaskPoolStrategy,
)
from ray.data.block import BlockMetadata
from ray.exceptions import RayError

from reir.cores import num_cores
from reir.errors import ConfigError
from reir.index_report import IndexReport
from reir.models.interfaces import InstanceEncoder
from reir.sinks import Sink
from reir.store import VersionSpec, default_location, is_embedded, open_store
from reir_ingestion.pipeline import (
    ProgressCallback,
    apply_views,
    index_with,
    resolve_source,
    version_spec,
)
from reir_ingestion.ray.blocks import (
    BatchEncoder,
    list_batches,
    look_up_batch,
    read_batch,
)
from reir_ingestion.ray.cluster import (
    is_local,
    quiet_logs,
    start_or_join_ray,
    translate_ray_errors,
)
from reir_ingestion.ray.coordinator import CoordinatorActor, StoreDatasink, mark_duplicates_in_batch
from reir_ingestion.report import RunCounters
from reir_ingestion.sources import Source
from reir_ingestion.stages import (
    MAX_QUEUED_BYTES,
    IndexOptions,
    Job,
)
from reir_ingestion.threads import background_thread

logger = logging.getLogger(__name__)

LOOK_UP_TASKS = 2
WRITE_TASKS = 4
"""Number of tasks that write to a Milvus server at the same time. A write mostly waits until the
server has made earlier writes visible (docs/ray.md)."""

BATCHES_PER_READER = 1000
"""Number of batches after which a reader process is replaced, so that the memory that image
libraries leak stays small."""

CPUS_NEEDED = 2

MAX_LOAD_DEATHS = 10
"""The job fails once this many encoders in a row have died while they loaded their model."""

PROGRESS_INTERVAL_S = 0.5


@dataclass(frozen=True, kw_only=True)
class EncoderPoolOptions:
    """The pool of encoders, as the user asks for it.

    Attributes:
        max_encoders: upper limit; None takes one encoder per GPU, or without GPUs all CPUs that are
            free at the start, except those that readers need.
        num_gpus: GPUs per encoder, a fraction if several share one; None takes one if the cluster
            has any.

    Raises:
        ConfigError: a number is out of range.
    """

    max_encoders: int | None = None
    num_gpus: float | None = None

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.max_encoders is not None and self.max_encoders < 1:
            raise ConfigError(f"num_workers must be 1 or more, got {self.max_encoders}")
        if self.num_gpus is not None and self.num_gpus < 0:
            raise ConfigError(f"num_gpus must be 0 or more, got {self.num_gpus}")


@dataclass(frozen=True)
class EncoderPool:
    """The pool of encoders, as it fits the cluster.

    Attributes:
        max_size: largest number of encoders.
        initial_size: encoders to start with, as many as there is room for.
        num_gpus: GPUs per encoder.
    """

    max_size: int
    initial_size: int
    num_gpus: float


def index_on_ray(  # noqa: PLR0913 - the options are keyword-only
    source: Source | str | Path,
    gallery: str,
    location: str | None,
    load: Callable[[], InstanceEncoder],
    *,
    options: IndexOptions | None = None,
    pool: EncoderPoolOptions | None = None,
    progress: ProgressCallback | None = None,
    sinks: Sequence[Sink] = (),
) -> IndexReport:
    """Bring a gallery up to date with a source, with Ray Data; otherwise like `pipeline.index`.

    Ray is the cluster that `RAY_ADDRESS` names, or one that is started on this machine for this
    run. Every machine must see the source. An embedded store can be reached on this machine only,
    so its reads and writes stay here.

    Args:
        source: folder, file or pattern; see `open_source`.
        gallery: name of the gallery, which is created if it does not exist.
        location: location of the store, see `open_store`.
        load: returns the encoder; picklable, called once by each worker.
        options: see `IndexOptions`.
        pool: see `EncoderPoolOptions`.
        progress: called from one thread.
        sinks: called from one thread; they get the record of unchanged images when the batch that
            remains of their part of the listing has passed all stages.

    Raises:
        ConfigError: an option or the name of the gallery is not allowed, the store is in the
            memory of one process, or this machine has too few GPUs.
        WorkersUnavailable: Ray could not start, or failed during the job.
        ReirError: an error of a stage, see `pipeline.index`.
    """
    opened, location = resolve_source(source), _absolute_location(location)
    options = options or IndexOptions()
    with (
        # More CPUs than cores, so that encoders on every core leave some for the readers.
        start_or_join_ray(num_cores() + _num_reader_cpus(num_cores())),
        translate_ray_errors(),
        closing(open_store(location)) as store,
    ):
        fitted = fit_pool(pool or EncoderPoolOptions())
        load = functools.partial(_load_with_views, load, options)
        run = functools.partial(run_on_ray, location=location, load=load, pool=fitted)
        spec = _version_spec_from_worker(load, options, fitted)
        return index_with(
            run, opened, gallery, store, spec, options=options, progress=progress, sinks=sinks
        )


def run_on_ray(
    job: Job,
    live: RunCounters,
    *,
    location: str,
    load: Callable[[], InstanceEncoder],
    pool: EncoderPool,
) -> RunCounters:
    """Take a job through all stages with Ray Data.

    Args:
        job: what to index.
        live: updated while the run goes on, if anything shows progress.
        location: location of a store that other processes can reach.
        load: returns the encoder.
        pool: the pool of encoders.

    Returns:
        The counts; every image once, however often its batch was made.
    """
    # An embedded store listens on this machine only, so whatever opens it has to run here.
    this_node = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    store_node = this_node if is_embedded(location) else None
    on_store_node = {"label_selector": store_node} if store_node else {}
    coordinator = (
        ray.remote(CoordinatorActor)
        .options(
            # It waits for the store most of the time, and must never wait for a free CPU: every
            # stage depends on it.
            num_cpus=0,
            # All writers at once, and beside them `mark_duplicates` and `drain`.
            max_concurrency=2 + WRITE_TASKS,
            # -1 is no limit: every call can be repeated, see `Coordinator.write`.
            max_restarts=-1,
            max_task_retries=-1,
            **on_store_node,
        )
        .remote(job, location)
    )
    options = job.options
    sink = StoreDatasink(coordinator, max(1, options.images_per_write // options.batch_size))
    with _ray_data_settings(pool), _relay_progress(coordinator, live):
        _encoded_batches(job, location, load, pool, store_node, coordinator).write_datasink(
            sink,
            concurrency=1 if is_embedded(location) else WRITE_TASKS,
            ray_remote_args={"num_cpus": 0} | on_store_node,
        )
    return sink.counters


def _encoded_batches(  # noqa: PLR0913 - one by one is clearer than a bag of options
    job: Job,
    location: str,
    load: Callable[[], InstanceEncoder],
    pool: EncoderPool,
    store_node: dict[str, str] | None,
    coordinator: Any,
) -> Dataset:
    """Return the dataset of all stages but the last.

    Ray Data fuses neighboring stages with equal resource arguments into one task, in which they
    would run one after the other. These stages differ in their arguments on purpose, so that each
    of them remains a stage of its own and they overlap.
    """
    one_batch: dict[str, Any] = {"batch_size": 1, "batch_format": "pyarrow"}
    # Stages that wait more than they compute take no CPU. The listing lasts as long as the job, so
    # it would block a CPU all the time.
    files = ray.data.read_datasource(
        ListingDatasource(job), override_num_blocks=1, concurrency=1, num_cpus=0
    )
    pending = files.map_batches(
        look_up_batch,
        fn_kwargs={"job": job, "location": location},
        compute=TaskPoolStrategy(LOOK_UP_TASKS),
        num_cpus=0,
        label_selector=store_node,
        **one_batch,
    )
    loaded = pending.map_batches(
        read_batch, fn_kwargs={"job": job}, num_cpus=1, max_calls=BATCHES_PER_READER, **one_batch
    )
    marked = loaded.map_batches(
        mark_duplicates_in_batch,
        fn_kwargs={"coordinator": coordinator},
        # One task, so that the batches reach the coordinator in the order of the listing.
        compute=TaskPoolStrategy(1),
        num_cpus=0,
        **one_batch,
    )
    return marked.map_batches(
        BatchEncoder,
        fn_constructor_args=(load,),
        compute=ActorPoolStrategy(
            min_size=1, max_size=pool.max_size, initial_size=pool.initial_size
        ),
        num_gpus=pool.num_gpus or None,
        **one_batch,
    )


class ListingDatasource(Datasource):  # type: ignore[misc]  # Ray has no types
    """The files of a job, as one read task that yields a block per chunk of the listing."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self._job = job

    def estimate_inmemory_data_size(self) -> int | None:
        """Return None, because the size is unknown until the listing has ended."""
        return None

    def get_read_tasks(
        self,
        parallelism: int,  # noqa: ARG002 - part of Ray's interface
        per_task_row_limit: int | None = None,  # noqa: ARG002
        data_context: DataContext | None = None,  # noqa: ARG002
    ) -> list[ReadTask]:
        """Return the one task."""
        job = self._job
        unknown = BlockMetadata(num_rows=None, size_bytes=None, exec_stats=None, input_files=None)
        return [ReadTask(lambda: list_batches(job), unknown)]


@contextmanager
def _relay_progress(coordinator: Any, live: RunCounters) -> Iterator[None]:
    """Update `live` and its sinks from the coordinator, at intervals and once at the end."""
    if live.on_progress is None and not live.sinks:
        yield
        return

    def poll(stop: threading.Event) -> None:
        stopped = False
        while not stopped:
            # After `stop`, the loop runs once more, for the records of the last batches.
            stopped = stop.wait(PROGRESS_INTERVAL_S)
            try:
                counters, records = ray.get(coordinator.drain.remote())
            except RayError:  # the cluster is gone; the run itself raises an error that says so
                return
            # First the records: until their seconds are known, `live` would emit those of the
            # counts once more.
            for record in records:
                live.forward(record)
            live.add(counters)

    with background_thread("reir-progress", poll):
        yield


def _load_with_views(load: Callable[[], InstanceEncoder], options: IndexOptions) -> InstanceEncoder:
    return apply_views(load(), options)


def _version_spec_from_worker(
    load: Callable[[], InstanceEncoder], options: IndexOptions, pool: EncoderPool
) -> VersionSpec:
    """Load the encoder in a worker, because the driver's machine may lack the GPU or the memory."""

    def make_spec() -> VersionSpec:
        return version_spec(load(), options)

    # The process ends after one call, so that it does not keep the memory of the model.
    task = ray.remote(num_cpus=1, num_gpus=pool.num_gpus, max_calls=1)(make_spec)
    spec: VersionSpec = ray.get(task.remote())
    return spec


def _num_reader_cpus(cpus: int) -> int:
    """Return the number of CPUs to keep for readers.

    If encoders occupied every CPU, they would wait for photos forever.
    """
    return max(1, cpus // 4)


def fit_pool(options: EncoderPoolOptions) -> EncoderPool:
    """Fit the pool of encoders to the cluster.

    Raises:
        ConfigError: Ray runs on this machine alone, which has too few GPUs.
    """
    found, free = ray.cluster_resources(), ray.available_resources()
    gpus = found.get("GPU", 0.0)
    # CPUs that other work on the cluster holds count for nothing: encoders on all that are left
    # would leave no reader any room.
    cpus = int(free.get("CPU", 0.0))
    if cpus < CPUS_NEEDED:
        logger.warning(
            "indexing needs %d CPUs of the cluster, one to read and one to encode; %g are free, so "
            "it waits for more",
            CPUS_NEEDED,
            free.get("CPU", 0.0),
        )
    num_gpus = min(1.0, gpus) if options.num_gpus is None else options.num_gpus
    # A cluster may add machines with GPUs later; this machine cannot.
    if num_gpus > gpus and is_local():
        raise ConfigError(
            f"--num-gpus {num_gpus:g}: this machine has {gpus:g} GPUs; use fewer, or set "
            f"RAY_ADDRESS to the address of a cluster"
        )
    room = max(1, int(gpus / num_gpus) if num_gpus else cpus - _num_reader_cpus(cpus))
    max_size = options.max_encoders or room
    return EncoderPool(max_size, min(max_size, room), num_gpus)


def _absolute_location(location: str | None) -> str:
    """Return the location of a store in a form that every process understands.

    Raises:
        ConfigError: the store is in the memory of one process.
    """
    location = default_location() if location is None else location
    if location == "memory:":
        raise ConfigError(
            "Ray cannot index into memory:, since other processes cannot reach it; "
            "use the folder of an embedded store or the address of a Milvus server"
        )
    return str(Path(location).expanduser().resolve()) if is_embedded(location) else location


@contextmanager
def _ray_data_settings(pool: EncoderPool) -> Iterator[None]:
    """Set Ray Data up for this job, and restore its settings, which belong to the whole process."""
    context = DataContext.get_current().copy()
    # With a limit of one byte, every row, which is a whole batch, becomes a block of its own.
    context.target_max_block_size = 1
    context.enable_progress_bars = False
    # Of equal photos, the first of the listing is encoded, as in a run without Ray.
    context.execution_options.preserve_order = True
    context.print_on_execution_start = False
    # For `translate_ray_errors`, which looks for the errors of the stages.
    context.raise_original_map_exception = True
    context.max_consecutive_actor_init_deaths = MAX_LOAD_DEATHS
    context.execution_options.resource_limits = ExecutionResources.for_limits(
        object_store_memory=2 * MAX_QUEUED_BYTES * pool.max_size
    )
    with quiet_logs(), DataContext.current(context), warnings.catch_warnings():
        # A small job has fewer batches than tasks may run, which is no reason for a warning.
        warnings.filterwarnings("ignore", "The maximum number of concurrent tasks")
        yield
