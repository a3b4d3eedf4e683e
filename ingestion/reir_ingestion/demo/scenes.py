"""The scenes of the demo gallery, and sentences that describe exactly one subject in them.

Scenes are plain data. A sentence is only used if a search through all scenes finds exactly one
match, so the correct answers of the demo are known by construction.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

NAMES = {
    ("woman", ""): "woman in an orange suit",
    ("woman", "blue"): "woman in a blue suit",
    ("man", ""): "man in a black coat",
    ("cat", ""): "brown cat",
    ("cat", "grey"): "grey cat",
    ("cup", ""): "red coffee cup",
    ("cup", "blue"): "blue coffee cup",
    ("cup", "green"): "green coffee cup",
    ("motorcycle", ""): "red motorcycle",
    ("motorcycle", "blue"): "blue motorcycle",
    ("motorcycle", "green"): "green motorcycle",
    ("horse", ""): "black horse",
}
PLAIN_NAMES = {"cup": "coffee cup"}
GROUNDS = {
    "field": "in a green field",
    "gravel": "on gravel",
    "bricks": "on a brick pavement",
    "sunset": "at sunset",
    "sand": "on sand",
}


@dataclass(frozen=True)
class Subject:
    """A subject in a scene: its kind, and its color if it is not the original one."""

    kind: str
    color: str = ""


@dataclass(frozen=True)
class Scene:
    """A photo: a ground and the subjects on it, from left to right."""

    ground: str
    subjects: tuple[Subject, ...]


@dataclass(frozen=True)
class Description:
    """One way to describe a subject. Empty parts are not mentioned in the sentence.

    Attributes:
        kind, color: kind and color of the target; a color of None is not mentioned.
        relation: "", "next to", "left of" or "right of".
        other: kind of the neighbor in the relation.
        ground: ground of the photo.
    """

    kind: str
    color: str | None = None
    relation: str = ""
    other: str = ""
    ground: str = ""

    def __str__(self) -> str:
        """The sentence."""
        name = PLAIN_NAMES.get(self.kind, self.kind)
        if self.color is not None:
            name = NAMES[self.kind, self.color]
        parts = ["the", name]
        if self.relation:
            parts += [self.relation, "the", PLAIN_NAMES.get(self.other, self.other)]
        if self.ground:
            parts.append(GROUNDS[self.ground])
        return " ".join(parts)

    def fits(self, scene: Scene, place: int) -> bool:
        """Return whether the description fits the subject at `place` in a scene."""
        target = scene.subjects[place]
        # Subjects are ordered from left to right, so those after the target are right of it.
        neighbors = {
            "": (),
            "next to": scene.subjects[:place] + scene.subjects[place + 1 :],
            "left of": scene.subjects[place + 1 :],
            "right of": scene.subjects[:place],
        }[self.relation]
        return (
            target.kind == self.kind
            and self.color in (None, target.color)
            and self.ground in ("", scene.ground)
            and (not self.relation or self.other in {one.kind for one in neighbors})
        )


def make_scenes() -> tuple[Scene, ...]:
    """Return all scenes: single subjects in several colors, pairs, mirrored pairs and trios."""
    grounds = tuple(GROUNDS)
    alone = (
        ("motorcycle", "blue", "field"), ("cup", "blue", "bricks"), ("woman", "blue", "sunset"),
        ("cat", "grey", "bricks"),
    )  # fmt: skip
    scenes = [Scene(ground, (Subject(kind, color),)) for kind, color, ground in alone]
    kinds = ("cat", "cup", "motorcycle", "woman", "horse", "man")
    for number, pair in enumerate(combinations(kinds, 2)):
        # Otherwise a kind that comes early in `kinds` would always be on the left.
        ordered = pair if number % 2 else pair[::-1]
        scenes.append(Scene(grounds[number % len(grounds)], tuple(map(Subject, ordered))))
    mirrored = (
        ("cat", "cup"), ("horse", "motorcycle"), ("woman", "motorcycle"), ("man", "cat"),
    )  # fmt: skip
    present = set(scenes)
    for number, (left, right) in enumerate(mirrored):
        turned = (Subject(left), Subject(right))
        if any(scene.subjects == turned for scene in present):
            turned = turned[::-1]
        scenes.append(Scene(grounds[(number + 2) % len(grounds)], turned))
    trios = (("cup", "horse", "woman"), ("man", "cup", "horse"), ("woman", "cat", "horse"))
    for number, trio in enumerate(trios):
        scenes.append(Scene(grounds[number], tuple(map(Subject, trio))))
    painted = (
        (Subject("motorcycle", "green"), Subject("woman")),
        (Subject("man"), Subject("cup", "green")),
    )
    scenes += [Scene(grounds[number + 1], pair) for number, pair in enumerate(painted)]
    return tuple(scenes)


def describe(scenes: Sequence[Scene]) -> Iterator[tuple[str, int, int]]:
    """Yield (sentence, scene, place): for each subject the shortest sentence that fits it alone.

    A subject that no sentence identifies is left out.
    """
    spots = [(n, place) for n, scene in enumerate(scenes) for place in range(len(scene.subjects))]
    for number, place in spots:
        for candidate in _candidates(scenes[number], place):
            if [spot for spot in spots if candidate.fits(scenes[spot[0]], spot[1])] == [
                (number, place)
            ]:
                yield str(candidate), number, place
                break


def _candidates(scene: Scene, place: int) -> Iterator[Description]:
    """Yield descriptions of a subject, the shortest first."""
    kind, color = scene.subjects[place].kind, scene.subjects[place].color
    others = [(n, one.kind) for n, one in enumerate(scene.subjects) if n != place]
    yield Description(kind)
    yield Description(kind, color)
    for _, other in others:
        yield Description(kind, color, "next to", other)
    for n, other in others:
        yield Description(kind, color, "left of" if place < n else "right of", other)
    yield Description(kind, color, ground=scene.ground)
