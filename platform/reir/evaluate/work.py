"""A work folder: finished shards on disk, so that a killed evaluation goes on from them.

    DIR/<encoder>-<what was asked>/about.json    what these shards were made of
    DIR/<encoder>-<what was asked>/00012.npz     one finished shard

Everything that a shard depends on is in the folder's name, as a hash. So shards of another
checkpoint or of other photos are never taken for these, and several evaluations may share a DIR.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from reir.errors import DataError
from reir.evaluate.shards import EncodedShard

logger = logging.getLogger(__name__)

ABOUT = "about.json"
DAMAGED = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)
"""What numpy raises on a file that is cut short or no archive of ours."""


class WorkFolder:
    """The finished shards of one evaluation.

    Args:
        parent: the folder that the user names; made when absent.
        about: plain JSON values that say what the shards depend on; `digest` is among them.

    Raises:
        DataError: the folder cannot be made.
    """

    def __init__(self, parent: Path, about: Mapping[str, Any]) -> None:
        told = json.dumps(about, indent=2, sort_keys=True)
        key = hashlib.sha256(told.encode()).hexdigest()
        self.path = parent / f"{about['digest'][:12]}-{key[:12]}"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / ABOUT).write_text(told + "\n", encoding="utf-8")
        except OSError as error:
            raise DataError(f"work folder {self.path} cannot be made: {error.strerror}") from error

    def load(self, number: int) -> EncodedShard | None:
        """Return a finished shard, None where there is none or it is damaged."""
        path = self._file(number)
        if not path.exists():
            return None
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return EncodedShard.from_arrays(arrays)
        except DAMAGED as error:
            logger.warning("%s is damaged (%s); its photos are encoded again", path, error)
            return None

    def save(self, number: int, shard: EncodedShard) -> None:
        """Write a shard; a kill at any moment leaves a whole file or none."""
        path = self._file(number)
        part = path.with_suffix(f".{os.getpid()}.part")
        with part.open("wb") as file:
            np.savez(file, allow_pickle=False, **shard.to_arrays())
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)

    def _file(self, number: int) -> Path:
        return self.path / f"{number:05d}.npz"
