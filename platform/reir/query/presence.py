"""Calibrated presence: how likely the described instance is there, from an answer's scores.

Logistic models over a few features: of a gallery and one hit in it, of a photo and one box in it.
They are fitted on held-out expressions, half of them with their photo taken away, by
`reir_training.report.calibration`, and kept as `calibration.json` beside the weights.
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
"""Best photos whose scores are read."""

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
        return 1.0 / (1.0 + math.exp(-max(-60.0, min(60.0, logit))))


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What scores of one checkpoint mean.

    Attributes:
        digest: sha256 of the weights that the scores are of.
        gallery, hit: presence in a gallery, and of one hit.
        photo, box: presence in one photo, and of one of its instances.
        threshold, photo_threshold: presence from which on an answer counts as found.
        tie_margin: hits whose scores differ by no more cannot be told apart.
        about: what it was fitted on, and how well it did on the rest.
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
        """Whether an answer of this presence counts as found."""
        return presence is not None and presence >= self.threshold

    def of_gallery(self, best: Sequence[float], num_instances: int) -> float:
        """Presence in a gallery, from the scores of its best photos, best first."""
        return self.gallery(gallery_features(best, num_instances))

    def of_hit(self, score: float, best: Sequence[float], num_instances: int) -> float:
        """Presence of one hit: its own score among those of the best photos."""
        return self.hit(hit_features(score, best, num_instances))

    def of_photo(self, best: Sequence[float]) -> float:
        """Presence in a photo, from the scores of its instances, best first."""
        return self.photo(box_features(best[0], best))

    def of_box(self, score: float, best: Sequence[float]) -> float:
        """Presence of one instance of a photo, among the scores of all, best first."""
        return self.box(box_features(score, best))


def gallery_features(best: Sequence[float], num_instances: int) -> tuple[float, ...]:
    """Return `GALLERY_FEATURES` of an answer: those of its best hit."""
    return hit_features(best[0], best, num_instances)


def hit_features(score: float, best: Sequence[float], num_instances: int) -> tuple[float, ...]:
    """Return `HIT_FEATURES` of a hit.

    Args:
        score: of the hit.
        best: of the best photos (or instances of one photo), best first; not empty.
        num_instances: in the gallery.
    """
    first = best[:PHOTOS]
    rival = first[0] if score < first[0] else first[1] if len(first) > 1 else score
    spread = first[0] - sum(first) / len(first)
    return score, score - rival, spread, math.log10(1 + num_instances)


def box_features(score: float, best: Sequence[float]) -> tuple[float, ...]:
    """Return `PHOTO_FEATURES` of the best instance of a photo, or `BOX_FEATURES` of any."""
    return hit_features(score, best, 0)[: len(BOX_FEATURES)]


def load_calibration(folder: Path, digest: str) -> Calibration | None:
    """Read the calibration of a checkpoint; None where it has none, or one of other weights.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.pop("format") != FORMAT or values["digest"] != digest:
            return None  # of weights that were there before
        for name, features in _MODELS.items():
            values[name] = Logistic(**_tuples(values[name]))
            if values[name].features != features:
                raise ValueError(f"{name} has features {values[name].features}, not {features}")
        return Calibration(**values)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is no calibration: {error!r}; delete it, or fit it anew with `reir calibrate`"
        ) from error


def save_calibration(folder: Path, calibration: Calibration) -> Path:
    """Write the calibration beside the weights; returns its path."""
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
    return {name: tuple(each) if isinstance(each, list) else each for name, each in values.items()}
