"""Reads `look_alikes.json`: which photos have instances that are easily confused.

`reir build-dataset` writes the file. For each described instance, it names the most similar
instances of other photos.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from reir.datasets.json_entries import read_list

LOOK_ALIKES = "look_alikes.json"


def read_look_alikes(folder: Path) -> dict[str, frozenset[str]]:
    """Map the file name of a photo to those of the photos with look-alikes of its instances.

    The result is empty if the folder has no such file.

    Raises:
        DataError: the file is malformed.
    """
    found: dict[str, set[str]] = defaultdict(set)
    if (folder / LOOK_ALIKES).is_file():
        for instance in read_list(folder / LOOK_ALIKES):
            name = instance.text("photo")
            found[name] |= {each.text("photo") for each in instance.entries("look_alikes")} - {name}
    return {name: frozenset(others) for name, others in found.items()}
