"""Text-to-image retrieval: the rank of the photo that a text was written for."""

# Shapes: M texts, J vectors of the gallery, D vector dimension

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from reir.metrics.reir import Gallery, Queries, reir_ranks
from reir.records import FloatArray

Ints = npt.NDArray[np.int64]


def image_ranks(
    text_vectors: FloatArray, text_images: Ints, vectors: FloatArray, images: Ints
) -> Ints:
    """Return the (M,) rank of each text's photo, counted from 0; ties count against it.

    The score of a photo is that of its best vector (docs/clare.md, section 1.4). A photo without a
    vector is `UNRANKED`.

    Args:
        text_vectors: (M, D).
        text_images: (M,) the photo that each text was written for.
        vectors: (J, D) of the gallery, any number of them per photo.
        images: (J,) the photo of each.

    Raises:
        ValueError: shapes disagree or a value is not finite.
    """
    # Without an IoU threshold, the boxes do not matter.
    texts = Queries(text_vectors, text_images, np.zeros((len(text_vectors), 4)))
    gallery = Gallery(vectors, images, np.zeros((len(vectors), 4)))
    return reir_ranks(texts, gallery, iou_thresholds=()).image_rank
