"""How many images of a job may fail before it stops. Knows ledger rows, no store."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from reir.errors import ConfigError, TooManyFailures
from reir.records import ImageRecord

MIN_IMAGES = 1000
"""A share is taken of at least so many images, so that the first bad ones do not stop a job."""

_NUM_REASONS = 3


@dataclass(frozen=True)
class FailureLimit:
    """A number of images, or a share of those in the source.

    Attributes:
        text: as the user wrote it.
        value: images, or a share from 0 to 1.
        is_share: which of the two.
    """

    text: str
    value: float
    is_share: bool

    @classmethod
    def parse(cls, text: str) -> FailureLimit:
        """Parse `100` or `1.5%`.

        Raises:
            ConfigError: it is neither.
        """
        found = re.fullmatch(r"(\d+)|(\d+(?:\.\d+)?)\s*%", text.strip())
        if found is None or float(found[2] or 0) > 100:
            raise ConfigError(
                f"max_failures must be a number of images or a share, such as 100 or 1%, "
                f"got {text!r}"
            )
        share = found[2] is not None
        return cls(text, float(found[2]) / 100 if share else int(found[1]), share)

    def allowed(self, num_images: int) -> int:
        """How many of so many images may fail."""
        return int(self.value * max(num_images, MIN_IMAGES)) if self.is_share else int(self.value)


@dataclass
class FailureBudget:
    """Counts the images that a job tries, and stops it when too many of them fail.

    Attributes:
        limit: None never stops it.
    """

    limit: FailureLimit | None
    _tried: int = 0
    _reasons: Counter[str] = field(default_factory=Counter)
    _examples: dict[str, ImageRecord] = field(default_factory=dict)

    def spend(self, records: Iterable[ImageRecord], num_listed: int | None) -> None:
        """Take ledger rows that were just written.

        Args:
            records: failed or not; those known from earlier runs do not count.
            num_listed: images in the source, None while that is not known.

        Raises:
            TooManyFailures: more failed than are allowed; the message names reasons and examples.
        """
        for record in records:
            self._tried += 1
            if record.status == "failed":
                self._reasons[record.reason] += 1
                self._examples.setdefault(record.reason, record)
        if self.limit is None:
            return
        failed = self._reasons.total()
        allowed = self.limit.allowed(self._tried if num_listed is None else num_listed)
        if failed > allowed:
            raise TooManyFailures(
                f"{failed:,} of the {self._tried:,} images tried have failed, max_failures "
                f"{self.limit.text} allows {allowed:,}: {self._most_frequent()}. What was written "
                f"stays. Mend the files or their access, or raise the limit, and run the same "
                f"command; `reir failures` lists what failed"
            )

    def _most_frequent(self) -> str:
        return "; ".join(
            f"{reason} {number:,} (such as {self._examples[reason].uri}: "
            f"{self._examples[reason].detail})"
            for reason, number in self._reasons.most_common(_NUM_REASONS)
        )
