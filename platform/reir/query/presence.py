"""Calibrated presence: the probability that the described instance exists, from scores.

A calibration consists of four logistic models over a few features of the scores: for a gallery, for
one hit in it, for a photo, and for one instance in it. `reir_training.report.calibration` fits them
on photos that the model was not trained on: every expression searches galleries with and without
its own photo. A checkpoint keeps them in `calibration.json`, beside its weights.

Some sentences score high everywhere, others nowhere. So a score is also compared with the
`Background`: how well the sentence fits photos that do not belong to the gallery. In speaker
verification this is cohort normalization (Auckenthaler et al. 2000, T-norm).
"""

# Shapes: P photos, I instances of each, D vector dimension

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from reir.errors import CheckpointError
from reir.models.color_reading import ColorReading, surprisal
from reir.query.photo_curve import PhotoCurve
from reir.records import FloatArray

logger = logging.getLogger(__name__)

FILE, FORMAT = "calibration.json", 7
BACKGROUND_FILE = "background.safetensors"
PHOTOS = 10
"""Number of best photos whose scores the features are computed from."""
BACKGROUND_BEST = 20
"""Number of best photos of the background whose mean score is a feature."""

# "score" of the hit; "lead" over its strongest rival; "spread", by how much the best score exceeds
# the mean of the best; "background", the score of the same sentence there; "size", the logarithm of
# the number of instances in the gallery.
# Short sentences fit many photos, so they score about as high elsewhere even if their instance is
# there: a long sentence with the same scores would be absent. Hence the number of "words", here and
# for photos.
# "surprisal" is the mean surprisal of the verified hits, or 0 without verification. Verified scores
# only compare these hits with one another; the mean tells whether any of them has the colors.
GALLERY_FEATURES = ("score", "lead", "spread", "background", "size", "words", "surprisal")
HIT_FEATURES = ("score", "lead", "spread", "background", "size")
# Only what every search knows of each photo: other instances of it would have to be read first, and
# they improve the AUROC by less than .01. "excess" is by how much the score exceeds the background,
# or 0: a point of score counts for more there, and without it presence is too low at both ends.
# "surprisal" is that of the "colors" of the sentence at that instance, and their number; both are 0
# without verification.
PHOTO_FEATURES = ("score", "background", "excess", "words", "surprisal", "colors")
BOX_FEATURES = ("score", "lead", "spread", "background")


class Background:
    """Instances of photos that belong to no gallery, such as photos of the training set.

    Args:
        vectors: (P, I, D) unit vectors of the best instances of each photo.
    """

    def __init__(self, vectors: FloatArray) -> None:
        self.vectors = vectors.astype(np.float32)

    def score(self, vector_D: FloatArray) -> float:
        """Return the mean score of the best photos for a sentence; 0 without photos."""
        if not len(self.vectors):
            return 0.0
        # Reads these 12 MB, which no cache keeps from query to query, in half the time of `@`.
        scores_PI = np.einsum("pid,d->pi", self.vectors, vector_D)
        best_P = scores_PI.max(axis=1)
        return float(np.sort(best_P)[-BACKGROUND_BEST:].mean())

    @staticmethod
    def none() -> Background:
        """Return an empty background, for a checkpoint that has none."""
        return Background(np.zeros((0, 1, 1), dtype=np.float32))


