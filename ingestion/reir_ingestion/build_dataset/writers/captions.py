"""Captions of a photo that describe one of its instances: "A woman on a horse" of a single person.

They are the only natural language that a photo may come with, and tell of clothes, actions and
things that no annotation names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from reir.text import normalize_expression
from reir_ingestion.build_dataset.judges.description import Parser
from reir_ingestion.build_dataset.tasks import WritingTask

_OPENING = re.compile(r"^(?:there is )?(?:an?|the) ")


def captions_about(task: WritingTask, parser: Parser) -> Iterator[tuple[int, str]]:
    """Yield (number of an instance, caption without its article).

    A caption is about the instance if its first noun stands for the class of that one instance, and
    of no other one in the photo.
    """
    scene = task.scene
    for caption in scene.photo.captions:
        text = normalize_expression(caption).rstrip(" .")
        classes = parser.parse(text).categories
        numbers = [n for n, each in enumerate(scene.instances, 1) if each.category in classes]
        if len(numbers) == 1 and scene.photo.crowded.isdisjoint(classes):
            yield numbers[0], _OPENING.sub("", text)
