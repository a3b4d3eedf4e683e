"""Output of the frozen part of the model, computed once a photo and kept on disk.

One memory-mapped array a field of `CandidateBatch`. Written in batches with a counter, so that a
killed run goes on where it stopped. A cache belongs to one list of photos and one set of frozen
weights; anything else gets a folder of its own.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from reir.images import read_image
from reir.models.candidates import CandidateExtractor
from reir.models.clare_nano import CandidateBatch, ClareNano
from reir.models.nano_encoder import fast_dtype
from reir_training.examples import TrainPhoto

BATCH = 8
HALF = ("crops", "scene", "class_scores", "detector", "colours")


class FrozenCache:
    """Read access to the cached candidates of a list of photos."""

    def __init__(self, folder: Path) -> None:
        self._arrays = {
            path.stem: np.load(path, mmap_mode="r") for path in sorted(folder.glob("*.npy"))
        }

    def __len__(self) -> int:
        """Number of photos."""
        return len(self._arrays["valid"])

    def boxes(self, row: int) -> np.ndarray:
        """(K', 4) boxes of the real candidates of one photo."""
        return np.asarray(self._arrays["boxes"][row][self._arrays["valid"][row]])

    def colours(self, row: int) -> np.ndarray:
        """(K', 4, 4, 3) colour grids of the real candidates of one photo."""
        return np.asarray(self._arrays["colours"][row][self._arrays["valid"][row]])

    def batch(self, rows: Sequence[int]) -> CandidateBatch:
        """Candidates of some photos, in float32."""
        values = {k: torch.from_numpy(v[np.asarray(rows)]) for k, v in self._arrays.items()}
        return CandidateBatch(
            **{k: v if v.dtype == torch.bool else v.float() for k, v in values.items()}
        )


def fingerprint(model: ClareNano, photos: Sequence[TrainPhoto]) -> str:
    """Name of the cache: sha256 over photos, input settings and frozen weights, 16 hex digits."""
    config = asdict(model.config)
    inputs = {k: v for k, v in config.items() if k.endswith("_px") or k in _INPUT_SETTINGS}
    inputs["extraction"] = _EXTRACTION
    digest = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode())
    for part in model.frozen_parts():
        for name, value in part.state_dict().items():
            digest.update(name.encode())
            digest.update(value.float().numpy().tobytes())
    for photo in photos:
        digest.update(str(photo.path).encode())
    return digest.hexdigest()[:16]


_INPUT_SETTINGS = ("num_candidates", "nms_iou", "crop_margin")

_EXTRACTION = 2
"""Counts up when `CandidateExtractor` gives other numbers for the same photo and weights."""


def build_cache(
    root: Path,
    model: ClareNano,
    photos: Sequence[TrainPhoto],
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Path:
    """Compute what is missing of the cache; returns its folder, for `FrozenCache`.

    Args:
        root: folder that holds caches by fingerprint.
        model: with the frozen weights loaded; not changed.
        photos: every photo of the run.
        on_progress: called with photos done and in all.

    Raises:
        ImageError: a photo of the training set cannot be decoded.
    """
    folder = root / fingerprint(model, photos)
    folder.mkdir(parents=True, exist_ok=True)
    counter = folder / "done.json"
    done = json.loads(counter.read_text()) if counter.exists() else 0
    # a copy, since its frozen part is rounded to bf16
    extract = CandidateExtractor(copy.deepcopy(model), fast_dtype())
    arrays: dict[str, np.ndarray] = {}
    for start in range(done, len(photos), BATCH):
        part = photos[start : start + BATCH]
        batch = extract([read_image(p.path) for p in part])
        values = {k: _stored(k, v) for k, v in batch.tensors().items()}
        arrays = arrays or _open(folder, values, len(photos))
        for name, value in values.items():
            arrays[name][start : start + len(part)] = value
        counter.write_text(json.dumps(start + len(part)))
        on_progress(start + len(part), len(photos))
    return folder


def _stored(name: str, value: Tensor) -> np.ndarray:
    """Features are kept in half precision: a tenth of a percent, half the disk."""
    return np.asarray(value.to(torch.float16).numpy() if name in HALF else value.numpy())


def _open(folder: Path, like: dict[str, np.ndarray], num: int) -> dict[str, np.ndarray]:
    """Open or create the arrays, one row a photo."""
    out = {}
    for name, value in like.items():
        path = folder / f"{name}.npy"
        shape = (num, *value.shape[1:])
        if path.exists():
            out[name] = np.load(path, mmap_mode="r+")
        else:
            out[name] = np.lib.format.open_memmap(path, mode="w+", dtype=value.dtype, shape=shape)
    return out