@dataclass(frozen=True, kw_only=True)
class Logistic:
    """P = 1 / (1 + exp(-(bias + weights . features))).

    Raises:
        ValueError: weights and features differ in number, or a value is not finite.
    """

    features: tuple[str, ...]
    weights: tuple[float, ...]
    bias: float

    def __post_init__(self) -> None:
        """Check lengths and values."""
        if len(self.features) != len(self.weights):
            raise ValueError(f"{len(self.features)} features but {len(self.weights)} weights")
        if not all(map(math.isfinite, (*self.weights, self.bias))):
            raise ValueError("weights and bias must be finite")

    def __call__(self, values: Sequence[float]) -> float:
        """Return the probability for one row of features."""
        logit = self.bias + sum(w * x for w, x in zip(self.weights, values, strict=True))
        # `exp` raises an error for large arguments; beyond 60 the probability is as good as 0 or 1.
        return 1.0 / (1.0 + math.exp(-max(-60.0, min(60.0, logit))))


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Turns the scores of one checkpoint into probabilities.

    Attributes:
        digest: sha256 of the weights that the calibration was fitted for.
        gallery: presence of the described instance in a gallery.
        hit: probability that one hit of a gallery is the described instance.
        photo: presence of the described instance in one photo.
        box: probability that one instance of a photo is the described one.
        threshold, photo_threshold: an answer about a gallery or a photo counts as found from this
            presence on.
        photo_curve: recall and false alarms of other thresholds for a photo.
        tie_margin: hits cannot be told apart if their scores differ by no more than this.
        about: the data that it was fitted on, and how well it did on held-out data.
        background: the one that it was fitted with.
    """

    digest: str
    gallery: Logistic
    hit: Logistic
    photo: Logistic
    box: Logistic
    threshold: float
    photo_threshold: float
    photo_curve: PhotoCurve
    tie_margin: float
    about: Mapping[str, Any]
    background: Background = field(default_factory=Background.none, compare=False)

    def is_found(self, presence: float | None) -> bool:
        """Whether an answer with this presence counts as found."""
        return presence is not None and presence >= self.threshold

    def of_gallery(
        self,
        best: Sequence[float],
        background: float,
        num_instances: int,
        num_words: int,
        surprisal: float,
    ) -> float:
        """Return the presence in a gallery; 0 in one without instances.

        Args:
            best: scores of its best photos, best first; after verification, if there was any.
            background: score of the sentence on `self.background`.
            num_instances: number of instances in the gallery.
            num_words: of the sentence, see `count_words`.
            surprisal: mean surprisal of the verified hits; 0 if none were verified.
        """
        if not best:
            return 0.0
        return self.gallery(gallery_features(best, background, num_instances, num_words, surprisal))

    def of_hit(
        self, score: float, best: Sequence[float], background: float, num_instances: int
    ) -> float:
        """Return the presence of one hit from its score; other arguments as for `of_gallery`."""
        return self.hit(hit_features(score, best, background, num_instances))

    def of_photo(
        self, score: float, background: float, num_words: int, colors: Sequence[ColorReading] = ()
    ) -> float:
        """Return the presence in a photo; arguments as for `photo_features`."""
        return self.photo(photo_features(score, background, num_words, colors))

    def of_box(self, score: float, best: Sequence[float], background: float) -> float:
        """Return the presence of one instance of a photo, from the scores of all, best first."""
        return self.box(box_features(score, best, background))


def count_words(expression: str) -> int:
    """Return the number of words of a sentence, as the calibration counts them."""
    return len(expression.split())


def gallery_features(
    best: Sequence[float], background: float, num_instances: int, num_words: int, surprisal: float
) -> tuple[float, ...]:
    """Return `GALLERY_FEATURES` of an answer: those of its best hit, and two of the sentence."""
    return *hit_features(best[0], best, background, num_instances), num_words, surprisal


def hit_features(
    score: float, best: Sequence[float], background: float, num_instances: int
) -> tuple[float, ...]:
    """Return `HIT_FEATURES` of a hit.

    Args:
        score: score of the hit.
        best: scores of the best photos (or of the instances of one photo), best first; not empty.
        background: score of the sentence on the background.
        num_instances: number of instances in the gallery.
    """
    first = best[:PHOTOS]
    # The best hit is compared with the second best, and every other hit with the best one.
    rival = first[0] if score < first[0] else first[1] if len(first) > 1 else score
    spread = first[0] - sum(first) / len(first)
    # The size is a feature because the score of the best hit grows with the gallery, even if the
    # described instance is not in it.
    return score, score - rival, spread, background, math.log10(1 + num_instances)


def photo_features(
    score: float, background: float, num_words: int, colors: Sequence[ColorReading] = ()
) -> tuple[float, ...]:
    """Return `PHOTO_FEATURES` of a photo.

    Args:
        score: inner product of its best instance.
        background: score of the sentence on the background.
        num_words: of the sentence, see `count_words`.
        colors: what the pixels say about that instance; nothing without verification.
    """
    excess = max(0.0, score - background)
    return score, background, excess, num_words, surprisal(colors), float(len(colors))


def box_features(score: float, best: Sequence[float], background: float) -> tuple[float, ...]:
    """Return `BOX_FEATURES` of an instance; arguments as for `hit_features`."""
    # All features but the last one, the size of the gallery, which a photo does not have.
    return hit_features(score, best, background, 0)[: len(BOX_FEATURES)]


def load_background(folder: Path, digest: str) -> Background:
    """Read the background of a checkpoint; an empty one if it has none, or one of other weights.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = folder / BACKGROUND_FILE
    if not path.is_file():
        return Background.none()
    try:
        with safe_open(path, framework="numpy") as file:
            # Beside weights that were saved later, vectors have no meaning.
            if (file.metadata() or {}).get("digest") != digest:
                return Background.none()
            return Background(file.get_tensor("vectors"))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error}); delete it and run `reir calibrate`"
        ) from error


def save_background(folder: Path, vectors: FloatArray, digest: str) -> None:
    """Write the (P, I, D) vectors of a background beside the weights, in half precision."""
    half = {"vectors": vectors.astype(np.float16)}
    save_file(half, folder / BACKGROUND_FILE, metadata={"digest": digest})


def load_calibration(folder: Path, digest: str) -> Calibration | None:
    """Read the calibration of a checkpoint; None if it has none, or one for other weights.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.pop("format") != FORMAT:
            logger.warning("%s is of an earlier release: fit it anew with `reir calibrate`", path)
            return None
        if values["digest"] != digest:
            return None  # fitted for weights that were in this folder before
        background = load_background(folder, digest)
        if len(background.vectors) != values.pop("background_photos"):
            raise ValueError(f"fitted with another {BACKGROUND_FILE}")
        for name, features in _MODELS.items():
            values[name] = Logistic(**_tuples(values[name]))
            # The models read their features by position, so other features would go unnoticed.
            if values[name].features != features:
                raise ValueError(f"{name} has features {values[name].features}, not {features}")
        values["photo_curve"] = PhotoCurve(**_tuples(values["photo_curve"]))
        return Calibration(**values, background=background)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is no calibration: {error!r}; delete it, or fit it anew with `reir calibrate`"
        ) from error


def save_calibration(folder: Path, calibration: Calibration) -> Path:
    """Write the calibration beside the weights, and return its path."""
    path = folder / FILE
    values = {"format": FORMAT, **calibration_values(calibration)}
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return path


def calibration_values(calibration: Calibration) -> dict[str, Any]:
    """Return the calibration as JSON values; of the background, the number of photos."""
    values = {f.name: getattr(calibration, f.name) for f in fields(calibration)}
    values |= {name: vars(values[name]) for name in (*_MODELS, "photo_curve")}
    return values | {"background_photos": len(values.pop("background").vectors)}


_MODELS = {
    "gallery": GALLERY_FEATURES,
    "hit": HIT_FEATURES,
    "photo": PHOTO_FEATURES,
    "box": BOX_FEATURES,
}


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    # JSON has no tuples, so what was saved as a tuple comes back as a list.
    return {name: tuple(each) if isinstance(each, list) else each for name, each in values.items()}
