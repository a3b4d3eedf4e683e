"""A folder of finished shards, from which an interrupted evaluation continues.

    DIR/<model digest>-<hash>/about.json    everything that the shards depend on
    DIR/<model digest>-<hash>/00012.npz     one finished shard

<hash> is the hash of about.json. So shards of another checkpoint or of other photos are never mixed
up with these, and several evaluations may share one DIR.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Generic, Protocol, Self, TypeVar

import numpy as np
import numpy.typing as npt

from reir.errors import DataError

logger = logging.getLogger(__name__)

ABOUT = "about.json"
DAMAGED = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)
"""What numpy raises for a file that is truncated or not an archive of ours."""


class Saved(Protocol):
    """The result of a shard, as the arrays that a file holds."""

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return the arrays under the names that they are saved by."""
        ...

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> Self:
        """Inverse of `to_arrays`; raises `KeyError` if an array is missing."""
        ...


T = TypeVar("T", bound=Saved)


class WorkFolder(Generic[T]):
    """The finished shards of one evaluation.

    Args:
        kind: class of the results.
        parent: the folder that the user names; created if it does not exist.
        about: plain JSON values that the shards depend on, including the `digest` of the model.

    Raises:
        DataError: the folder cannot be created.
    """

    def __init__(self, kind: type[T], parent: Path, about: Mapping[str, Any]) -> None:
        self._kind = kind
        text = json.dumps(about, indent=2, sort_keys=True)
        key = hashlib.sha256(text.encode()).hexdigest()
        self.path = parent / f"{about['digest'][:12]}-{key[:12]}"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            # Another process in this folder writes the same text: its hash is in the name.
            (self.path / ABOUT).write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise DataError(f"cannot create work folder {self.path}: {error.strerror}") from error

    def load(self, number: int) -> T | None:
        """Return a finished shard; None if there is none or its file is damaged."""
        path = self._file(number)
        if not path.exists():
            return None
        try:
            # A pickle in the folder could run code.
            with np.load(path, allow_pickle=False) as arrays:
                return self._kind.from_arrays(arrays)
        except DAMAGED as error:
            logger.warning("%s is damaged (%s); its photos are encoded again", path, error)
            return None

    def save(self, number: int, shard: T) -> None:
        """Write a shard; after an interruption its file is either complete or absent."""
        path = self._file(number)
        # The process id keeps two processes apart that save the same shard.
        part = path.with_suffix(f".{os.getpid()}.part")
        with part.open("wb") as file:
            np.savez(file, allow_pickle=False, **shard.to_arrays())
            # Otherwise, a power failure after the renaming could leave an empty file of that name.
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)

    def _file(self, number: int) -> Path:
        return self.path / f"{number:05d}.npz"
