"""Judges expressions by rules: by their words, and where these do not suffice, by their vectors.

The words are compared with the classes, colors and boxes of the photo and of the look-alikes. If
an expression has words that the parser does not understand, its vector is compared with the vectors
of the instances, and with the vectors of the same expression with other colors or the other side.
Works offline, with any encoder. `benchmarks/data_engine.py` measures it.
"""

# Shapes: D vector dimension

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from reir.datasets.wrong_words import SIDE
from reir.query.differences import COLOR, Comparison
from reir.records import FloatArray
from reir_ingestion.build_dataset.judges.description import Description, Parser
from reir_ingestion.build_dataset.judges.fits import Fit, fits, statements
from reir_ingestion.build_dataset.tasks import (
    GROUNDED,
    IN_GALLERY,
    IN_PHOTO,
    Verdict,
    WritingTask,
    Written,
)


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """Differences of cosines from which on an expression fails.

    Attributes:
        color: another color fits the instance better by this.
        side: the other side fits the instance better by this.
        other: another instance of the photo fits the expression better by this.
        gallery: a look-alike fits the expression better by this.
    """

    color: float = 0.06
    side: float = 0.02
    other: float = 0.06
    gallery: float = 0.06


class RulesJudge:
    """Judges by rules; see the module.

    Args:
        encode: returns (N, D) unit vectors of N expressions, of the encoder of the scenes.
        categories: all class names of the photos.
        thresholds: see `Thresholds`.
        in_gallery: whether expressions must be unique in the gallery, too.
    """

    name, version = "rules", "1"

    def __init__(
        self,
        encode: Callable[[Sequence[str]], FloatArray],
        categories: Sequence[str] = (),
        *,
        thresholds: Thresholds | None = None,
        in_gallery: bool = True,
    ) -> None:
        self._encode_texts, self._parser = encode, Parser(categories)
        self._thresholds, self._in_gallery = thresholds or Thresholds(), in_gallery

    def judge(self, task: WritingTask, expressions: Sequence[Written]) -> list[Verdict]:
        """Return a verdict for each expression, in the order given."""
        parsed = [self._parser.parse(each.text) for each in expressions]
        compared = [Comparison.of(each.text) if each.rest else None for each in parsed]
        vectors = self._encode(compared)
        return [
            Verdict(problems=dict(self._problems(task, each, description, comparison, vectors)))
            for each, description, comparison in zip(expressions, parsed, compared, strict=True)
        ]

    def _encode(self, compared: Sequence[Comparison | None]) -> Mapping[str, FloatArray]:
        """Return the vectors of the expressions that have words that were not understood."""
        needed = {text: None for each in compared if each for text in _texts(each)}
        return dict(zip(needed, self._encode_texts(list(needed)), strict=True))

    def _problems(
        self,
        task: WritingTask,
        written: Written,
        description: Description,
        comparison: Comparison | None,
        vectors: Mapping[str, FloatArray],
    ) -> Iterator[tuple[str, str]]:
        """Yield the checks that an expression fails, each with the reason."""
        wrong = [
            words
            for words, fit in statements(description, task.scene, written.number - 1)
            if fit is Fit.FAILS
        ]
        if wrong:
            yield GROUNDED, f"{wrong[0]}, which is not the case"
        elif comparison and (problem := self._replaced(task, written, comparison, vectors)):
            yield GROUNDED, problem
        if problem := self._other_instance(task, written, description, vectors):
            yield IN_PHOTO, problem
        if self._in_gallery and (problem := self._look_alike(task, written, description, vectors)):
            yield IN_GALLERY, problem

    def _replaced(
        self,
        task: WritingTask,
        written: Written,
        comparison: Comparison,
        vectors: Mapping[str, FloatArray],
    ) -> str:
        """Return which word would fit the instance better; empty if none does."""
        instance = task.instance(written.number).vector
        if instance is None:
            return ""
        margins = {COLOR: self._thresholds.color, SIDE: self._thresholds.side}
        own = vectors[comparison.sentence] @ instance
        excess = [
            (float(vectors[each.sentence] @ instance - own) - margins[each.difference.kind], each)
            for each in comparison.variants
        ]
        best = max(excess, key=lambda pair: pair[0], default=None)
        if best is None or best[0] < 0:
            return ""
        told = best[1].difference
        return f"{told.seen!r} fits the instance better than {told.wanted!r}"

    def _other_instance(
        self,
        task: WritingTask,
        written: Written,
        description: Description,
        vectors: Mapping[str, FloatArray],
    ) -> str:
        """Return which other instance of the photo it describes; empty if there is none."""
        scene = task.scene
        others = [i for i in range(len(scene.instances)) if i != written.number - 1]
        if not description.rest:
            if not description.says:
                return "says nothing that tells the instance apart"
            if description.category in scene.photo.crowded:
                return f"there is a crowd of the class {description.category!r}"
            found = next((i for i in others if fits(description, scene, i) is Fit.FITS), None)
            return "" if found is None else f"fits instance {found + 1} as well"
        named = [(i, scene.instances[i].vector) for i in others]
        at, gain = _best(vectors[description.text], task.instance(written.number).vector, named)
        return f"fits instance {at + 1} better" if gain > self._thresholds.other else ""

    def _look_alike(
        self,
        task: WritingTask,
        written: Written,
        description: Description,
        vectors: Mapping[str, FloatArray],
    ) -> str:
        """Return which look-alike it describes; empty if it describes none."""
        similar = task.look_alikes.get(written.number, ())
        if not description.rest:
            found = next(
                (s for s in similar if fits(description, s.scene, s.index) is Fit.FITS), None
            )
            return f"fits an instance of {found.scene.photo.file_name} as well" if found else ""
        named = [(i, each.instance.vector) for i, each in enumerate(similar)]
        at, gain = _best(vectors[description.text], task.instance(written.number).vector, named)
        if gain <= self._thresholds.gallery:
            return ""
        return f"fits an instance of {similar[at].scene.photo.file_name} better"


def _texts(comparison: Comparison) -> Iterator[str]:
    yield comparison.sentence
    yield from (each.sentence for each in comparison.variants)


def _best(
    text_D: FloatArray, own_D: FloatArray | None, others: Sequence[tuple[int, FloatArray | None]]
) -> tuple[int, float]:
    """Return the instance that fits a text best, and by how much it is better than the own one."""
    if own_D is None:
        return -1, -np.inf
    own = float(text_D @ own_D)
    scores = [(float(text_D @ each) - own, at) for at, each in others if each is not None]
    gain, at = max(scores, default=(-np.inf, -1))
    return at, gain
