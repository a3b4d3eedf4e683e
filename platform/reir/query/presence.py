"""Calibrated presence: the probability that the described instance exists, from scores.

A calibration consists of four logistic models over a few features of the scores: for a gallery, for
one hit in it, for a photo, and for one instance in it. `reir_training.report.calibration` fits them
on photos that the model was not trained on: every expression searches galleries with and without
its own photo. A checkpoint keeps them in `calibration.json`, beside its weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from reir.errors import CheckpointError

FILE, FORMAT = "calibration.json", 1
PHOTOS = 10
"""Number of best photos whose scores the features are computed from."""

# "score" of the hit; "lead" over its strongest rival; "spread", by how much the best score exceeds
# the mean of the best; "size", the logarithm of the number of instances in the gallery.
GALLERY_FEATURES = ("score", "lead", "spread", "size")
HIT_FEATURES = ("score", "lead", "spread", "size")
PHOTO_FEATURES = BOX_FEATURES = ("score", "lead", "spread")


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
        tie_margin: hits cannot be told apart if their scores differ by no more than this.
        about: the data that it was fitted on, and how well it did on held-out data.
    """

    digest: str
    gallery: Logistic
    hit: Logistic
    photo: Logistic
    box: Logistic
    threshold: float
    photo_threshold: float
    tie_margin: float
    about: Mapping[str, Any]

    def is_found(self, presence: float | None) -> bool:
        """Whether an answer with this presence counts as found."""
        return presence is not None and presence >= self.threshold

    def of_gallery(self, best: Sequence[float], num_instances: int) -> float:
        """Return the presence in a gallery, from the scores of its best photos, best first."""
        return self.gallery(gallery_features(best, num_instances))

    def of_hit(self, score: float, best: Sequence[float], num_instances: int) -> float:
        """Return the presence of one hit, from its score and those of the best photos."""
        return self.hit(hit_features(score, best, num_instances))

    def of_photo(self, best: Sequence[float]) -> float:
        """Return the presence in a photo, from the scores of its instances, best first."""
        return self.photo(box_features(best[0], best))

    def of_box(self, score: float, best: Sequence[float]) -> float:
        """Return the presence of one instance of a photo, from the scores of all, best first."""
        return self.box(box_features(score, best))


def gallery_features(best: Sequence[float], num_instances: int) -> tuple[float, ...]:
    """Return `GALLERY_FEATURES` of an answer, which are the features of its best hit."""
    return hit_features(best[0], best, num_instances)


def hit_features(score: float, best: Sequence[float], num_instances: int) -> tuple[float, ...]:
    """Return `HIT_FEATURES` of a hit.

    Args:
        score: score of the hit.
        best: scores of the best photos (or of the instances of one photo), best first; not empty.
        num_instances: number of instances in the gallery.
    """
    first = best[:PHOTOS]
    # The best hit is compared with the second best, and every other hit with the best one.
    rival = first[0] if score < first[0] else first[1] if len(first) > 1 else score
    spread = first[0] - sum(first) / len(first)
    # The size is a feature because the score of the best hit grows with the gallery, even if the
    # described instance is not in it.
    return score, score - rival, spread, math.log10(1 + num_instances)


def box_features(score: float, best: Sequence[float]) -> tuple[float, ...]:
    """Return `PHOTO_FEATURES` of the best instance of a photo, or `BOX_FEATURES` of any."""
    # All features but the last one, the size of the gallery, which a photo does not have.
    return hit_features(score, best, 0)[: len(BOX_FEATURES)]


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
        if values.pop("format") != FORMAT or values["digest"] != digest:
            return None  # fitted for weights that were in this folder before
        for name, features in _MODELS.items():
            values[name] = Logistic(**_tuples(values[name]))
            # The models read their features by position, so other features would go unnoticed.
            if values[name].features != features:
                raise ValueError(f"{name} has features {values[name].features}, not {features}")
        return Calibration(**values)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is no calibration: {error!r}; delete it, or fit it anew with `reir calibrate`"
        ) from error


def save_calibration(folder: Path, calibration: Calibration) -> Path:
    """Write the calibration beside the weights, and return its path."""
    path = folder / FILE
    values = {"format": FORMAT, **asdict(calibration)}
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return path


_MODELS = {
    "gallery": GALLERY_FEATURES,
    "hit": HIT_FEATURES,
    "photo": PHOTO_FEATURES,
    "box": BOX_FEATURES,
}


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    # JSON has no tuples, so what was saved as a tuple comes back as a list.
    return {name: tuple(each) if isinstance(each, list) else each for name, each in values.items()}
