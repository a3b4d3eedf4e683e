"""A random CLARE of the real classes, small enough for unit tests. Knows no training."""

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
    """Two layers everywhere, 32 dimensions, 20 queries, photos of 64 to 128 px.

    Args:
        changes: fields of `ClareConfig` to set differently.
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
    """A random model in eval mode; every weight is moved off its start, so that no path is silent.

    Args:
        seed: of the weights.
        changes: fields of `ClareConfig` to set differently.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Clare(tiny_clare_config(**changes)).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if not name.startswith(("clia_", "score_")):
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def tiny_photos(sizes_px: Sequence[tuple[int, int]], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random normalized photos as `Clare.forward` takes them.

    Args:
        sizes_px: (height, width) of each.
        seed: of the pixels; a photo's pixels depend on its place in the list alone.

    Returns:
        (B, 3, H, W) with 0 in the padding, and (B, H, W) bool, True in the padding.
    """
    height, width = (-(-max(side) // 32) * 32 for side in zip(*sizes_px, strict=True))
    pixels = torch.zeros(len(sizes_px), 3, height, width)
    mask = torch.ones(len(sizes_px), height, width, dtype=torch.bool)
    for i, (rows, columns) in enumerate(sizes_px):
        random = torch.Generator().manual_seed(1000 * seed + i)
        pixels[i, :, :rows, :columns] = torch.randn(3, rows, columns, generator=random)
        mask[i, :rows, :columns] = False
    return pixels, mask


def tiny_training(folder: Path, **optimization: Any) -> dict[str, Any]:
    """Values of a configuration that trains the tiny model on scenes, drawn into `folder`.

    Args:
        folder: gets the scenes, 12 to train on and 3 held out, unless it has them.
        optimization: settings of the schedule to set differently; two steps of four photos a stage.
    """
    if not (folder / "scenes").exists():
        scenes = {"train": make_scenes(12, 1), "val": make_scenes(3, 2)}
        save_scenes(folder / "scenes", scenes)
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
