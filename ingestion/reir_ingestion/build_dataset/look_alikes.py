"""Look-alikes: for each instance, the instances of other photos that are easily confused with it.

Expressions must tell an instance apart from its look-alikes to be unique in the gallery. Training
can use them as hard negatives.
"""

# Shapes: J instances of all photos, D vector dimension

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from reir.images.near_duplicates import near_groups
from reir_ingestion.build_dataset.scenes import Scene, SceneInstance

NUM_LOOK_ALIKES = 8
# Bounds the memory: with a million instances, so many rows of similarities take 2 GB.
_ROWS_AT_ONCE = 512


class Place(NamedTuple):
    """An instance: the position of its scene, and its position in the scene."""

    scene: int
    instance: int


class LookAlike(NamedTuple):
    """An instance that is similar to another one, and the cosine of their vectors."""

    place: Place
    similarity: float


def groups_of_photos(scenes: Sequence[Scene]) -> list[int]:
    """Return a group number for each scene; photos that look alike have the same number."""
    # A photo that could not be read has no hash, and stays the only one of its group.
    group = list(range(len(scenes)))
    hashed = [at for at, scene in enumerate(scenes) if scene.perceptual_hash]
    hashes = np.array([int(scenes[at].perceptual_hash, 16) for at in hashed], dtype=np.uint64)
    for members in near_groups(hashes):
        for member in members:
            group[hashed[member]] = hashed[members[0]]
    return group


def find_look_alikes(
    scenes: Sequence[Scene], groups: Sequence[int], num: int = NUM_LOOK_ALIKES
) -> Mapping[Place, tuple[LookAlike, ...]]:
    """Return the instances of other photos that are most similar to each described instance.

    Photos of the same group are left out: they show the same instance again, not a look-alike.
    Instances without a vector have no look-alikes, and are none. All pairs are compared, with
    memory for all vectors.

    Args:
        scenes: all photos of the gallery.
        groups: group of each scene, from `groups_of_photos`.
        num: maximum number of look-alikes of an instance.
    """
    places, rows = [], []
    for at, scene in enumerate(scenes):
        for number, instance in enumerate(scene.instances):
            if instance.vector is not None:
                places.append(Place(at, number))
                rows.append(instance.vector)
    if not rows:
        return {}
    vectors_JD = np.stack(rows).astype(np.float32)
    # Vectors of instances may be longer than 1, and long ones would seem similar to everything.
    vectors_JD /= np.linalg.norm(vectors_JD, axis=1, keepdims=True)
    group_J = np.array([groups[place.scene] for place in places])
    wanted = [row for row, place in enumerate(places) if instance_at(scenes, place).described]
    found: dict[Place, tuple[LookAlike, ...]] = {}
    for start in range(0, len(wanted), _ROWS_AT_ONCE):
        part = wanted[start : start + _ROWS_AT_ONCE]
        similarity = vectors_JD[part] @ vectors_JD.T
        # Leaves out the photo itself, too; `isfinite` below drops such places if few others exist.
        similarity[group_J[part][:, None] == group_J] = -np.inf
        for row, cosines in zip(part, similarity, strict=True):
            # Stable, so that equal cosines are in the same order on every machine.
            best = np.argsort(-cosines, kind="stable")[:num]
            found[places[row]] = tuple(
                LookAlike(places[other], float(cosines[other]))
                for other in best
                if np.isfinite(cosines[other])
            )
    return found


def instance_at(scenes: Sequence[Scene], place: Place) -> SceneInstance:
    """Return the instance at a place."""
    return scenes[place.scene].instances[place.instance]
