"""`MaskedEncoder`: an encoder whose instances get their masks from a segmenter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from reir.models.delegating_encoder import DelegatingEncoder
from reir.models.interfaces import (
    EncodedExpression,
    InstanceEncoder,
    Segment,
    Segmenter,
    encode_words,
)
from reir.records import FloatArray, Instances, RgbImage


class MaskedEncoder(DelegatingEncoder):
    """Adds masks to the instances of an encoder; boxes and vectors stay as they are.

    Args:
        encoder: encodes photos and expressions.
        segmenter: finds the pixels of the instances.
    """

    masks = True

    def __init__(self, encoder: InstanceEncoder, segmenter: Segmenter) -> None:
        super().__init__(encoder)
        self._segmenter = segmenter

    def with_encoder(self, change: Callable[[InstanceEncoder], InstanceEncoder]) -> MaskedEncoder:
        """Return an encoder with the same segmenter, whose instances come from a changed encoder.

        Args:
            change: the encoder without masks -> the encoder to use instead.
        """
        return MaskedEncoder(change(self._encoder), self._segmenter)

    def encode_images(self, images: Sequence[RgbImage]) -> list[Instances]:
        """Return the instances of each image, with masks."""
        return [
            replace(
                found,
                masks=tuple(each.mask for each in self._segmenter.segment(image, found.boxes)),
            )
            for image, found in zip(images, self._encoder.encode_images(images), strict=True)
        ]

    def segment(self, image: RgbImage, boxes: FloatArray) -> list[Segment]:
        """See `Segmenter.segment`."""
        return self._segmenter.segment(image, boxes)

    def encode_tokens(self, expressions: Sequence[str]) -> list[EncodedExpression]:
        """See `TokenEncoder.encode_tokens`."""
        return encode_words(self._encoder, expressions, words=True)
