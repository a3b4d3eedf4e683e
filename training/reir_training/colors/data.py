"""The color words of expressions and captions, with what a frozen `clare-nano` computes for them.

A caption is about the whole photo; it is only trained on. What is computed is stored, one file for
each photo.
"""

# Shapes: B boxes and M color words of one photo, N words of a step; see `CellBatch` for the others

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from reir.checkpoint import load_model, weights_digest
from reir.datasets.generated_expressions import COLOR_WORDS, COLORS, names_color
from reir.errors import ConfigError
from reir.images.decode import read_image
from reir.models.nano.color_head import CELL_SIDE, GRID, CellBatch
from reir.models.nano.color_reader import SURROUNDINGS, ColorParts
from reir.records import FloatArray
from reir_training.data.examples import VAL, TrainPhoto

_WHOLE = np.array([0, 0, 1, 1], np.float32)


@dataclass
class ColorBatch:
    """The input of one step: N covered color words.

    Attributes:
        cells: around the instances.
        states: (N, S) of the covered tokens.
        colors: (N,) index of the right color in `COLOR_WORDS`.
    """

    cells: CellBatch
    states: Tensor
    colors: Tensor

    def to(self, device: torch.device | str) -> ColorBatch:
        """Return the batch on a device."""
        return ColorBatch(self.cells.to(device), self.states.to(device), self.colors.to(device))


@dataclass(frozen=True)
class _PhotoColors:
    """The color words of one photo.

    Attributes:
        cells: around B boxes.
        states: (M, S).
        boxes: (M,) row of the box in `cells`.
        colors: (M,).
    """

    cells: CellBatch
    states: Tensor
    boxes: Tensor
    colors: Tensor


class ColorExamples:
    """All color words of some photos.

    Args:
        photos: with color words.
        cache: folder of a complete cache of them.
    """

    def __init__(self, photos: Sequence[TrainPhoto], cache: Path) -> None:
        read = [_load(_file(cache, each)) for each in photos]
        first = np.cumsum([0, *(len(each.cells) for each in read)])[:-1].tolist()
        self._cells = CellBatch.joined([each.cells for each in read])
        self._states = torch.cat([each.states for each in read])
        self._colors = torch.cat([each.colors for each in read])
        self._boxes = torch.cat([each.boxes + n for each, n in zip(read, first, strict=True)])

    def __len__(self) -> int:
        """Return the number of color words."""
        return len(self._colors)

    def batch(self, rows: Sequence[int], rng: np.random.Generator | None = None) -> ColorBatch:  # noqa: ARG002 - as all makers of batches
        """Return some of the words."""
        index = torch.tensor(rows)
        return ColorBatch(
            self._cells.take(self._boxes[index]), self._states[index].float(), self._colors[index]
        )


def with_color_words(photos: Sequence[TrainPhoto]) -> list[TrainPhoto]:
    """Return the photos about which some sentence names a color.

    Raises:
        ConfigError: there is no training photo among them.
    """
    named = [each for each in photos if any(names_color(text) for _, text in _sentences(each))]
    if all(each.split == VAL for each in named):
        raise ConfigError(
            "no sentence about a training photo names a color: add photos with expressions or "
            "captions that do"
        )
    return named


def _sentences(photo: TrainPhoto) -> Iterator[tuple[FloatArray, str]]:
    """Yield the (4,) box that each sentence is about, and the sentence."""
    yield from ((photo.boxes[each.box], each.text) for each in photo.expressions)
    if photo.split != VAL:
        yield from ((_WHOLE, text) for text in photo.captions)


def build_color_cache(
    root: Path,
    photos: Sequence[TrainPhoto],
    init: Path,
    on_progress: Callable[[int], None] = lambda _: None,
) -> Path:
    """Run the frozen parts on all photos that are not done yet, and return the folder.

    Args:
        root: folder that contains the caches.
        photos: with color words.
        init: checkpoint directory of the model.
        on_progress: called with the number of finished photos.

    Raises:
        ImageError: a photo cannot be read.
    """
    inputs = json.dumps([weights_digest(init), GRID, CELL_SIDE, SURROUNDINGS])
    folder = root / f"colors-{hashlib.sha256(inputs.encode()).hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    missing = [each for each in photos if not _file(folder, each).exists()]
    if missing:
        parts = ColorParts(*load_model(init))
        for done, photo in enumerate(missing, start=1 + len(photos) - len(missing)):
            _save(_file(folder, photo), _read(photo, parts))
            on_progress(done)
    return folder


def _read(photo: TrainPhoto, parts: ColorParts) -> _PhotoColors:
    """Run the frozen parts on one photo and its expressions."""
    words = [(box, word) for box, text in _sentences(photo) for word in parts.cover(text)]
    # There are none if the only color is beyond what the text tower reads.
    about = np.array([box for box, _ in words], np.float32).reshape(-1, 4)
    boxes, rows = np.unique(about, axis=0, return_inverse=True)
    colors = [COLOR_WORDS.index(COLORS[word.word]) for _, word in words]
    return _PhotoColors(
        parts.cells(read_image(photo.path), boxes),
        parts.states([word for _, word in words]),
        torch.from_numpy(rows.reshape(-1)),
        torch.tensor(colors, dtype=torch.long),
    )


def _file(folder: Path, photo: TrainPhoto) -> Path:
    """Return the file of a photo, whose name changes with the sentences."""
    sentences = [(text, box.tolist()) for box, text in _sentences(photo)]
    about = json.dumps([str(photo.path), sentences])
    return folder / f"{hashlib.sha256(about.encode()).hexdigest()[:24]}.npz"


def _save(path: Path, colors: _PhotoColors) -> None:
    # Renamed when complete, so that an interrupted run leaves no damaged file.
    unfinished = path.with_suffix(".unfinished.npz")
    cells = colors.cells
    np.savez(
        unfinished,
        # Half precision, which halves the disk space; the error is about .1 %.
        features=cells.features.half().numpy(),
        pixels=cells.pixels.numpy(),
        places=cells.places.half().numpy(),
        states=colors.states.half().numpy(),
        boxes=colors.boxes.numpy(),
        colors=colors.colors.numpy(),
    )
    unfinished.rename(path)


def _load(path: Path) -> _PhotoColors:
    with np.load(path) as stored:
        value = {name: torch.from_numpy(stored[name]) for name in stored.files}
    cells = CellBatch(value["features"], value["pixels"], value["places"])
    return _PhotoColors(cells, value["states"], value["boxes"], value["colors"])
