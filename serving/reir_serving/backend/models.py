"""The models that a process has loaded: encoders, and what their checkpoints contain besides."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, cached_property, partial

from reir.encoders import checkpoint_folder, load_encoder_spec
from reir.models.interfaces import InstanceEncoder, Zoomer
from reir.models.query_zoom.zoomer import load_zoomer_spec, zoomer_of
from reir.query.localize import PixelLocalizer
from reir.query.presence import Calibration
from reir.query.search import CheckpointExtras, load_extras
from reir.query.zoom.photos import PhotoZoomer


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """Description of a model, for processes that have not loaded it.

    Attributes:
        spec: name of the model, as `reir.encoders` takes it.
        digest: digest that identifies the checkpoint.
        dim: dimension of its vectors.
        masks: whether hits can have masks.
        localized_hits: number of first hits of an answer that are localized.
        reranks, verifies: whether its checkpoint includes a re-ranker, and a color head.
        calibration: calibration of its scores; None if its checkpoint includes none.
    """

    spec: str
    digest: str
    dim: int
    masks: bool
    localized_hits: int
    reranks: bool
    verifies: bool
    calibration: Calibration | None


@dataclass(frozen=True)
class LoadedModel:
    """An encoder, with the optional parts of its checkpoint.

    Attributes:
        encoder, extras: the encoder, and those parts.
        load_zoomer: returns the zoomer of the server; None to zoom in with the encoder.
    """

    encoder: InstanceEncoder
    extras: CheckpointExtras = field(default_factory=CheckpointExtras)
    load_zoomer: Callable[[], Zoomer] | None = None

    @cached_property
    def localizer(self) -> PixelLocalizer:
        """The localizer of this model, which remembers the masks that it has found."""
        return self.extras.localizer(self.encoder)

    @cached_property
    def zoomer(self) -> PhotoZoomer:
        """The zoomer of this model, which remembers its searches."""
        # Loaded with the first search that zooms in, and not by processes that never search photos.
        if self.load_zoomer is not None:
            return PhotoZoomer(self.load_zoomer())
        return PhotoZoomer(zoomer_of(self.encoder, self.extras.zoom_policy))

    def info(self, spec: str) -> ModelInfo:
        """Return the description of this model, which `spec` names."""
        return ModelInfo(
            spec=spec,
            digest=self.encoder.digest,
            dim=self.encoder.dim,
            masks=self.encoder.masks or self.extras.segmenter is not None,
            localized_hits=self.localizer.max_hits,
            reranks=self.extras.reranker is not None,
            verifies=self.extras.verifier is not None,
            calibration=self.extras.calibration,
        )


def model_loader(zoomer: str | None) -> Callable[[str], LoadedModel]:
    """Return the function that loads models of a server.

    Args:
        zoomer: spec of the localizer that all models share; None to zoom in with each encoder.
    """
    # Once for all models of a process, because such a model is large.
    load_zoomer = None if zoomer is None else cache(partial(load_zoomer_spec, zoomer))
    return partial(load_model, load_zoomer=load_zoomer)


def load_model(spec: str, *, load_zoomer: Callable[[], Zoomer] | None = None) -> LoadedModel:
    """Load the encoder that a spec names, with its extras.

    Args:
        spec: as `reir.encoders` takes it.
        load_zoomer: see `LoadedModel`.

    Raises:
        ConfigError, CheckpointError: as `load_encoder_spec` and `load_extras`.
    """
    # A frozen public encoder has no checkpoint folder, and so neither re-ranker nor calibration.
    encoder, folder = load_encoder_spec(spec), checkpoint_folder(spec)
    extras = CheckpointExtras() if folder is None else load_extras(folder, encoder)
    return LoadedModel(encoder, extras, load_zoomer)


class ModelCache:
    """Models by spec, each loaded when it is first needed. Safe to use from several threads."""

    def __init__(self, load: Callable[[str], LoadedModel] = load_model) -> None:
        """Load models with `load`."""
        self._load = load
        self._models: dict[str, LoadedModel] = {}
        self._mutex = threading.Lock()

    @property
    def specs(self) -> tuple[str, ...]:
        """Specs of the models that are loaded."""
        return tuple(self._models)  # a copy, because another thread may load a model meanwhile

    def get(self, spec: str) -> LoadedModel:
        """Return the model that a spec names.

        Raises:
            ConfigError, CheckpointError: it cannot be loaded.
        """
        # The lock is held while a model loads, so that two requests do not load the same one twice.
        with self._mutex:
            if spec not in self._models:
                self._models[spec] = self._load(spec)
            return self._models[spec]
