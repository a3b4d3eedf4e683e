"""How many Ray Train workers a run has: reading the option, and which numbers are possible."""

from __future__ import annotations

from reir.errors import ConfigError
from reir_training.config import Schedule

NumWorkers = int | tuple[int, int]
"""A number of Ray Train workers, or a minimum and a maximum."""


def parse_num_workers(text: str) -> NumWorkers:
    """Parse "4", or "2:8" for two to eight workers.

    Raises:
        ConfigError: the text has neither form.
    """
    parts = text.split(":")
    # `isdigit` also accepts digits of other scripts and superscripts, for which `int` may fail.
    numbers = [int(part) for part in parts if part.isascii() and part.isdigit()]
    if len(numbers) == len(parts) == 1 and numbers[0] > 0:
        return numbers[0]
    if len(numbers) == len(parts) == 2 and 0 < numbers[0] <= numbers[1]:
        return numbers[0], numbers[1]
    raise ConfigError(
        f"--num-workers {text!r} is invalid: use a number such as 4, or a range such as 2:8"
    )


def shares_evenly(settings: Schedule, num_workers: int) -> bool:
    """Return whether the photos of a step divide evenly among the workers and their parts."""
    return settings.photos_per_batch % (num_workers * settings.accumulate_steps) == 0


def check_shares(settings: Schedule, num_workers: NumWorkers) -> None:
    """Check that the photos of a step divide evenly among the workers.

    Raises:
        ConfigError: they do not, for any number in the range.
    """
    fewest, most = (num_workers,) * 2 if isinstance(num_workers, int) else num_workers
    # An elastic run needs only one possible number; `EvenScalingPolicy` avoids the others.
    if not any(shares_evenly(settings, n) for n in range(fewest, most + 1)):
        workers = f"{fewest}" if fewest == most else f"{fewest} to {most}"
        raise ConfigError(
            f"photos_per_batch={settings.photos_per_batch} cannot be shared by {workers} workers "
            f"with accumulate_steps={settings.accumulate_steps}: set "
            "photos_per_batch to a multiple of the product of both numbers"
        )
