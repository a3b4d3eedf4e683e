"""A cache on disk for the output of the frozen part of the model.

There is one memory-mapped array per field of `CandidateBatch`. A counter records how many photos
are done, so that an interrupted computation resumes. Each list of photos and each set of frozen
weights has its own cache folder.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from reir.images.decode import read_image
from reir.models.nano.candidates import CandidateExtractor
from reir.models.nano.encoder import fast_dtype
from reir.models.nano.model import CandidateBatch, ClareNano

BATCH = 8
# The large features; boxes and objectness take little space, so they keep full precision.
HALF = ("crops", "scene", "class_scores", "detector", "colors")


class PhotoFile(Protocol):
    """A photo, of which only its file counts here."""

    @property
    def path(self) -> Path:
        """The image file."""
        ...


class FrozenCache:
    """Reads the cached candidates of a list of photos.

    Args:
        folder: of the complete cache.

    Attributes:
        folder: the same folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._arrays = {
            path.stem: np.load(path, mmap_mode="r") for path in sorted(folder.glob("*.npy"))
        }

    def __len__(self) -> int:
        """Return the number of photos."""
        return len(self._arrays["valid"])

    def boxes(self, row: int) -> np.ndarray:
        """Return the (K', 4) boxes of a photo's candidates, without padding."""
        return np.asarray(self._arrays["boxes"][row][self._arrays["valid"][row]])

    def classes(self, row: int) -> np.ndarray:
        """Return the (K', 80) class scores of a photo's candidates in float32, without padding."""
        scores = self._arrays["class_scores"][row][self._arrays["valid"][row]]
        return np.asarray(scores, dtype=np.float32)

    def colors(self, row: int) -> np.ndarray:
        """Return the (K', 4, 4, 3) color grids of a photo's candidates, without padding."""
        return np.asarray(self._arrays["colors"][row][self._arrays["valid"][row]])

    def batch(self, rows: Sequence[int]) -> CandidateBatch:
        """Return the candidates of some photos, in float32."""
        values = {k: torch.from_numpy(v[np.asarray(rows)]) for k, v in self._arrays.items()}
        return CandidateBatch(
            **{k: v if v.dtype == torch.bool else v.float() for k, v in values.items()}
        )


def fingerprint(model: ClareNano, photos: Sequence[PhotoFile]) -> str:
    """Return the name of the cache: a hash of the photos, input settings and frozen weights."""
    config = asdict(model.config)
    inputs = {k: v for k, v in config.items() if k.endswith("_px") or k in _INPUT_SETTINGS}
    inputs["extraction"] = _EXTRACTION
    digest = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode())
    # Only frozen weights count: the trained ones do not change what is cached.
    for part in model.frozen_parts():
        for name, value in part.state_dict().items():
            digest.update(name.encode())
            digest.update(value.float().numpy().tobytes())
    for photo in photos:
        digest.update(str(photo.path).encode())
    return digest.hexdigest()[:16]


_INPUT_SETTINGS = ("num_candidates", "nms_iou", "crop_margin")

_EXTRACTION = 2
"""Increment this number when `CandidateExtractor` changes its output for the same inputs."""


def build_cache(
    root: Path,
    model: ClareNano,
    photos: Sequence[PhotoFile],
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Path:
    """Complete the cache, and return its folder for `FrozenCache`.

    Args:
        root: folder that contains the caches.
        model: model with the frozen weights; it is not changed.
        photos: all photos of the run.
        on_progress: called with the number of completed photos and of all photos.

    Raises:
        ImageError: a photo of the training set cannot be decoded.
    """
    folder = root / fingerprint(model, photos)
    folder.mkdir(parents=True, exist_ok=True)
    counter, unfinished = folder / "done.json", folder / "done.json.unfinished"
    done = json.loads(counter.read_text()) if counter.exists() else 0
    # Copy the model, because the extractor rounds its frozen part to bf16.
    extract = CandidateExtractor(copy.deepcopy(model), fast_dtype())
    # Opened after the first batch, which shows the shapes.
    arrays: dict[str, np.ndarray] = {}
    for start in range(done, len(photos), BATCH):
        part = photos[start : start + BATCH]
        batch = extract([read_image(p.path) for p in part])
        values = {k: _stored(k, v) for k, v in batch.tensors().items()}
        arrays = arrays or _open(folder, values, len(photos))
        for name, value in values.items():
            arrays[name][start : start + len(part)] = value
        # Updated after the arrays, so that an interrupted batch is computed again; and renamed,
        # because a kill during the write would leave it empty.
        unfinished.write_text(json.dumps(start + len(part)))
        unfinished.replace(counter)
        on_progress(start + len(part), len(photos))
    return folder


def _stored(name: str, value: Tensor) -> np.ndarray:
    """Convert features to half precision, which halves the disk space; the error is about 0.1 %.

    The other arrays are stored as they are.
    """
    return np.asarray(value.to(torch.float16).numpy() if name in HALF else value.numpy())


def _open(folder: Path, like: dict[str, np.ndarray], num: int) -> dict[str, np.ndarray]:
    """Open or create the arrays, with one row per photo."""
    out = {}
    for name, value in like.items():
        path = folder / f"{name}.npy"
        shape = (num, *value.shape[1:])
        if path.exists():
            out[name] = np.load(path, mmap_mode="r+")
        else:
            out[name] = np.lib.format.open_memmap(path, mode="w+", dtype=value.dtype, shape=shape)
    return out
