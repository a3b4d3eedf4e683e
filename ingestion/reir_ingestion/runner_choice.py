"""Chooses the runner of an indexing job: threads of this process, or Ray Data.

`auto` chooses Ray Data if there is more hardware than one process can use:

    RAY_ADDRESS is set                             the user has named a cluster
    this machine has more than one GPU             one process uses only one
    it has at least MANY_CORES cores, and the      the job is long enough to make up for the
      source has at least LARGE_SOURCE files       start of Ray

Otherwise it chooses threads. They need no start-up, pass photos on without copying them, and are
faster on few cores (`benchmarks/indexing.py`). This module imports neither runner, so that Ray is
imported only where it is used.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice
from typing import TYPE_CHECKING

from reir.cores import num_cores
from reir.errors import ConfigError

if TYPE_CHECKING:
    from reir_ingestion.sources import Source

MANY_CORES = 8
LARGE_SOURCE = 5_000
EXTRA = "pip install 'reir-platform[ingestion]'"


class RunnerName(StrEnum):
    """The values of `--runner`."""

    AUTO = "auto"
    LOCAL = "local"
    RAY = "ray"


@dataclass(frozen=True)
class RunnerChoice:
    """The chosen runner, LOCAL or RAY, and the reason."""

    name: RunnerName
    reason: str

    def __str__(self) -> str:
        where = "Ray Data" if self.name is RunnerName.RAY else "threads of this process"
        return f"Runner: {where} ({self.reason})"


def num_gpus() -> int:
    """Return the number of GPUs of this machine."""
    import torch

    return torch.cuda.device_count()


def choose_runner(
    requested: RunnerName,
    source: Source,
    *,
    cores: int | None = None,
    gpus: Callable[[], int] = num_gpus,
) -> RunnerChoice:
    """Return the runner that was requested; for AUTO, choose one by the rule above.

    Args:
        requested: the value of `--runner`.
        source: the source, which is listed only as far as the rule needs.
        cores: number of cores of this machine; None counts them.
        gpus: function that counts the GPUs of this machine.

    Raises:
        ConfigError: Ray was requested and is not installed.
    """
    installed = importlib.util.find_spec("ray") is not None  # does not import it
    if requested is RunnerName.RAY and not installed:
        raise ConfigError(
            f"--runner ray needs Ray, which is not installed. Install it with: {EXTRA}"
        )
    if requested is not RunnerName.AUTO:
        return RunnerChoice(requested, "as requested")
    if not installed:
        return RunnerChoice(RunnerName.LOCAL, "Ray is not installed")
    if address := os.environ.get("RAY_ADDRESS"):
        return RunnerChoice(RunnerName.RAY, f"RAY_ADDRESS is {address}")
    cores = num_cores() if cores is None else cores
    if cores >= MANY_CORES and _is_large(source):
        return RunnerChoice(RunnerName.RAY, f"{cores} cores and at least {LARGE_SOURCE:,} files")
    # Last, because counting GPUs imports torch, which takes seconds.
    if (found := gpus()) > 1:
        return RunnerChoice(RunnerName.RAY, f"{found} GPUs")
    reason = f"fewer than {MANY_CORES} cores or {LARGE_SOURCE:,} files, and at most one GPU"
    return RunnerChoice(RunnerName.LOCAL, reason)


def _is_large(source: Source) -> bool:
    return sum(1 for _ in islice(source.uris(), LARGE_SOURCE)) == LARGE_SOURCE
