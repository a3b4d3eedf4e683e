"""Batches of photos that only close reading tells apart, for the end of stage 2.

With strangers alone in a batch, an expression is soon told from all of its wrong answers, and what
is left to learn is between photos of which the same is said. Such photos are found by the words of
their expressions (tf-idf of words and of pairs of words), among those of one gallery: what is said
there of an instance is true of no other, so a look-alike is a wrong answer for sure.
"""

# Shapes: S samples of a pool, V words and pairs

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from reir.records import FloatArray

Rows = npt.NDArray[np.int64]
POOL_BATCHES = 16
"""Batches that are put together from each other's samples."""


class LookAlikes:
    """Puts samples of which the same words are said next to each other.

    Args:
        texts: expressions of each sample.
        galleries: of each sample; within one, an expression is true of one instance.
    """

    def __init__(self, texts: Sequence[Sequence[str]], galleries: Sequence[str]) -> None:
        self._texts = texts
        self._galleries = np.unique(np.asarray(galleries, dtype=np.str_), return_inverse=True)[1]

    def grouped(self, order: Rows, batch_size: int) -> Rows:
        """Return the samples in another order: each batch, a first one and those most like it.

        Args:
            order: samples, drawn at random; batches begin with those that come first.
            batch_size: samples a batch.
        """
        order = order[np.argsort(self._galleries[order], kind="stable")]
        pool = POOL_BATCHES * batch_size
        parts = [self._pool(order[i : i + pool], batch_size) for i in range(0, len(order), pool)]
        return np.concatenate(parts)

    def _pool(self, rows: Rows, batch_size: int) -> Rows:
        likeness_SS = likeness([self._texts[row] for row in rows])
        gallery_S = self._galleries[rows]
        likeness_SS[gallery_S[:, None] != gallery_S] = -1.0
        np.fill_diagonal(likeness_SS, 2.0)
        left_S = np.ones(len(rows), dtype=bool)
        places: list[int] = []
        for first in range(len(rows)):
            if left_S[first]:
                fits_S = np.where(left_S, likeness_SS[first], -np.inf)
                batch = np.argsort(-fits_S, kind="stable")[: min(batch_size, left_S.sum())]
                left_S[batch] = False
                places += batch.tolist()
        return rows[places]


def likeness(texts: Sequence[Sequence[str]]) -> FloatArray:
    """(S, S) cosine of the words and pairs of words that are said of each sample, the rare first.

    Args:
        texts: expressions of each sample.
    """
    counts = [Counter(term for text in of_one for term in terms(text)) for of_one in texts]
    column_of = {term: i for i, term in enumerate(sorted(set().union(*counts)))}
    said_SV = np.zeros((len(texts), len(column_of)), dtype=np.float32)
    for row, of_one in zip(said_SV, counts, strict=True):
        row[[column_of[term] for term in of_one]] = np.log1p(list(of_one.values()))
    said_SV *= np.log(len(texts) / np.maximum((said_SV > 0).sum(axis=0), 1))
    said_SV /= np.maximum(np.linalg.norm(said_SV, axis=1, keepdims=True), 1e-6)
    return np.asarray(said_SV @ said_SV.T, dtype=np.float32)


def terms(text: str) -> list[str]:
    """Words of a text, and pairs of words that follow one another."""
    words = text.lower().split()
    return words + [" ".join(pair) for pair in pairwise(words)]
