"""The models that a process has loaded: encoders, and what their checkpoints contain besides."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from typing import NamedTuple

from reir.encoders import checkpoint_folder, load_encoder_spec
from reir.errors import SchemaMismatch
from reir.models.interfaces import InstanceEncoder, Zoomer
from reir.models.query_zoom.zoomer import load_zoomer_spec, zoomer_of
from reir.query.localize import PixelLocalizer
from reir.query.presence import Calibration
from reir.query.search import CheckpointExtras, load_extras
from reir.query.zoom.photos import PhotoZoomer

MISSING_FOR_S = 60.0
"""Seconds after which a checkpoint that was not at its place is looked for again."""

KEPT_MODELS = 2
"""Number of models that are kept of a checkpoint folder: the new one, and the one that it replaced,
since galleries are indexed again one after another."""


class ModelKey(NamedTuple):
    """Identifies a model.

    Attributes:
        spec: name of the model, as `reir.encoders` takes it.
        digest: of its checkpoint, which another one may replace in the same folder; empty for
            whichever is there.
    """

    spec: str
    digest: str = ""

    def fits(self, model: LoadedModel) -> bool:
        """Whether a model of this spec is the one that is meant."""
        return self.digest in ("", model.encoder.digest)


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

    @property
    def key(self) -> ModelKey:
        """What identifies this model."""
        return ModelKey(self.spec, self.digest)


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
    """Models by spec, each loaded when it is first needed. Safe to use from several threads.

    If the checkpoint of a spec has been replaced, its new model is loaded as soon as it is asked
    for by its digest.
    """

    def __init__(
        self,
        load: Callable[[str], LoadedModel] = load_model,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Load models with `load`; `clock` returns the time in seconds."""
        self._load, self._clock = load, clock
        self._models: dict[str, tuple[LoadedModel, ...]] = {}  # newest first
        self._missing_until_s: dict[ModelKey, float] = {}
        self._locks: dict[str, threading.Lock] = {}

    @property
    def specs(self) -> tuple[str, ...]:
        """Specs of the models that are loaded."""
        return tuple(self._models)  # a copy, because another thread may load a model meanwhile

    def get(self, key: ModelKey) -> LoadedModel:
        """Return a model.

        Raises:
            ConfigError, CheckpointError: it cannot be loaded.
            SchemaMismatch: the checkpoint of the spec has another digest.
        """
        # Without a lock, so that no search by a loaded model waits while another model loads.
        model = self._loaded(key)
        if model is None:
            # Held while the model loads, so that two requests do not load the same one twice.
            with self._locks.setdefault(key.spec, threading.Lock()):
                model = self._loaded(key) or self._load_newest(key)
        return model

    def _loaded(self, key: ModelKey) -> LoadedModel | None:
        return next(filter(key.fits, self._models.get(key.spec, ())), None)

    def _load_newest(self, key: ModelKey) -> LoadedModel:
        """Load the model that the spec stands for now; refuse it if it is not the one meant."""
        held = self._models.get(key.spec, ())
        # Loading takes seconds, so not each search that needs a missing checkpoint tries it.
        if self._clock() >= self._missing_until_s.get(key, 0.0):
            model = self._load(key.spec)
            others = (each for each in held if each.encoder.digest != model.encoder.digest)
            self._models[key.spec] = held = (model, *others)[:KEPT_MODELS]
            if key.fits(model):
                return model
            self._missing_until_s[key] = self._clock() + MISSING_FOR_S
        # `held` is not empty: a key is only missing after another model of its spec was loaded.
        raise _replaced_error(key, held[0].encoder.digest)


def _replaced_error(key: ModelKey, found: str) -> SchemaMismatch:
    return SchemaMismatch(
        f"encoder '{key.spec}' now has checkpoint {found[:12]}, but the version to search was "
        f"indexed with checkpoint {key.digest[:12]}. Put that one back, or index a version with "
        f"the new one (`reir index SOURCE --gallery GALLERY`) and make it live"
    )
