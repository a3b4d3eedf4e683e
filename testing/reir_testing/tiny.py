"""A `clare-nano` small enough for unit tests, with tokenizer and candidates. Knows no training."""

# Shapes: B photos, K candidates a photo

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from reir.models.nano.mobilenet import CHANNELS
from reir.models.nano.model import (
    COLOR_GRID,
    DETECTOR_FEATURES,
    SCENE_GRID,
    CandidateBatch,
    ClareNano,
    ClareNanoConfig,
)
from reir.models.yolox import NUM_CLASSES

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
WORDS = (
    "the",
    "a",
    "red",
    "blue",
    "green",
    "dog",
    "cat",
    "man",
    "car",
    "left",
    "right",
    "of",
    "in",
)


def tiny_model(seed: int = 0, **changes: Any) -> ClareNano:
    """A random model of one layer a stream, without dropout, in eval mode.

    Args:
        seed: of the weights.
        changes: fields of `ClareNanoConfig` to set differently.
    """
    small: dict[str, Any] = {
        "dim": 32,
        "width": 48,
        "num_layers": 1,
        "num_heads": 3,
        "num_candidates": 6,
        "detector_px": 128,
        "crop_px": 32,
        "scene_px": 64,
        "text_layers": 1,
        "max_tokens": 16,
        "dropout": 0.0,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ClareNano(ClareNanoConfig(**(small | changes))).eval()


def tiny_tokenizer() -> Tokenizer:
    """A word-level tokenizer that frames a text with [CLS] and [SEP], as the real one does."""
    vocabulary = {word: i for i, word in enumerate((*SPECIAL, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(
        ("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"])
    )
    return tokenizer


def tiny_batch(num_photos: int = 2, num_candidates: int = 5, seed: int = 0) -> CandidateBatch:
    """Random candidates, all valid, in float32; boxes have an area.

    Args:
        num_photos: B.
        num_candidates: K.
        seed: of every value.
    """
    random = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(num_photos, *shape, generator=random)

    k = num_candidates
    corner, size = uniform(k, 2) * 0.6, uniform(k, 2) * 0.3 + 0.1
    return CandidateBatch(
        boxes=torch.cat([corner, corner + size], dim=-1),
        objectness=uniform(k).sort(dim=1, descending=True).values,
        class_scores=uniform(k, NUM_CLASSES),
        detector=uniform(k, DETECTOR_FEATURES),
        colors=uniform(k, COLOR_GRID, COLOR_GRID, 3),
        crops=uniform(k, CHANNELS),
        scene=uniform(1 + SCENE_GRID**2, CHANNELS),
        aspect=uniform() - 0.5,
        valid=torch.ones(num_photos, k, dtype=torch.bool),
    )
