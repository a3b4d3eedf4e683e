"""Judges expressions by rules: by their words, and where these do not suffice, by their vectors.

The words are compared with the classes, colors and boxes of the photo and of the look-alikes. If
an expression has words that the parser does not understand, its vector is compared with the vectors
of the instances, and with the vectors of the same expression with other colors or the other side;
its side is compared with the place in the photo, and its colors with the pixels. Works offline,
with any encoder. `benchmarks/data_engine.py` measures it, and chooses most of its thresholds.
"""

# Shapes: N expressions, D vector dimension

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple

import numpy as np

from reir.datasets.generated_expressions import COLORS, names_color
from reir.datasets.wrong_words import SIDE
from reir.models.color_reading import ColorReading
from reir.models.nano.color_reader import ColorReader
from reir.records import FloatArray
from reir_ingestion.build_dataset.judges.description import Description, Parser
from reir_ingestion.build_dataset.judges.fits import Fit, fits, statements
from reir_ingestion.build_dataset.judges.variants import Variant, variants_of
from reir_ingestion.build_dataset.scenes import SceneInstance
from reir_ingestion.build_dataset.tasks import (
    GROUNDED,
    IN_GALLERY,
    IN_PHOTO,
    Similar,
    Verdict,
    WritingTask,
    Written,
)

UNSEEN_SCORE = 0.4
"""Score (inner product) that is assumed for an instance without a vector; most right expressions
have a higher one."""
SURPRISAL_SHARE = 0.05
"""One unit of a color's surprisal counts as much as this difference of scores."""
PLACE_SHARE = 0.2
"""An offset of one width of the photo toward the other side counts as much as this difference of
scores. For a small instance without a vector, this is the only evidence about its side."""


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """Differences of scores above which an expression fails.

    `benchmarks/data_engine.py` chooses `color`, `side` and `other`; `gallery` is fixed.

    Attributes:
        color: by how much another color in the expression fits the instance better; with a color
            reader, `SURPRISAL_SHARE` times the color's surprisal is added.
        side: by how much the other side does; `PLACE_SHARE` times the offset of the instance's
            center from the middle of the photo toward that side is added.
        other: by how much another instance of the photo fits the expression better.
        gallery: by how much a look-alike does.
    """

    color: float = 0.22
    # Below 0: an expression must fit better than the same with left and right exchanged.
    side: float = -0.02
    other: float = 0.2
    gallery: float = 0.14


VECTORS_ALONE = Thresholds(color=0.06)
"""The thresholds if colors are not compared with the pixels."""

CHECK_OF = {"color": GROUNDED, "side": GROUNDED, "other": IN_PHOTO, "gallery": IN_GALLERY}
"""Threshold -> the check that an expression above it fails."""


