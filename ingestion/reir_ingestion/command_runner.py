"""What `reir index` and `reir reindex` share: the runner, the progress bar, sinks, large photos."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from reir.cli.common import messages
from reir_ingestion.runner_choice import RunnerName

if TYPE_CHECKING:
    from reir.images.large_photos import LargePhotos
    from reir.images.views import ViewSettings
    from reir.index_report import IndexReport
    from reir.models.interfaces import InstanceEncoder
    from reir.sinks import Sink
    from reir.store import InstanceStore
    from reir_ingestion.sources import Source
    from reir_ingestion.stages import IndexOptions


SERVICE = "reir-index"
"""Name in traces."""


@dataclass
class CommandRunner:
    """Indexes sources for a command, and shows the progress.

    Attributes:
        store: the open store.
        location: where it is, for other processes; None for the default.
        runner, num_workers, num_gpus: options of the command.
        sinks: get the records of the run.
    """

    store: InstanceStore
    location: str | None
    runner: RunnerName
    num_workers: int | None = None
    num_gpus: float | None = None
    sinks: Sequence[Sink] = ()
    _encoders: dict[str, InstanceEncoder] = field(default_factory=dict)

    def index(self, source: Source, gallery: str, options: IndexOptions) -> IndexReport:
        """Index a source with the runner that suits it; print which one that is."""
        from reir_ingestion.runner_choice import choose_runner

        choice = choose_runner(self.runner, source)
        messages().print(str(choice))
        run = self._run_on_ray if choice.name is RunnerName.RAY else self._run_here
        return run(source, gallery, options)

    def _run_here(self, source: Source, gallery: str, options: IndexOptions) -> IndexReport:
        from reir_ingestion.pipeline import index
        from reir_ingestion.progress_bar import progress_bar

        encoder = self._encoder(options.encoder_spec)
        with progress_bar() as progress:
            return index(
                source,
                gallery,
                self.store,
                encoder,
                options=options,
                progress=progress,
                sinks=self.sinks,
            )

    def _run_on_ray(self, source: Source, gallery: str, options: IndexOptions) -> IndexReport:
        from reir.encoders import load_encoder_spec
        from reir_ingestion.progress_bar import progress_bar
        from reir_ingestion.ray.runner import EncoderPoolOptions, index_on_ray

        # Ray prints messages about its workers on standard output, which is for the report.
        with progress_bar() as progress, redirect_stdout(sys.stderr):
            return index_on_ray(
                source,
                gallery,
                self.location,
                # A function and not the model: each worker process loads a model of its own.
                partial(load_encoder_spec, options.encoder_spec),
                options=options,
                pool=EncoderPoolOptions(max_encoders=self.num_workers, num_gpus=self.num_gpus),
                progress=progress,
                sinks=self.sinks,
            )

    def _encoder(self, spec: str) -> InstanceEncoder:
        """Return the encoder of a spec, which is loaded once for all sources."""
        from reir.encoders import load_encoder_spec

        if spec not in self._encoders:
            with messages().status("Loading the model"):
                self._encoders[spec] = load_encoder_spec(spec)
        return self._encoders[spec]


def choose_views(
    store: InstanceStore, gallery: str, large_photos: LargePhotos | None
) -> ViewSettings | None:
    """Return in which parts to encode large photos; by default, as in the live version.

    Another setting would make another version, for which every photo is encoded again.
    """
    from reir.images.large_photos import views_of

    versions = store.versions(gallery) if gallery in store.galleries() else []
    current = views_of(next((each.spec.settings for each in versions if each.live), {}))
    if large_photos is None:
        return current
    wanted = large_photos.views
    # The same way keeps the live parameters, even if a later release has other defaults.
    return current if type(current) is type(wanted) else wanted


@contextmanager
def open_sinks(
    events: Path | None, metrics_port: int | None, metrics_host: str
) -> Iterator[list[Sink]]:
    """Open the sinks that get the records of the run."""
    from reir.sinks import JsonLines, Spans
    from reir.tracing import set_variables, start_tracing, stop_tracing

    # Before Ray starts, because its workers inherit the variables.
    set_variables()
    with ExitStack() as opened_sinks:
        sinks: list[Sink] = []
        if start_tracing(SERVICE):
            opened_sinks.callback(stop_tracing)
            sinks.append(Spans())
        if events is not None:
            sinks.append(JsonLines(events))
            opened_sinks.callback(sinks[-1].close)
        if metrics_port is not None:
            from reir_ingestion.metrics import PrometheusSink

            metrics = PrometheusSink()
            port = metrics.serve(metrics_port, metrics_host)
            opened_sinks.callback(metrics.close)
            messages().print(f"Metrics: http://{metrics_host}:{port}/metrics")
            sinks.append(metrics)
        yield sinks


@contextmanager
def stoppable() -> Iterator[None]:
    """Print on Ctrl-C that nothing is lost."""
    try:
        yield
    except KeyboardInterrupt:
        messages().print(
            "Stopped. Everything written so far is kept; run the same command again to continue."
        )
        raise
