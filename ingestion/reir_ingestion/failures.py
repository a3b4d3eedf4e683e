"""Stops a job when too many of its images fail. Does not access the store."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from fractions import Fraction

from reir.errors import ConfigError, TooManyFailures
from reir.records import ImageRecord

MIN_IMAGES = 1000
"""A percentage is taken of at least this many images, so that the first few bad ones do not stop a
job."""

_NUM_REASONS = 3


@dataclass(frozen=True)
class FailureLimit:
    """The number of images that may fail, or the fraction of the images in the source.

    Attributes:
        text: the limit as the user wrote it.
        value: number of images, or a fraction from 0 to 1.
        is_fraction: whether `value` is a fraction.
    """

    text: str
    value: Fraction
    is_fraction: bool

    @classmethod
    def parse(cls, text: str) -> FailureLimit:
        """Parse `100` or `1.5%`.

        Raises:
            ConfigError: the text is neither.
        """
        found = re.fullmatch(r"(\d+)|(\d+(?:\.\d+)?)\s*%", text.strip())
        if found is None or float(found[2] or 0) > 100:
            raise ConfigError(
                f"max_failures must be a number of images or a percentage, such as 100 or 1%, "
                f"got {text!r}"
            )
        is_fraction = found[2] is not None
        # Exact, because 0.7% of 1,000 as a float is less than 7.
        return cls(
            text, Fraction(found[2]) / 100 if is_fraction else Fraction(found[1]), is_fraction
        )

    def allowed(self, num_images: int) -> int:
        """Return how many of `num_images` may fail."""
        of_images = max(num_images, MIN_IMAGES) if self.is_fraction else 1
        return int(self.value * of_images)


@dataclass
class FailureBudget:
    """Counts the images that a job tries, and stops it when too many of them fail.

    Attributes:
        limit: the limit; None never stops the job.
    """

    limit: FailureLimit | None
    _tried: int = 0
    _reasons: Counter[str] = field(default_factory=Counter)
    _examples: dict[str, ImageRecord] = field(default_factory=dict)

    def spend(self, records: Iterable[ImageRecord], num_listed: int | None) -> None:
        """Count ledger rows that were just written.

        Args:
            records: rows of this run, failed or not; failures of earlier runs do not count.
            num_listed: number of images in the source; None until the listing has ended.

        Raises:
            TooManyFailures: more images failed than allowed; the error names reasons and examples.
        """
        for record in records:
            self._tried += 1
            if record.status == "failed":
                self._reasons[record.reason] += 1
                self._examples.setdefault(record.reason, record)
        if self.limit is None:
            return
        failed = self._reasons.total()
        # Until the size of the source is known, a percentage refers to the images tried so far.
        allowed = self.limit.allowed(self._tried if num_listed is None else num_listed)
        if failed > allowed:
            raise TooManyFailures(
                f"{failed:,} of the {self._tried:,} images tried have failed, but max_failures "
                f"{self.limit.text} allows only {allowed:,}: {self._most_frequent()}. Everything "
                f"written so far is kept. Fix the files or the access to them, or raise the limit, "
                f"and run the same command again; `reir failures` lists what failed"
            )

    def _most_frequent(self) -> str:
        return "; ".join(
            f"{reason} {number:,} (such as {self._examples[reason].uri}: "
            f"{self._examples[reason].detail})"
            for reason, number in self._reasons.most_common(_NUM_REASONS)
        )
