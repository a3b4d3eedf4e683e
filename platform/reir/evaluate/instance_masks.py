"""Masks of instances that an evaluation has chosen: the one place that they come from."""

from __future__ import annotations

from reir.images.boxes import pairwise_iou
from reir.models.interfaces import InstanceEncoder, Segmenter
from reir.records import FloatArray, MaskRle, RgbImage


def instance_masks(encoder: InstanceEncoder, image: RgbImage, boxes: FloatArray) -> list[MaskRle]:
    """Return the masks of instances that the encoder found in a photo.

    Evaluations keep boxes and vectors of a gallery, but no masks. Without a segmenter, the photo is
    encoded again.

    Args:
        encoder: an encoder whose instances have masks.
        image: (H, W, 3) the photo.
        boxes: (N, 4) boxes of some of its instances, xyxy in [0, 1].

    Raises:
        ValueError: the encoder gave no masks.
    """
    if isinstance(encoder, Segmenter):
        return [each.mask for each in encoder.segment(image, boxes)]
    (found,) = encoder.encode_images([image])
    if found.masks is None:
        raise ValueError(f"{type(encoder).__name__} gave no masks, although it says that it does")
    # The same boxes again, up to rounding.
    same = pairwise_iou(boxes, found.boxes).argmax(axis=1)
    return [found.masks[at] for at in same.tolist()]
