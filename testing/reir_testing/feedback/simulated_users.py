"""Simulated users who give feedback about annotated photos: most err at times, some are hostile."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

import numpy as np

from reir.datasets.dataset import Expression, ReferringDataset, ReferringInstance
from reir.operations.feedback import Feedback, add_feedback
from reir.operations.feedback.records import new_key, submission, user_of
from reir.records import Box

START = datetime(2026, 11, 25, tzinfo=UTC)
JITTER = 0.03
"""Standard deviation of the sides of a drawn box, as a share of its width and height."""

Manner = Literal["honest", "random", "shifted"]
"""How a user answers: rightly but for errors, with any object of any photo, or always with the next
object of the same photo, or of the next photo if there is no other one."""


@dataclass(frozen=True)
class SimulatedUser:
    """A user with an API key.

    Attributes:
        name: id of the key.
        manner: see `Manner`.
        error: probability that an answer of an honest user is wrong; it is then another object of
            the same photo, or of any photo if there is no other one.
    """

    name: str
    manner: Manner = "honest"
    error: float = 0.1


def users_with_hostile(
    num: int, manner: Manner = "shifted", error: float = 0.1
) -> list[SimulatedUser]:
    """Return honest users, and a hostile one at the end.

    Args:
        num: number of all users.
        manner: of the hostile one.
        error: of the honest ones.
    """
    honest = [SimulatedUser(f"honest-{number}", error=error) for number in range(num - 1)]
    return [*honest, SimulatedUser("hostile", manner)]


def simulate_feedback(
    dataset: ReferringDataset,
    uris: Mapping[str, str],
    users: Sequence[SimulatedUser],
    num: int,
    seed: int,
) -> list[Feedback]:
    """Return feedback of all users, who take turns and are asked about random expressions.

    Half of the answers are drawn boxes, the others are hits called right.

    Args:
        dataset: photos with the true instance of each expression.
        uris: image id -> URI of the photo in the gallery.
        users: who answers.
        num: number of answers of all users; nobody is asked the same twice.
        seed: of the random numbers.

    Raises:
        ValueError: there are fewer expressions than questions for each user.
    """
    rng = np.random.default_rng(seed)
    each = -(-num // len(users))
    questions = [
        rng.choice(len(dataset.expressions), each, replace=False) for _ in range(len(users))
    ]
    found = []
    for number in range(num):
        user = users[number % len(users)]
        text = dataset.expressions[questions[number % len(users)][number // len(users)]]
        instance = _answer(dataset, text, user, rng)
        is_drawn = bool(rng.random() < 0.5)
        found.append(
            Feedback(
                expression=text.text,
                verdict="box" if is_drawn else "right",
                uri=uris[instance.image_id],
                image_id=instance.image_id,
                instance_id="" if is_drawn else instance.instance_id,
                box=_box(dataset, instance, rng if is_drawn else None),
                user=user_of(user.name),
                time=START + timedelta(seconds=number),
            )
        )
    return found


def record_feedback(folder: Path, gallery: str, feedback: Iterable[Feedback]) -> None:
    """Store feedback as a server does.

    Args:
        folder: folder of the search log, which is created if it is missing.
        gallery: name of the gallery.
        feedback: each is recorded with a key of its own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for said in feedback:
        add_feedback(folder, gallery, said, submission({}, new_key()))


def _answer(
    dataset: ReferringDataset, text: Expression, user: SimulatedUser, rng: np.random.Generator
) -> ReferringInstance:
    """Return where a user says that the object is."""
    assert text.instance_id is not None
    right = dataset.instances_by_id[text.instance_id]
    if user.manner == "honest" and rng.random() >= user.error:
        return right
    if user.manner == "random":
        return dataset.instances[rng.integers(len(dataset.instances))]
    here = [item for item in dataset.instances if item.image_id == right.image_id]
    around = here if len(here) > 1 else dataset.instances
    step = 1 if user.manner == "shifted" else int(rng.integers(1, len(around)))
    return around[(around.index(right) + step) % len(around)]


def _box(
    dataset: ReferringDataset, instance: ReferringInstance, rng: np.random.Generator | None
) -> Box:
    """Return a box in [0, 1]; with a generator, as somebody draws it."""
    image = dataset.images_by_id[instance.image_id]
    size = np.array([image.width_px, image.height_px] * 2)
    sides = np.array(instance.box_xyxy_px) / size
    if rng is not None:
        width, height = sides[2:] - sides[:2]
        sides += rng.normal(0, JITTER, 4) * [width, height, width, height]
    x1, y1, x2, y2 = (float(side) for side in sides.clip(0, 1))
    return x1, y1, x2, y2
