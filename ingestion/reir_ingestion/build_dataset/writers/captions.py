"""Captions of a photo that describe one of its instances: "A woman on a horse" of one large person.

Captions mention clothes, actions and things that annotations leave out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from reir.text import normalize_expression
from reir_ingestion.build_dataset.judges.description import Parser
from reir_ingestion.build_dataset.tasks import WritingTask

PROMINENT = 3.0
"""A caption is about the largest instance of a class if it is so many times as large as the second
one."""

_OPENING = re.compile(r"^(?:there is )?(?:an?|the) ")


def captions_about(task: WritingTask, parser: Parser) -> Iterator[tuple[int, str]]:
    """Yield captions that describe one instance: its number, and the text without an article.

    Its first noun stands for the class of the instance, and other instances of this class are much
    smaller.
    """
    scene = task.scene
    for caption in scene.photo.captions:
        text = normalize_expression(caption).rstrip(" .")
        classes = parser.parse(text).categories
        areas = {
            number: each.annotated.area
            for number, each in enumerate(scene.instances, start=1)
            if each.category in classes
        }
        # Numbers of instances start at 1, so 0 stands for none.
        largest, *others = sorted(areas, key=areas.__getitem__, reverse=True) or [0]
        is_prominent = not others or areas[largest] >= PROMINENT * areas[others[0]]
        if largest and is_prominent and scene.photo.crowded.isdisjoint(classes):
            yield largest, _OPENING.sub("", text)
