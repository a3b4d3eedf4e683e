"""`InstanceEncoder`: the seam between models and everything that indexes or searches."""

# Shapes: N texts, D vector dimension, H x W pixels

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from reir.records import FloatArray, Instances

RgbImage = npt.NDArray[np.uint8]
"""(H, W, 3) uint8, upright, RGB."""


class InstanceEncoder(Protocol):
    """A dual-stream model: instances of an image without any query, and expressions.

    Attributes:
        dim: dimension D of both kinds of vector.
        digest: names the model revision; vectors of different digests never mix.
        num_candidates: at most so many instances an image.
        masks: whether instances come with their masks.
    """

    @property
    def dim(self) -> int:
        """Dimension D of both kinds of vector."""
        ...

    @property
    def digest(self) -> str:
        """Sha256 of the weights."""
        ...

    @property
    def num_candidates(self) -> int:
        """The most instances kept of one image."""
        ...

    @property
    def masks(self) -> bool:
        """Whether instances come with their masks."""
        ...

    def encode_images(self, images: Sequence[RgbImage]) -> list[Instances]:
        """Instances of each image, query-free, in the order given."""
        ...

    def encode_expressions(self, expressions: Sequence[str]) -> FloatArray:
        """(N, D) float32 unit vectors, in the order given."""
        ...
