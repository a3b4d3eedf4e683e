"""Recall and false alarms of the decision whether one photo has the described instance.

A search for every photo decides by a threshold on the presence in a photo. `PhotoCurve` says how
often such decisions were right when the calibration was fitted. From it follow the threshold that
reaches a precision or a recall, and what to expect of any threshold.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from reir.errors import QueryError

DEFAULT_MIN_PRESENCE = 0.7
"""A photo is found from this presence on, unless the user chooses another threshold. A compromise,
chosen on `val`: a lower one finds more of the right photos, but many more wrong ones."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """The threshold of a search for every photo, and how often it should be right.

    Attributes:
        min_presence: a photo is found if its presence is at least this.
        recall: probability that a photo with the described instance is found.
        precision: share of the found photos that have the described instance, if exactly one photo
            of the gallery has it; None if the API key may not know how many photos there are.
    """

    min_presence: float
    recall: float
    precision: float | None


@dataclass(frozen=True, kw_only=True)
class PhotoCurve:
    """How often decisions about single photos were right, for several thresholds.

    Attributes:
        thresholds: presences in a photo, ascending.
        recalls: for each threshold, the share of the photos with the described instance that reach
            it.
        false_alarms: for each threshold, the share of the other photos that reach it.

    Raises:
        ValueError: the numbers do not form a curve.
    """

    thresholds: tuple[float, ...]
    recalls: tuple[float, ...]
    false_alarms: tuple[float, ...]

    def __post_init__(self) -> None:
        """Check lengths, order and range."""
        columns = (self.thresholds, self.recalls, self.false_alarms)
        if not self.thresholds or len({len(each) for each in columns}) != 1:
            raise ValueError(
                "thresholds, recalls and false alarms must be equally many, at least 1"
            )
        values = np.array(columns)
        if not ((values >= 0) & (values <= 1)).all() or (np.diff(values[0]) <= 0).any():
            raise ValueError("all values must be from 0 to 1, and thresholds must ascend")

    def at(self, threshold: float, num_photos: int) -> Decision:
        """Return what to expect of a threshold in a gallery, interpolated between the points.

        Args:
            threshold: presence in a photo, in [0, 1].
            num_photos: number of photos in the gallery.
        """
        recall, precision = self._expected(threshold, num_photos)
        return Decision(min_presence=threshold, recall=recall, precision=precision)

    def for_precision(self, precision: float, num_photos: int) -> Decision:
        """Return the lowest threshold of the curve that should reach a precision in a gallery.

        Raises:
            QueryError: no threshold reaches it; the message says which precision is possible.
        """
        expected = {each: self._expected(each, num_photos) for each in self.thresholds}
        for threshold, (_, reached) in expected.items():
            if reached >= precision:
                return self.at(threshold, num_photos)
        best, (recall, highest) = max(expected.items(), key=lambda each: each[1][1])
        raise QueryError(
            "precision",
            f"{precision:g} cannot be expected in a gallery of {num_photos:,} photos if only one "
            f"of them has the object. The highest is {highest:.2g}, with a recall of "
            f"{recall:.2g}: use min_presence {best:.3g}, or ask for less",
        )

    def for_recall(self, recall: float, num_photos: int) -> Decision:
        """Return the highest threshold of the curve that should reach a recall in a gallery.

        The threshold is 0, which finds every photo, if no point of the curve reaches the recall.
        """
        every = [self.at(threshold, num_photos) for threshold in self.thresholds]
        enough = [each for each in every if each.recall >= recall]
        return enough[-1] if enough else self.at(0.0, num_photos)

    def _expected(self, threshold: float, num_photos: int) -> tuple[float, float]:
        """Return the recall and the precision of a threshold in a gallery."""
        # Every photo reaches 0. What reaches the last point is all that is known of higher
        # thresholds; no presence reaches 1.
        points = (0.0, *self.thresholds, 1.0)
        recall = float(np.interp(threshold, points, (1.0, *self.recalls, 0.0)))
        alarms = (1.0, *self.false_alarms, self.false_alarms[-1])
        false = float(np.interp(threshold, points, alarms)) * max(0, num_photos - 1)
        return recall, recall / (recall + false) if recall else 0.0
