"""Fake models of different quality, under names that `--encoder` accepts, and photos for them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from reir.models.interfaces import InstanceEncoder
from reir.records import FloatArray
from reir_testing.fakes import PALETTE, FakeEncoder, draw_scene

COLORS = tuple(PALETTE)
LEFT, RIGHT = (10, 10, 40, 50), (50, 10, 80, 50)


class BetterEncoder(FakeEncoder):
    """Another model, which is as good as the fake one."""

    def __init__(self) -> None:
        super().__init__()
        self.digest = hashlib.sha256(b"better").hexdigest()


class WorseEncoder(FakeEncoder):
    """A model that does not understand expressions."""

    def __init__(self) -> None:
        super().__init__()
        self.digest = hashlib.sha256(b"worse").hexdigest()

    def encode_expressions(self, expressions: Sequence[str]) -> FloatArray:
        """Return vectors that mean something else."""
        return np.roll(super().encode_expressions(expressions), 5, axis=1)


FAKE_KINDS: Mapping[str, Callable[[str], InstanceEncoder]] = {
    "clare-nano": lambda _: FakeEncoder(),
    "better": lambda _: BetterEncoder(),
    "worse": lambda _: WorseEncoder(),
}
"""Replaces `reir.encoders.KINDS`; the specs are "better:x" and "worse:x"."""


def save_photo(path: Path, color: str, box_px: tuple[int, int, int, int]) -> None:
    """Write a photo of 90 x 60 pixels with one shape."""
    Image.fromarray(draw_scene((90, 60), [(color, box_px)])).save(path)


def save_photos(folder: Path) -> Path:
    """Write a photo `COLOR.png` of each color into a new folder, and return the folder."""
    folder.mkdir()
    for color in COLORS:
        save_photo(folder / f"{color}.png", color, LEFT)
    return folder
