"""`InstanceEncoder`: the seam between models and everything that indexes or searches.

`ExpressionChooser` is what an encoder may be besides: evaluation asks for it, no index ever does.
`TokenEncoder` is another: the relation re-ranker reads the words that it gives.
"""

# Shapes: N texts, L tokens, C channels, D vector dimension, H x W pixels

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

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


@dataclass(frozen=True)
class EncodedExpression:
    """An expression as the re-ranker reads it, from one pass of the text tower.

    Attributes:
        vector: (D,) float32 unit vector, as `encode_expressions` gives it; a search that adds terms
            to the expression puts the sum here.
        states: (L, C) float32 states of its tokens, padding left out.
    """

    vector: FloatArray
    states: FloatArray


@runtime_checkable
class TokenEncoder(InstanceEncoder, Protocol):
    """An encoder that gives the states of single tokens too."""

    def encode_tokens(self, expressions: Sequence[str]) -> list[EncodedExpression]:
        """Vector and token states of each expression, in the order given."""
        ...


def encode_words(
    encoder: InstanceEncoder, expressions: Sequence[str], *, words: bool
) -> list[EncodedExpression]:
    """Encode expressions, with their words where those are wanted and the encoder gives them."""
    if words and isinstance(encoder, TokenEncoder):
        return encoder.encode_tokens(expressions)
    none = np.empty((0, 0), dtype=np.float32)
    return [EncodedExpression(each, none) for each in encoder.encode_expressions(expressions)]


@dataclass(frozen=True)
class Chosen:
    """The instances of one photo under both ways of choosing them.

    Attributes:
        query_free: as `encode_images` gives them.
        by_expression: one for each expression of the photo, in the order given: its instances by
            their score with that expression, best first, which is also their objectness.
    """

    query_free: Instances
    by_expression: tuple[Instances, ...]


@runtime_checkable
class ExpressionChooser(InstanceEncoder, Protocol):
    """An encoder that has the vectors of far more instances than it keeps.

    So an expression can do the choosing, as in the released evaluator of CLARE (clare.md section
    6). An encoder that computes vectors only of what it keeps has no such choice.
    """

    def encode_images_for(
        self, images: Sequence[RgbImage], expressions: Sequence[FloatArray], num_kept: int
    ) -> list[Chosen]:
        """Instances of each image, chosen without a query and by each expression.

        Args:
            images: as for `encode_images`.
            expressions: for each image the (T, D) vectors of its expressions; T may be 0.
            num_kept: at most so many instances chosen by an expression.
        """
        ...
