"""Which model `reir eval` evaluates, and where and how it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING

from reir.cli.common import encoder_from_options, messages, photo_progress
from reir.errors import ConfigError
from reir.images.large_photos import LargePhotos

if TYPE_CHECKING:
    from reir.evaluate import Encoding, Runner
    from reir.models.interfaces import ExpressionLocalizer, InstanceEncoder
    from reir.query.presence import Calibration

RUNNERS = "reir.runners"


@dataclass(frozen=True)
class EncodingOptions:
    """The options that all subcommands share: which encoder to use, and where and how it runs.

    Raises:
        ConfigError: --gpu without --num-workers.
    """

    checkpoint: Path | None
    encoder: str | None
    work: Path | None
    num_workers: int | None
    gpu: bool
    threads: int
    large_photos: LargePhotos = LargePhotos.WHOLE

    def __post_init__(self) -> None:
        """Reject an option that would have no effect, before anything is read."""
        if self.gpu and self.num_workers is None:
            raise ConfigError(
                "--gpu gives each Ray worker a GPU, so it needs --num-workers N; without it, a "
                "GPU is used whenever torch finds one"
            )

    @contextmanager
    def encoding(self) -> Iterator[tuple[InstanceEncoder, Encoding]]:
        """Load the encoder, and show progress while the caller encodes with it."""
        from reir.evaluate import Encoding

        spec = encoder_from_options(self.checkpoint, self.encoder) or ""
        # Before the model is loaded, so that a missing app is reported at once.
        runner = self._runner(spec)
        with messages().status("loading the model"):
            model = load_encoder(spec, self.large_photos)
        with self._explain_interrupt(), photo_progress() as progress:
            yield (
                model,
                Encoding(runner=runner, work=self.work, threads=self.threads, progress=progress),
            )

    @contextmanager
    def localizing(self, spec: str) -> Iterator[tuple[ExpressionLocalizer, Encoding]]:
        """Load a localizer, and show progress while the caller evaluates it.

        Raises:
            ConfigError: there is an option of encoders, or the spec cannot be parsed.
        """
        from reir.evaluate import Encoding
        from reir.models.localizers import load_localizer_spec

        # --gpu is not listed, because it is refused without --num-workers, which is listed.
        of_encoders = {
            "--checkpoint": self.checkpoint,
            "--encoder": self.encoder,
            "--large-photos": self.large_photos is not LargePhotos.WHOLE,
            "--num-workers": self.num_workers,
        }
        if given := [name for name, value in of_encoders.items() if value]:
            raise ConfigError(
                f"{given[0]} is for encoders, but --localizer {spec} evaluates a localizer; leave "
                f"one of them out"
            )
        with messages().status("loading the model"):
            localizer = load_localizer_spec(spec)
        with self._explain_interrupt(), photo_progress() as progress:
            yield localizer, Encoding(work=self.work, threads=self.threads, progress=progress)

    def calibration(self, model: InstanceEncoder) -> Calibration | None:
        """Return the calibration of the encoder; None if it has none."""
        from reir.encoders import checkpoint_folder
        from reir.query.presence import load_calibration

        folder = checkpoint_folder(encoder_from_options(self.checkpoint, self.encoder) or "")
        return load_calibration(folder, model.digest) if folder else None

    def _runner(self, spec: str) -> Runner | None:
        """Return the runner that encodes shards on Ray workers; None for this process."""
        if self.num_workers is None:
            return None
        # Found by its entry point, because the platform must not import its apps.
        installed = list(entry_points(group=RUNNERS, name="ray"))
        if not installed:
            raise ConfigError(
                f"--num-workers {self.num_workers} needs the ingestion app: "
                f"pip install 'reir-platform[ingestion]'"
            )
        runner: Runner = installed[0].load()(
            partial(load_encoder, spec, self.large_photos),
            num_workers=self.num_workers,
            use_gpu=self.gpu,
            threads=self.threads,
        )
        return runner

    @contextmanager
    def _explain_interrupt(self) -> Iterator[None]:
        """On Ctrl-C, print how to continue."""
        try:
            yield
        except KeyboardInterrupt:
            kept = f"Finished photos are kept in {self.work}; run the same command to continue."
            lost = "Nothing is kept; with --work DIR, an interrupted run can be continued."
            messages().print(f"Stopped. {kept if self.work else lost}", markup=False)
            raise


def load_encoder(spec: str, large_photos: LargePhotos) -> InstanceEncoder:
    """Load the encoder of a spec, in this process or on a worker.

    Args:
        spec: as for `load_encoder_spec`.
        large_photos: how to encode large photos.

    Raises:
        ConfigError: the spec cannot be parsed, or the encoder cannot encode parts.
        CheckpointError: the model is missing, incomplete or of another kind.
    """
    from reir.encoders import load_encoder_spec
    from reir.images.large_photos import with_views

    return with_views(load_encoder_spec(spec), large_photos.views)
