"""Batches of hard negatives: photos with similar expressions, or with instances that look alike.

In random batches, the model soon distinguishes an expression from all of its negatives. What
remains to be learned are the differences between photos that are easily confused.

`HardNegativeBatches`, for the end of stage 2, groups photos with similar expressions. Similarity is
the cosine of tf-idf vectors of words and word pairs. Only photos of the same gallery are grouped:
an expression describes only one instance in its gallery, so a similar photo of that gallery cannot
be a false negative.

`beside_look_alikes` is for photos whose look-alikes `reir build-dataset` has found.
"""

# Shapes: S samples of a pool, V words and word pairs

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from reir.records import FloatArray

Rows = npt.NDArray[np.int64]
POOL_BATCHES = 16
"""Number of batches whose samples are regrouped together."""


class HardNegativeBatches:
    """Groups samples with similar expressions into batches.

    Args:
        texts: expressions of each sample.
        galleries: gallery of each sample, within which an expression describes one instance.
    """

    def __init__(self, texts: Sequence[Sequence[str]], galleries: Sequence[str]) -> None:
        self._texts = texts
        self._galleries = np.unique(np.asarray(galleries, dtype=np.str_), return_inverse=True)[1]

    def grouped(self, order: Rows, batch_size: int) -> Rows:
        """Reorder the samples, so that each batch has a first sample and those most similar to it.

        Args:
            order: samples in random order; the first samples of the batches keep this order.
            batch_size: samples per batch.
        """
        order = order[np.argsort(self._galleries[order], kind="stable")]
        # All samples of a pool are compared with one another, so the whole set would be too large.
        pool = POOL_BATCHES * batch_size
        parts = [self._regroup(order[i : i + pool], batch_size) for i in range(0, len(order), pool)]
        return np.concatenate(parts)

    def _regroup(self, rows: Rows, batch_size: int) -> Rows:
        similarity_SS = text_similarity([self._texts[row] for row in rows])
        gallery_S = self._galleries[rows]
        # Only photos of the same gallery are certain to be negatives.
        similarity_SS[gallery_S[:, None] != gallery_S] = -1.0
        # A sample is more similar to itself than to any other, so it comes first in its batch.
        np.fill_diagonal(similarity_SS, 2.0)
        unused_S = np.ones(len(rows), dtype=bool)
        places: list[int] = []
        for first in range(len(rows)):
            if unused_S[first]:
                fits_S = np.where(unused_S, similarity_SS[first], -np.inf)
                batch = np.argsort(-fits_S, kind="stable")[: min(batch_size, unused_S.sum())]
                unused_S[batch] = False
                places += batch.tolist()
        return rows[places]


def beside_look_alikes(
    order: Rows, look_alikes: Mapping[int, Sequence[int]], rng: np.random.Generator
) -> Rows:
    """Reorder photos, so that one of its look-alikes follows each photo, if one is left.

    Batches are parts of this order. So photos that look alike contrast with each other in a batch.

    Args:
        order: photos in random order.
        look_alikes: photo -> the photos that look like it.
        rng: chooses among the look-alikes that are left.
    """
    left = dict.fromkeys(order.tolist())
    placed: list[int] = []
    for photo in order.tolist():
        if photo in left:
            del left[photo]
            placed.append(photo)
            if alike := [each for each in look_alikes.get(photo, ()) if each in left]:
                other = alike[rng.integers(len(alike))]
                del left[other]
                placed.append(other)
    return np.array(placed, dtype=np.int64)


def text_similarity(texts: Sequence[Sequence[str]]) -> FloatArray:
    """Return the (S, S) cosine similarity of the expressions of samples, with tf-idf weights.

    Args:
        texts: expressions of each sample.
    """
    counts = [Counter(term for text in of_one for term in terms(text)) for of_one in texts]
    column_of = {term: i for i, term in enumerate(sorted(set().union(*counts)))}
    weight_SV = np.zeros((len(texts), len(column_of)), dtype=np.float32)
    for row, of_one in zip(weight_SV, counts, strict=True):
        row[[column_of[term] for term in of_one]] = np.log1p(list(of_one.values()))
    # A word that all samples contain gets the weight 0: it says nothing about their similarity.
    weight_SV *= np.log(len(texts) / np.maximum((weight_SV > 0).sum(axis=0), 1))
    weight_SV /= np.maximum(np.linalg.norm(weight_SV, axis=1, keepdims=True), 1e-6)
    return np.asarray(weight_SV @ weight_SV.T, dtype=np.float32)


def terms(text: str) -> list[str]:
    """Return the words of a text, and the pairs of adjacent words."""
    words = text.lower().split()
    return words + [" ".join(pair) for pair in pairwise(words)]
