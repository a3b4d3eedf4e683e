"""The interfaces of encoders, segmenters, localizers and zoomers.

Indexing and searching need an `InstanceEncoder`. An encoder may also be a `TokenEncoder`, which the
relation re-ranker needs, a `BoxProposer`, which makes zooming into large photos cheaper, a
`ClassifyingEncoder`, whose classes describe photos without annotations, and an `ExpressionChooser`
or a `BoxEncoder`, which only evaluation uses. A `CandidateEncoder` says which part of its vectors
compares classes and places. A `Segmenter` finds the masks of instances. An `ExpressionLocalizer`
finds what an expression describes on the pixels of a photo, and encodes nothing that could be
indexed. A `Zoomer` does so by zooming in, and finds instances that are small in their photo.
"""

# Shapes: N texts, L tokens, C channels, D vector dimension, H x W pixels

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from reir.models.zoom_steps import ZoomSearch
from reir.records import Box, FloatArray, Instances, MaskRle, RgbImage


class InstanceEncoder(Protocol):
    """A dual-stream model: instances of an image without any query, and expressions.

    Attributes:
        dim: dimension D of both kinds of vector.
        digest: identifies the model revision; vectors of different digests are never compared.
        num_candidates: maximum number of instances per image.
        masks: whether instances have masks.
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
        """Maximum number of instances per image."""
        ...

    @property
    def masks(self) -> bool:
        """Whether instances have masks."""
        ...

    def encode_images(self, images: Sequence[RgbImage]) -> list[Instances]:
        """Return the query-free instances of each image, in the order given."""
        ...

    def encode_expressions(self, expressions: Sequence[str]) -> FloatArray:
        """(N, D) float32 unit vectors, in the order given."""
        ...


@dataclass(frozen=True)
class EncodedExpression:
    """The output of the text tower for one expression, as the re-ranker needs it.

    Attributes:
        vector: (D,) float32 unit vector, as from `encode_expressions`. A search with several terms
            replaces it by their weighted sum.
        states: (L, C) float32 states of its tokens, without padding.
    """

    vector: FloatArray
    states: FloatArray


# `isinstance` only looks for members by name, so each optional ability below has a method or a
# property with a name of its own.
@runtime_checkable
class TokenEncoder(InstanceEncoder, Protocol):
    """An encoder that also returns the states of single tokens."""

    def encode_tokens(self, expressions: Sequence[str]) -> list[EncodedExpression]:
        """Return the vector and the token states of each expression, in the order given."""
        ...


def encode_words(
    encoder: InstanceEncoder, expressions: Sequence[str], *, words: bool
) -> list[EncodedExpression]:
    """Encode expressions; with token states if `words` is set and the encoder supports them."""
    if words and isinstance(encoder, TokenEncoder):
        return encoder.encode_tokens(expressions)
    none = np.empty((0, 0), dtype=np.float32)  # the re-ranker, the only reader, is not there
    return [EncodedExpression(each, none) for each in encoder.encode_expressions(expressions)]


@dataclass(frozen=True)
class InstanceChoices:
    """The instances of one photo, chosen in both ways.

    Attributes:
        query_free: as from `encode_images`.
        by_expression: for each expression of the photo, in the order given, the instances with
            the best scores for it; the scores take the place of their objectness.
    """

    query_free: Instances
    by_expression: tuple[Instances, ...]


@runtime_checkable
class ExpressionChooser(InstanceEncoder, Protocol):
    """An encoder that computes the vectors of far more instances than it keeps.

    An expression can then choose among all of them, as in the released evaluator of CLARE
    (docs/clare.md, section 6). An encoder that computes the vectors of kept instances only cannot
    support that.
    """

    def encode_images_for(
        self, images: Sequence[RgbImage], expressions: Sequence[FloatArray], num_kept: int
    ) -> list[InstanceChoices]:
        """Return the instances of each image, chosen without a query and by each expression.

        Args:
            images: as for `encode_images`.
            expressions: for each image, the (T, D) vectors of its expressions; T may be 0.
            num_kept: maximum number of instances that an expression chooses.
        """
        ...


@dataclass(frozen=True)
class Segment:
    """The pixels of an instance, and the box that they suggest.

    Attributes:
        box: xyxy in [0, 1] of the upright photo.
        mask: of the whole photo.
    """

    box: Box
    mask: MaskRle


@runtime_checkable
class Segmenter(Protocol):
    """Finds the pixels of instances whose boxes are roughly known, without any sentence."""

    def segment(self, image: RgbImage, boxes: FloatArray) -> list[Segment]:
        """Return the segment of each box, in the order given.

        Args:
            image: (H, W, 3) uint8, upright.
            boxes: (N, 4) xyxy in [0, 1].
        """
        ...


@runtime_checkable
class Zoomer(Protocol):
    """Finds what an expression describes in a photo by zooming in: one look after another.

    Every look has the full resolution of the photo, so it shows instances that are too small in a
    look at the whole photo.
    """

    def zoom(self, images: Sequence[RgbImage], expressions: Sequence[str]) -> list[ZoomSearch]:
        """Search each photo for its expression.

        Args:
            images: (H, W, 3) uint8, upright.
            expressions: one normalized expression for each photo.

        Returns:
            The search of each photo, with at least one step, in the order given.
        """
        ...


@runtime_checkable
class BoxProposer(InstanceEncoder, Protocol):
    """An encoder that can also find boxes alone, at a fraction of the cost of their vectors."""

    def propose_boxes(self, image: RgbImage, num_boxes: int) -> tuple[FloatArray, FloatArray]:
        """Return the boxes of one image that may contain an instance, best first.

        Args:
            image: as for `encode_images`.
            num_boxes: maximum number of boxes, which may be larger than `num_candidates`.

        Returns:
            (N, 4) float32 xyxy in [0, 1], and (N,) float32 scores in [0, 1].
        """
        ...


@runtime_checkable
class ClassifyingEncoder(InstanceEncoder, Protocol):
    """An encoder that can also name the classes of the instances that it finds."""

    def encode_with_classes(self, images: Sequence[RgbImage]) -> list[tuple[Instances, FloatArray]]:
        """Return the instances of each image, in the order given, and their class scores.

        Returns:
            Instances as from `encode_images`, and (N, 80) float32 scores in [0, 1] of the classes
            in `COCO_CLASSES`.
        """
        ...


@runtime_checkable
class CandidateEncoder(InstanceEncoder, Protocol):
    """An encoder whose vectors have a part for what a detector knows: classes and places."""

    @property
    def candidate_dims(self) -> int:
        """Number of the last dimensions of both kinds of vector, which are this part; may be 0."""
        ...


def candidate_dims(encoder: InstanceEncoder) -> int:
    """Return how many of the last dimensions of its vectors compare classes and places."""
    return encoder.candidate_dims if isinstance(encoder, CandidateEncoder) else 0


@runtime_checkable
class BoxEncoder(InstanceEncoder, Protocol):
    """An encoder that can encode any given boxes, and not only those that it finds itself."""

    def encode_boxes(self, image: RgbImage, boxes: FloatArray) -> Instances:
        """Return the instances of one image at given boxes, in the order given.

        Args:
            image: as for `encode_images`.
            boxes: (N, 4) xyxy in [0, 1].
        """
        ...


@dataclass(frozen=True)
class FoundBoxes:
    """The boxes that an expression may describe in one photo, best first.

    Attributes:
        boxes: (N, 4) float32, xyxy in [0, 1] of the upright photo; N may be 0.
        scores: (N,) float32 in [0, 1], in descending order.
    """

    boxes: FloatArray
    scores: FloatArray


@runtime_checkable
class ExpressionLocalizer(Protocol):
    """Finds what an expression describes on the pixels of a photo.

    It reads the expression together with the pixels, so photos cannot be indexed with it.

    Attributes:
        digest: identifies the model revision.
    """

    @property
    def digest(self) -> str:
        """Sha256 of the weights."""
        ...

    def localize(self, images: Sequence[RgbImage], expressions: Sequence[str]) -> list[FoundBoxes]:
        """Return the boxes of each photo for the expression at the same place, in the order given.

        Args:
            images: (H, W, 3) uint8, upright, of any sizes; the same photo may be given repeatedly.
            expressions: one for each photo.

        Raises:
            ValueError: the numbers of photos and expressions differ.
        """
        ...
