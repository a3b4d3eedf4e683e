"""A `clare-nano` that is small enough for unit tests, with a tokenizer and random candidates."""

# Shapes: B photos, K candidates per photo

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from reir.checkpoint import save_checkpoint
from reir.models.nano.crop_network import CHANNELS
from reir.models.nano.model import (
    COLOR_GRID,
    DETECTOR_FEATURES,
    SCENE_GRID,
    CandidateBatch,
    ClareNano,
    ClareNanoConfig,
)
from reir.models.picodet import NUM_CLASSES

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
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
    """Return a random model with one layer per stream, without dropout, in evaluation mode.

    Args:
        seed: seed of the weights.
        changes: fields of `ClareNanoConfig` with other values.
    """
    small: dict[str, Any] = {
        "dim": 32,
        "width": 48,
        "num_layers": 1,
        "num_heads": 3,
        "num_candidates": 6,
        "crop_network": "efficientnet_lite0",
        "detector_px": 128,
        "crop_px": 32,
        "scene_px": 64,
        "bank_sentences": 30,
        "text_layers": 1,
        "max_tokens": 16,
        "dropout": 0.0,
    }
    # The forked generator leaves the random numbers of the calling test as they are.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ClareNano(ClareNanoConfig(**(small | changes))).eval()


def tiny_tokenizer() -> Tokenizer:
    """Return a tokenizer that puts [CLS] before a text and [SEP] after it, as the real one does.

    Each word is one token.
    """
    vocabulary = {word: i for i, word in enumerate((*SPECIAL, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(
        ("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"])
    )
    return tokenizer


def save_tiny_run(folder: Path, batch: CandidateBatch, card: str) -> None:
    """Write a checkpoint with a model card, and a cache of candidates, for a later training stage.

    Args:
        folder: gets the folders `checkpoint` and `cache`.
        batch: candidates of the photos of the run.
        card: content of the model card.
    """
    save_checkpoint(folder / "checkpoint", tiny_model(), tiny_tokenizer(), {})
    (folder / "checkpoint" / "README.md").write_text(card)
    (folder / "cache").mkdir()
    for name, value in batch.tensors().items():
        np.save(folder / "cache" / f"{name}.npy", value.numpy())


def tiny_batch(num_photos: int = 2, num_candidates: int = 5, seed: int = 0) -> CandidateBatch:
    """Return random candidates, all of them valid, in float32.

    Args:
        num_photos: number of photos B.
        num_candidates: number of candidates per photo K.
        seed: seed of all values.
    """
    random = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(num_photos, *shape, generator=random)

    k = num_candidates
    # Boxes have an area and lie inside of the photo.
    corner, size = uniform(k, 2) * 0.6, uniform(k, 2) * 0.3 + 0.1
    return CandidateBatch(
        boxes=torch.cat([corner, corner + size], dim=-1),
        # Real candidates are in this order as well.
        objectness=uniform(k).sort(dim=1, descending=True).values,
        class_scores=uniform(k, NUM_CLASSES),
        detector=uniform(k, DETECTOR_FEATURES),
        colors=uniform(k, COLOR_GRID, COLOR_GRID, 3),
        crops=uniform(k, CHANNELS),
        scene=uniform(1 + SCENE_GRID**2, CHANNELS),
        aspect=uniform() - 0.5,
        valid=torch.ones(num_photos, k, dtype=torch.bool),
    )
