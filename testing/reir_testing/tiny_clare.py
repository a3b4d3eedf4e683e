"""A random CLARE that is small enough for unit tests, built from the real classes."""

# Shapes: B photos, H x W pixels of the padded batch

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reir.models.clare.config import ClareConfig
from reir.models.clare.model import Clare
from reir_testing.scenes import make_scenes, save_scenes


def tiny_clare_config(**changes: Any) -> ClareConfig:
    """Return a configuration with few layers, 32 dimensions, 20 queries and photos of 64 to 128 px.

    Args:
        changes: fields of `ClareConfig` with other values.
    """
    small: dict[str, Any] = {
        "vision_width": 32,
        "vision_layers": 2,
        "vision_heads": 2,
        "vision_mlp": 64,
        "native_grid": 4,
        "text_width": 24,
        "text_layers": 2,
        "text_heads": 2,
        "text_mlp": 48,
        "vocabulary": 64,
        "max_tokens": 8,
        "dim": 32,
        "num_queries": 20,
        "encoder_layers": 2,
        "decoder_layers": 3,
        "num_heads": 4,
        "num_points": 2,
        "ffn": 64,
        "num_candidates": 6,
        "shortest_side_px": 64,
        "longest_side_px": 128,
    }
    return ClareConfig(**(small | changes))


def tiny_clare(seed: int = 0, **changes: Any) -> Clare:
    """Return a random model in evaluation mode.

    Args:
        seed: seed of the weights.
        changes: fields of `ClareConfig` with other values.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Clare(tiny_clare_config(**changes)).eval()
        # Some weights start at zero, which would hide mistakes in what they multiply. Scales and
        # biases of the scores keep their meaningful initial values.
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if not name.startswith(("clia_", "score_")):
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def tiny_photos(sizes_px: Sequence[tuple[int, int]], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return random normalized photos in the form that `Clare.forward` needs.

    Args:
        sizes_px: (height, width) of each photo.
        seed: seed of the pixels.

    Returns:
        (B, 3, H, W) pixels with 0 in the padding, and (B, H, W) bool, True in the padding.
    """
    height, width = (-(-max(side) // 32) * 32 for side in zip(*sizes_px, strict=True))
    pixels = torch.zeros(len(sizes_px), 3, height, width)
    mask = torch.ones(len(sizes_px), height, width, dtype=torch.bool)
    # Each photo has a generator of its own, so that its pixels do not depend on the other photos.
    for i, (rows, columns) in enumerate(sizes_px):
        random = torch.Generator().manual_seed(1000 * seed + i)
        pixels[i, :, :rows, :columns] = torch.randn(3, rows, columns, generator=random)
        mask[i, :rows, :columns] = False
    return pixels, mask


def tiny_training(folder: Path, **optimization: Any) -> dict[str, Any]:
    """Return the values of a configuration that trains the tiny model on drawn scenes.

    Each stage has two steps of four photos.

    Args:
        folder: folder for 12 scenes to train on and 3 that are held out; they are drawn if it does
            not contain them yet.
        optimization: settings of the schedule with other values.
    """
    if not (folder / "scenes").exists():
        scenes = {"train": make_scenes(12, 1), "val": make_scenes(3, 2)}
        save_scenes(folder / "scenes", scenes)
    # Training builds a tokenizer from the expressions, and rejects `paper_parity` in `shape`.
    own = {"vocabulary", "paper_parity"}
    shape = {k: v for k, v in asdict(tiny_clare_config()).items() if k not in own}
    small = {
        "grounding_epochs": 1,
        "clia_epochs": 1,
        "steps_per_epoch": 2,
        "photos_per_batch": 4,
        "warmup_steps": 1,
        "precision": "fp32",
    }
    return {
        "data": [{"format": "photos", "path": str(folder / "scenes")}],
        "shape": shape,
        "augmentation": {"short_sides": [64], "long_side": 96},
        "optimization": small | optimization,
    }
