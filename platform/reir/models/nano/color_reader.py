"""`ColorReader`: compares the colors that an expression names with the pixels of an instance."""

# Shapes: N instances, M color words, V views, s side of a view in pixels, S what is read of a text

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from reir.datasets.generated_expressions import COLOR_WORDS, COLORS
from reir.models.color_reading import ColorReading
from reir.models.cpu_engine import CpuEngine
from reir.models.nano.candidates import crop_boxes, crop_frames
from reir.models.nano.color_head import (
    CELL_SIDE,
    GRID,
    NUM_CELLS,
    NUM_VIEWS,
    CellBatch,
    ColorHead,
    ColorHeadConfig,
    places_of,
)
from reir.models.nano.crop_network import CropNetwork
from reir.models.nano.encoder import fast_dtype, tokenize
from reir.models.nano.model import ClareNano
from reir.records import FloatArray, RgbImage

STRIDE_16 = 3
"""Level of the crop network."""
VIEW_PX = 16 * GRID
SURROUNDINGS = 1.0
"""The second view adds this share of the box's side on each side of the box."""
COVER = "[MASK]"
MAX_CACHED = 256
"""Expressions whose covered words are kept in memory, each some kilobytes."""


def color_head_for(model: ClareNano, shape: Mapping[str, Any]) -> ColorHead:
    """Build a color head that fits a model.

    Args:
        model: whose features and token states the head reads.
        shape: fields of `ColorHeadConfig`.
    """
    channels = model.crop_network.level_channels[STRIDE_16]
    return ColorHead(ColorHeadConfig(**shape), channels, 2 * model.text.tower.width)


class CoveredWord(NamedTuple):
    """A color word of an expression.

    Attributes:
        word: as it is written.
        position: of its token.
        ids: token ids of the expression, with that token covered.
    """

    word: str
    position: int
    ids: Tensor


class ColorReader:
    """A color head with the parts of its `ClareNano`, prepared for the CPU; thread-safe.

    Args:
        model: for which the head was trained.
        tokenizer: of the text tower.
        head: trained head.
    """

    def __init__(self, model: ClareNano, tokenizer: Tokenizer, head: ColorHead) -> None:
        self._parts = ColorParts(model, tokenizer)
        self._head = head.eval().requires_grad_(False)
        # A search asks for the same expression about each of its first hits.
        self._covered = lru_cache(MAX_CACHED)(self._cover)

    def read(
        self, image: RgbImage, asked: Sequence[tuple[FloatArray, str]]
    ) -> list[list[ColorReading]]:
        """Return the readings of the color words of each expression, in the order given.

        Args:
            image: upright photo.
            asked: (4,) box, xyxy in [0, 1], and an expression about the instance in it.
        """
        covered = [self._covered(text) for _, text in asked]
        rows = [row for row, (words, _) in enumerate(covered) for _ in words]
        readings: list[list[ColorReading]] = [[] for _ in asked]
        if not rows:
            return readings
        boxes = np.stack([asked[row][0] for row in rows])
        unique, index = np.unique(boxes, axis=0, return_inverse=True)
        cells = self._parts.cells(image, unique).take(torch.from_numpy(index.reshape(-1)))
        with torch.inference_mode():
            logits = self._head(cells, torch.cat([states for _, states in covered]))
        words = [each for of_text, _ in covered for each in of_text]
        for row, word, shares in zip(rows, words, logits.softmax(1).tolist(), strict=True):
            probability = shares[COLOR_WORDS.index(COLORS[word.word])]
            likely = int(np.argmax(shares))
            readings[row].append(
                ColorReading(
                    word=word.word,
                    probability=probability,
                    likely=COLOR_WORDS[likely],
                    likely_probability=shares[likely],
                )
            )
        return readings

    def _cover(self, text: str) -> tuple[list[CoveredWord], Tensor]:
        words = self._parts.cover(text)
        return words, self._parts.states(words)


