"""Which runner indexes: threads within this process, or Ray Data. Imports neither of them.

`auto` takes Ray where it has more to work with than one process can use:

    RAY_ADDRESS is set                                 a cluster was named
    this machine has more than one GPU                 a process drives one
    it has MANY_CORES cores, the source LARGE_SOURCE   starting Ray pays off
      files or more

and otherwise threads, which need no start-up, hand photos on without copying them, and on few cores
are the faster of the two (`benchmarks/p4_indexing.py`).
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
    """What `--runner` takes."""

    AUTO = "auto"
    LOCAL = "local"
    RAY = "ray"


@dataclass(frozen=True)
class Choice:
    """The runner to take, LOCAL or RAY, and why."""

    name: RunnerName
    why: str

    def __str__(self) -> str:
        where = "Ray Data" if self.name is RunnerName.RAY else "this process"
        return f"runner: {where} ({self.why})"


def num_gpus() -> int:
    """Return the number of GPUs of this machine."""
    import torch

    return torch.cuda.device_count()


def choose_runner(
    asked: RunnerName,
    source: Source,
    *,
    cores: int | None = None,
    gpus: Callable[[], int] = num_gpus,
) -> Choice:
    """Return the runner that was asked for, or by the rule above the one that suits.

    Args:
        asked: what the user said.
        source: only as much of it is listed as the rule needs.
        cores: of this machine; None counts them.
        gpus: counts the GPUs of this machine.

    Raises:
        ConfigError: Ray was asked for and is not installed.
    """
    installed = importlib.util.find_spec("ray") is not None
    if asked is RunnerName.RAY and not installed:
        raise ConfigError(f"--runner ray needs Ray, which is not installed; {EXTRA}")
    if asked is not RunnerName.AUTO:
        return Choice(asked, "asked for")
    if not installed:
        return Choice(RunnerName.LOCAL, "Ray is not installed")
    if address := os.environ.get("RAY_ADDRESS"):
        return Choice(RunnerName.RAY, f"RAY_ADDRESS is {address}")
    cores = num_cores() if cores is None else cores
    if cores >= MANY_CORES and _is_large(source):
        return Choice(RunnerName.RAY, f"{cores} cores and {LARGE_SOURCE:,} files or more")
    if (found := gpus()) > 1:
        return Choice(RunnerName.RAY, f"{found} GPUs")
    few = f"fewer than {MANY_CORES} cores or {LARGE_SOURCE:,} files, and no second GPU"
    return Choice(RunnerName.LOCAL, few)


def _is_large(source: Source) -> bool:
    return sum(1 for _ in islice(source.uris(), LARGE_SOURCE)) == LARGE_SOURCE
