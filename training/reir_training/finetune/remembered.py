"""Old sentences and photos, on which a fine-tune measures what the model has forgotten."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from reir.datasets import ReferringDataset, read_annotations
from reir.demo.gallery import PHOTOS, demo_dataset
from reir.errors import DataError


@dataclass(frozen=True)
class RememberedSet:
    """Annotated photos of the kind that the model knew before.

    Attributes:
        name: what they are, for people.
        dataset: photos and expressions with boxes.
        images_dir: folder of the photos.
    """

    name: str
    dataset: ReferringDataset
    images_dir: Path

    @property
    def digest(self) -> str:
        """Sha256 of the annotations and of the path of the folder of photos."""
        found = self.dataset
        told = repr((self.images_dir.resolve(), found.images, found.instances, found.expressions))
        return hashlib.sha256(told.encode()).hexdigest()


def built_in_set() -> RememberedSet:
    """Return the photos and sentences of the built-in gallery."""
    return RememberedSet("the built-in gallery", demo_dataset(), PHOTOS)


def read_remembered_set(annotations: Path, images_dir: Path) -> RememberedSet:
    """Read annotations in any format.

    Raises:
        DataError: the file is malformed, or none of its expressions has a box.
    """
    dataset = read_annotations(annotations, images_dir=images_dir).with_targets()
    if not dataset.expressions:
        raise DataError(f"{annotations} has no expression with a box, so nothing can be measured")
    return RememberedSet(str(annotations), dataset, images_dir)
