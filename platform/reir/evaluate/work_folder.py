"""A folder of finished shards, from which an interrupted evaluation continues.

    DIR/<encoder digest>-<hash>/about.json    everything that the shards depend on
    DIR/<encoder digest>-<hash>/00012.npz     one finished shard

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
from typing import Any

import numpy as np

from reir.errors import DataError
from reir.evaluate.shards import EncodedShard

logger = logging.getLogger(__name__)

ABOUT = "about.json"
DAMAGED = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)
"""What numpy raises for a file that is truncated or not an archive of ours."""


class WorkFolder:
    """The finished shards of one evaluation.

    Args:
        parent: the folder that the user names; created if it does not exist.
        about: plain JSON values that the shards depend on, including the encoder's `digest`.

    Raises:
        DataError: the folder cannot be created.
    """

    def __init__(self, parent: Path, about: Mapping[str, Any]) -> None:
        text = json.dumps(about, indent=2, sort_keys=True)
        key = hashlib.sha256(text.encode()).hexdigest()
        self.path = parent / f"{about['digest'][:12]}-{key[:12]}"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / ABOUT).write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise DataError(f"cannot create work folder {self.path}: {error.strerror}") from error

    def load(self, number: int) -> EncodedShard | None:
        """Return a finished shard; None if there is none or its file is damaged."""
        path = self._file(number)
        if not path.exists():
            return None
        try:
            # A pickle in the folder could run code.
            with np.load(path, allow_pickle=False) as arrays:
                return EncodedShard.from_arrays(arrays)
        except DAMAGED as error:
            logger.warning("%s is damaged (%s); its photos are encoded again", path, error)
            return None

    def save(self, number: int, shard: EncodedShard) -> None:
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
