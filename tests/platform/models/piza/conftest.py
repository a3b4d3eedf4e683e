"""Tiny random grounding models of both classes, and inputs for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForZeroShotObjectDetection

from reir_testing.pretrained import save_tiny_grounding_dino


class Inputs(NamedTuple):
    """What a `PizaModel` reads: two pictures, two captions and two searches."""

    pixels: Tensor
    pixel_mask: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    histories: Tensor
    valid: Tensor

    def row(self, number: int) -> Inputs:
        """Return one of the two alone."""
        return Inputs(*(each[number : number + 1] for each in self))


@pytest.fixture(scope="session", params=["grounding-dino", "mm-grounding-dino"])
def base_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    mm = request.param == "mm-grounding-dino"
    return save_tiny_grounding_dino(tmp_path_factory.mktemp(request.param), mm=mm)


@pytest.fixture
def base(base_folder: Path) -> Any:
    return AutoModelForZeroShotObjectDetection.from_pretrained(base_folder).eval()


@pytest.fixture
def inputs() -> Inputs:
    random = torch.Generator().manual_seed(0)
    ids = torch.tensor([[101, 210, 211, 212, 1012, 102], [101, 220, 1012, 102, 0, 0]])
    whole, middle, small = [0, 0, 1, 1], [0.2, 0.3, 0.6, 0.7], [0.3, 0.4, 0.35, 0.45]
    nothing = [0, 0, 0, 0]
    return Inputs(
        pixels=torch.randn(2, 3, 64, 96, generator=random),
        pixel_mask=torch.ones(2, 64, 96, dtype=torch.long),
        input_ids=ids,
        attention_mask=(ids > 0).long(),
        histories=torch.tensor([[whole, middle, small], [whole, nothing, nothing]]).float(),
        valid=torch.tensor([[True, True, True], [True, False, False]]),
    )
