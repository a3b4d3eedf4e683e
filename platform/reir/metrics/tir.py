"""Text-to-image retrieval: where does the photo stand that a text was written for?"""

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
    """0-based rank of each text's photo, `UNRANKED` where it has no vector; ties go against it.

    A photo scores what the best of its vectors scores (clare.md 1.4, the released evaluator): with
    the vectors of all instances that is the best instance.

    Args:
        text_vectors: (M, D).
        text_images: (M,) the photo that each text was written for.
        vectors: (J, D) of the gallery, any number a photo.
        images: (J,) the photo of each.

    Raises:
        ValueError: shapes disagree or a value is not finite.
    """
    # the ranks of REIR at no IoU threshold: boxes play no part
    texts = Queries(text_vectors, text_images, np.zeros((len(text_vectors), 4)))
    gallery = Gallery(vectors, images, np.zeros((len(vectors), 4)))
    return reir_ranks(texts, gallery, iou_thresholds=()).image_rank