class Gain(NamedTuple):
    """By how much something else fits better, and what, in words."""

    amount: float
    words: str


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What speaks against an expression.

    Attributes:
        certain: check -> what is certainly wrong, by the words.
        gains: name of a threshold -> what the vectors say.
    """

    certain: Mapping[str, str] = field(default_factory=dict)
    gains: Mapping[str, Gain] = field(default_factory=dict)

    def problems(self, thresholds: Thresholds) -> dict[str, str]:
        """Return the checks that the expression fails, each with the reason."""
        found = dict(self.certain)
        for each in fields(thresholds):
            gain = self.gains.get(each.name)
            if gain and gain.amount > getattr(thresholds, each.name):
                # A reason that the words give is certain, so it stays.
                found.setdefault(CHECK_OF[each.name], gain.words)
        return found


class RulesJudge:
    """Judges by rules; see the module.

    Args:
        encode: returns (N, D) unit vectors of N expressions, of the encoder of the scenes.
        categories: all class names of the photos.
        thresholds: None for the defaults, which without `colors` are `VECTORS_ALONE`.
        in_gallery: whether expressions must be unique in the gallery, too.
        colors: compares colors with the pixels; None to compare only vectors.
    """

    name, version = "rules", "3"

    def __init__(
        self,
        encode: Callable[[Sequence[str]], FloatArray],
        categories: Sequence[str] = (),
        *,
        thresholds: Thresholds | None = None,
        in_gallery: bool = True,
        colors: ColorReader | None = None,
    ) -> None:
        self._encode, self._parser = encode, Parser(categories)
        self._thresholds = thresholds or (Thresholds() if colors else VECTORS_ALONE)
        self._in_gallery, self._colors = in_gallery, colors

    def judge(self, task: WritingTask, expressions: Sequence[Written]) -> list[Verdict]:
        """Return a verdict for each expression, in the order given."""
        return [
            Verdict(problems=each.problems(self._thresholds))
            for each in self.evidence(task, expressions)
        ]

    def evidence(self, task: WritingTask, expressions: Sequence[Written]) -> list[Evidence]:
        """Return what speaks against each expression, in the order given.

        Raises:
            ImageError: the photo cannot be read; only with a color reader.
        """
        parsed = [self._parser.parse(each.text) for each in expressions]
        # Of the others, all words are compared with the annotations.
        unclear = [each.text for each in parsed if each.rest]
        variants = {text: variants_of(text) for text in unclear}
        needed = [each.sentence for every in variants.values() for each in every]
        # Each sentence only once: a variant of one expression may be another expression.
        texts = list(dict.fromkeys(unclear + needed))
        vectors = dict(zip(texts, self._encode(texts), strict=True))
        found = [
            self._by_vectors(task, each, description, variants[description.text], vectors)
            if description.rest
            else Evidence(certain=dict(self._by_words(task, each, description)))
            for each, description in zip(expressions, parsed, strict=True)
        ]
        doubtful = [i for i, each in enumerate(parsed) if each.rest and names_color(each.text)]
        if self._colors and doubtful:
            asked = [
                (np.array(task.instance(each.number).box, np.float32), each.text)
                for each in (expressions[i] for i in doubtful)
            ]
            read = self._colors.read(task.pixels(), asked)
            for i, readings in zip(doubtful, read, strict=True):
                if readings:  # none if the word is beyond what the text tower reads
                    gain = _with_surprisal(found[i].gains.get("color"), readings)
                    found[i] = replace(found[i], gains={**found[i].gains, "color": gain})
        return found

    def _by_words(
        self, task: WritingTask, written: Written, description: Description
    ) -> Iterator[tuple[str, str]]:
        """Yield what is wrong with an expression whose words are all understood."""
        if wrong := _wrong_statement(task, written, description):
            yield GROUNDED, wrong
        if problem := _fits_another(task, written, description):
            yield IN_PHOTO, problem
        similar = self._similar(task, written)
        same = (each for each in similar if fits(description, each.scene, each.index) is Fit.FITS)
        if found := next(same, None):
            yield IN_GALLERY, f"fits an instance of {found.scene.photo.file_name} as well"

    def _by_vectors(
        self,
        task: WritingTask,
        written: Written,
        description: Description,
        variants: Sequence[Variant],
        vectors: Mapping[str, FloatArray],
    ) -> Evidence:
        """Return what speaks against an expression that has other words as well."""
        wrong = _wrong_statement(task, written, description)
        certain = {GROUNDED: wrong} if wrong else {}
        own, text_D = task.instance(written.number).vector, vectors[description.text]
        score = UNSEEN_SCORE if own is None else float(text_D @ own)
        gains: dict[str, Gain] = {}
        for variant in variants:
            told = variant.difference
            if own is None and told.kind != SIDE:
                continue
            amount = 0.0 if own is None else float(vectors[variant.sentence] @ own) - score
            if told.kind == SIDE:
                # `seen` is the side that the expression does not name, so a place toward it speaks
                # against the expression.
                amount += PLACE_SHARE * _offset_toward(told.seen, task.instance(written.number))
            words = f"{told.seen!r} fits the instance better than {told.wanted!r}"
            _raise(gains, told.kind, Gain(amount, words))
        for number, each in enumerate(task.scene.instances, start=1):
            if number != written.number and each.vector is not None:
                gain = Gain(float(text_D @ each.vector) - score, f"fits instance {number} better")
                _raise(gains, "other", gain)
        for alike in self._similar(task, written):
            if alike.instance.vector is not None:
                words = f"fits an instance of {alike.scene.photo.file_name} better"
                gain = Gain(float(text_D @ alike.instance.vector) - score, words)
                _raise(gains, "gallery", gain)
        return Evidence(certain=certain, gains=gains)

    def _similar(self, task: WritingTask, written: Written) -> Sequence[Similar]:
        return task.look_alikes.get(written.number, ()) if self._in_gallery else ()


def _wrong_statement(task: WritingTask, written: Written, description: Description) -> str:
    """Return what the expression says that is not the case; empty if nothing is certain."""
    for statement in statements(description, task.scene, written.number - 1):
        # A color word among other words may belong to a part of the instance.
        if statement.fit is Fit.FAILS and not (statement.is_color and description.rest):
            return f"{statement.words}, which is not the case"
    return ""


def _fits_another(task: WritingTask, written: Written, description: Description) -> str:
    """Return why an expression describes not only its instance; empty if it does."""
    scene = task.scene
    if not description.says:
        return "says nothing that tells the instance apart"
    crowded = [each for each in description.categories if each in scene.photo.crowded]
    if crowded:
        return f"there is a crowd of the class {crowded[0]!r}"
    numbers = (n for n in range(1, len(scene.instances) + 1) if n != written.number)
    found = next((n for n in numbers if fits(description, scene, n - 1) is Fit.FITS), None)
    return "" if found is None else f"fits instance {found} as well"


def _offset_toward(side: str, instance: SceneInstance) -> float:
    """Return the offset of an instance's center from the middle of its photo toward a side.

    Args:
        side: a word that begins with "left" or "right".
        instance: annotated or found.

    Returns:
        -.5 to .5, in widths of the photo.
    """
    center = (instance.box[0] + instance.box[2]) / 2
    return 0.5 - center if side.startswith("left") else center - 0.5


def _with_surprisal(gain: Gain | None, readings: Sequence[ColorReading]) -> Gain:
    """Add the surprisal of the least probable color to what the vectors say about the colors."""
    worst = max(readings, key=lambda each: each.surprisal)
    words = f"{worst.likely!r} fits the instance better than {worst.word!r}"
    amount = SURPRISAL_SHARE * worst.surprisal
    if gain is None:
        return Gain(amount, words)
    # If the pixels show the very color that is named, the reason can only be that of the vectors.
    return Gain(amount + gain.amount, words if worst.likely != COLORS[worst.word] else gain.words)


def _raise(gains: dict[str, Gain], name: str, gain: Gain) -> None:
    """Keep the larger gain."""
    if name not in gains or gain.amount > gains[name].amount:
        gains[name] = gain