class ColorParts:
    """The frozen parts of a `ClareNano` that a color head reads.

    Args:
        model: its crop network and its text tower are used.
        tokenizer: of the text tower.
    """

    def __init__(self, model: ClareNano, tokenizer: Tokenizer) -> None:
        model.eval()  # or the text tower would drop a tenth of its states at random
        self._network, self._tower = model.crop_network, model.text.tower
        self._tokenizer, self._max_tokens = tokenizer, model.config.max_tokens
        # BERT's vocabulary has a token for each of these words.
        self._colors = {tokenizer.token_to_id(word): word for word in COLORS}
        vocabulary = tokenizer.get_vocab()
        self._continuations = {vocabulary[word] for word in vocabulary if word.startswith("##")}
        self._cover: int = tokenizer.token_to_id(COVER)  # type: ignore[assignment]

    def cover(self, text: str) -> list[CoveredWord]:
        """Return the color words of an expression."""
        ids, _ = tokenize(self._tokenizer, [text], self._max_tokens)
        return list(self._covered(ids[0]))

    def _covered(self, ids: Tensor) -> Iterator[CoveredWord]:
        tokens = ids.tolist()
        for position, token in enumerate(tokens):
            # In "whiteboard", which is two tokens, "white" is not a word.
            if token in self._colors and tokens[position + 1] not in self._continuations:
                covered = ids.clone()
                covered[position] = self._cover
                yield CoveredWord(self._colors[token], position, covered)

    def states(self, words: Sequence[CoveredWord]) -> Tensor:
        """(M, S) states of the covered tokens, beside the means over all tokens."""
        if not words:
            return torch.zeros(0, 2 * self._tower.width)
        ids = nn.utils.rnn.pad_sequence([each.ids for each in words], batch_first=True)
        positions = torch.tensor([each.position for each in words])
        with (
            torch.inference_mode(),
            torch.autocast("cpu", fast_dtype(), fast_dtype() != torch.float32),
        ):
            states = self._tower(ids, (ids > 0).long()).float()
        real = (ids > 0)[..., None]
        means = (states * real).sum(1) / real.sum(1)
        return torch.cat([states[torch.arange(len(words)), positions], means], dim=1)

    def cells(self, image: RgbImage, boxes: FloatArray) -> CellBatch:
        """Return the cells around N boxes, xyxy in [0, 1]."""
        views = (boxes, 0.0), (boxes, SURROUNDINGS), (np.tile([0, 0, 1, 1], (len(boxes), 1)), 0.0)
        crops = torch.stack([crop_boxes(image, b, VIEW_PX, margin) for b, margin in views], dim=1)
        (features,) = self._run(crops.flatten(0, 1))
        height, width = image.shape[:2]
        frames = np.stack([crop_frames(image, b, margin) for b, margin in views], axis=1)
        frames = frames / np.array([width, height] * 2)
        corner, sides = np.tile(frames[..., :2], 2), np.tile(frames[..., 2:] - frames[..., :2], 2)
        return CellBatch(
            features=features.reshape(len(boxes), NUM_CELLS, features.shape[-1]),
            pixels=_pixels(crops),
            places=places_of(torch.from_numpy((boxes[:, None] - corner) / sides).float()),
        )

    @cached_property
    def _run(self) -> CpuEngine:
        pixels = torch.zeros(1, VIEW_PX, VIEW_PX, 3, dtype=torch.uint8)
        return CpuEngine(_CellFeatures(self._network), pixels, dtype=fast_dtype())


class _CellFeatures(nn.Module):
    """The crop network: (N, s, s, 3) uint8 views -> (N, G * G, C) features."""

    def __init__(self, network: CropNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, squares: Tensor) -> Tensor:
        level = self.network.levels(squares.permute(0, 3, 1, 2).float())[STRIDE_16]
        return level.flatten(2).transpose(1, 2)


def _pixels(crops: Tensor) -> Tensor:
    """(N, V, s, s, 3) uint8 -> (N, K, P, 3) uint8, the mean RGB of parts of each cell."""
    side = VIEW_PX // (GRID * CELL_SIDE)
    shape = (len(crops), NUM_VIEWS, GRID, CELL_SIDE, side, GRID, CELL_SIDE, side, 3)
    parts = crops.view(shape).float().mean((4, 7)).round().to(torch.uint8)
    return parts.permute(0, 1, 2, 4, 3, 5, 6).reshape(len(crops), NUM_CELLS, CELL_SIDE**2, 3)
