"""`WritingTask`: what a writer gets about one photo, and what it returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

from reir.datasets.generated_expressions import AnnotatedInstance
from reir.images.decode import read_image
from reir.records import RgbImage
from reir_ingestion.build_dataset.look_alikes import LookAlike, Place
from reir_ingestion.build_dataset.scenes import Scene, SceneInstance

MAX_NEIGHBORS = 3


@dataclass(frozen=True, kw_only=True)
class Similar:
    """A look-alike of an instance.

    Attributes:
        scene: its photo.
        index: its position in the scene.
        similarity: cosine of the two vectors.
    """

    scene: Scene
    index: int
    similarity: float

    @property
    def instance(self) -> SceneInstance:
        """The look-alike itself."""
        return self.scene.instances[self.index]


@dataclass(frozen=True, kw_only=True)
class WritingTask:
    """One photo to write about.

    Instances have the numbers 1, 2, ... in the order of the scene.

    Attributes:
        scene: the photo and its instances.
        look_alikes: number of a described instance -> similar instances of other photos.
    """

    scene: Scene
    look_alikes: Mapping[int, tuple[Similar, ...]] = field(default_factory=dict)

    @cached_property
    def numbers(self) -> tuple[int, ...]:
        """The numbers of the instances to describe."""
        return tuple(n for n, each in enumerate(self.scene.instances, 1) if each.described)

    def instance(self, number: int) -> SceneInstance:
        """Return the instance with a number."""
        return self.scene.instances[number - 1]

    def neighbors(self, number: int) -> list[int]:
        """Return the numbers of the nearest other instances, nearest first."""
        one = self.instance(number).annotated
        others = [n for n in range(1, len(self.scene.instances) + 1) if n != number]
        others.sort(key=lambda n: _distance(one, self.instance(n).annotated))
        return others[:MAX_NEIGHBORS]

    def pixels(self) -> RgbImage:
        """Read the photo.

        Raises:
            ImageError: it cannot be read.
        """
        # Not kept: the tasks of all photos exist at the same time.
        return read_image(self.scene.photo.path)


def tasks_of(
    scenes: Sequence[Scene], look_alikes: Mapping[Place, tuple[LookAlike, ...]]
) -> list[WritingTask]:
    """Return the task for each scene."""
    return [
        WritingTask(
            scene=scene,
            look_alikes={
                number + 1: tuple(
                    Similar(
                        scene=scenes[found.place.scene],
                        index=found.place.instance,
                        similarity=found.similarity,
                    )
                    for found in look_alikes.get(Place(at, number), ())
                )
                for number, instance in enumerate(scene.instances)
                if instance.described
            },
        )
        for at, scene in enumerate(scenes)
    ]


@dataclass(frozen=True)
class Written:
    """An expression about the instance with a number."""

    number: int
    text: str


@dataclass(frozen=True, kw_only=True)
class Writing:
    """The answer of a writer about one photo.

    Attributes:
        expressions: what it wrote.
        refused: number of an instance, or None for a part of the answer that names none, and the
            reason why nothing is written about it.
    """

    expressions: tuple[Written, ...]
    refused: tuple[tuple[int | None, str], ...] = ()


class ExpressionWriter(Protocol):
    """Writes expressions about the numbered instances of photos; many threads may call it."""

    @property
    def name(self) -> str:
        """The writer and its model, for provenance."""
        ...

    @property
    def version(self) -> str:
        """Version of its prompt or rules."""
        ...

    def write(self, task: WritingTask) -> Writing:
        """Write about one photo.

        Raises:
            AnswerRefused: the model answered, but the answer cannot be used.
            ModelUnavailable: the model did not answer.
            ImageError: the photo cannot be read.
        """
        ...


LANGUAGE, GROUNDED = "language", "grounded"
IN_PHOTO, IN_GALLERY = "unique in the photo", "unique in the gallery"
"""What is checked, in the order in which reasons are given."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The judgment of one expression.

    Attributes:
        problems: check -> why the expression fails it; empty if it passes all checks.
    """

    problems: Mapping[str, str] = field(default_factory=dict)


class ExpressionJudge(Protocol):
    """Judges expressions; many threads may call it."""

    @property
    def name(self) -> str:
        """The judge and its model, for provenance."""
        ...

    @property
    def version(self) -> str:
        """Version of its prompt or rules."""
        ...

    def judge(self, task: WritingTask, expressions: Sequence[Written]) -> list[Verdict]:
        """Return a verdict for each expression, in the order given.

        Raises:
            AnswerRefused: the model answered, but the answer cannot be used.
            ModelUnavailable: the model did not answer.
            ImageError: the photo cannot be read.
        """
        ...


def _distance(one: AnnotatedInstance, other: AnnotatedInstance) -> float:
    (ax, ay), (bx, by) = one.center, other.center
    # Squared, which gives the same order as the distance itself.
    return (ax - bx) ** 2 + (ay - by) ** 2
