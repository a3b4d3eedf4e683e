"""Lists the photos to describe: a folder with COCO's annotations, or photos alone."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from reir.datasets import ReferringDataset, ReferringInstance, read_coco_captions
from reir.datasets.coco import read_coco_instances
from reir.datasets.dataset import is_inside
from reir.datasets.photo_sizes import leaves_folder
from reir.datasets.photos import EXPRESSIONS, read_splits
from reir.errors import ConfigError, DataError
from reir_ingestion.sources import open_source
from reir_ingestion.sources.local import LocalSource

INSTANCES, CAPTIONS, IMAGES = "instances.json", "captions.json", "images"


@dataclass(frozen=True, kw_only=True)
class Photo:
    """One photo to describe.

    Attributes:
        file_name: path of the file, relative to the folder of photos; identifies the photo.
        path: the file.
        annotated_px: width and height that the boxes refer to; None without annotations.
        instances: its annotated instances, without crowds and boxes without area.
        crowded: classes of which it has a crowd.
        captions: sentences about the whole photo.
    """

    file_name: str
    path: Path
    annotated_px: tuple[int, int] | None = None
    instances: tuple[ReferringInstance, ...] = ()
    crowded: frozenset[str] = frozenset()
    captions: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PhotoSet:
    """The photos of one run.

    Attributes:
        source: what the user named, for messages.
        images_dir: folder that the file names are relative to.
        photos: the photos, in a fixed order.
        crowds: annotated boxes of groups by file name; they are written, but not described.
    """

    source: str
    images_dir: Path
    photos: tuple[Photo, ...]
    crowds: Mapping[str, tuple[ReferringInstance, ...]]


def open_photos(
    source: str, *, annotations: Path | None = None, split: str | None = None
) -> PhotoSet:
    """List the photos of a folder or pattern.

    A folder with `instances.json` is read as COCO's annotations, with the photos in its subfolder
    `images`, if there is one, and the sentences of its `captions.json`. Any other folder, pattern
    or file is a list of photos without annotations.

    Args:
        source: folder, pattern or file on this machine.
        annotations: COCO instances file, instead of `instances.json`.
        split: use only this split of the `expressions.json` in the folder.

    Raises:
        ConfigError: a split is named, but the folder has none.
        DataError: an annotation file is malformed, or names a file outside the folder.
        SourceError: there are no photos.
    """
    folder = Path(source).expanduser()
    if annotations is None and (folder / INSTANCES).is_file():
        annotations = folder / INSTANCES
    if annotations is not None:
        return _annotated(folder, annotations, split)
    if split is not None:
        raise ConfigError(
            f"--split {split!r} needs a folder with {INSTANCES} and an {EXPRESSIONS} that has "
            f"splits; {source!r} has no annotations"
        )
    return _bare(source)


def _annotated(folder: Path, annotations: Path, split: str | None) -> PhotoSet:
    dataset = read_coco_instances(annotations, masks=True)
    if split is not None:
        source = str(folder / EXPRESSIONS)
        dataset = replace(dataset, source=source, splits=read_splits(folder)).split(split)
    images_dir = folder / IMAGES if (folder / IMAGES).is_dir() else folder
    captions = _captions(folder)
    instances, crowds = _instances_by_photo(dataset)
    photos = []
    for image in dataset.images:
        # Photos may be sent to an endpoint, so a file of annotations from elsewhere must not be
        # able to name any other file of this machine.
        if leaves_folder(image.file_name):
            raise DataError(
                f"{dataset.source}: image {image.image_id!r}: expected a file_name below the "
                f"folder of photos, got {image.file_name!r}"
            )
        own = (each for each in instances[image.image_id] if is_inside(image, each.box_xyxy_px))
        photos.append(
            Photo(
                file_name=image.file_name,
                path=images_dir / image.file_name,
                annotated_px=(image.width_px, image.height_px),
                instances=tuple(own),
                crowded=frozenset(each.category or "" for each in crowds[image.image_id]),
                captions=tuple(captions[image.image_id]),
            )
        )
    named = {image.image_id: image.file_name for image in dataset.images}
    return PhotoSet(
        source=str(folder),
        images_dir=images_dir,
        photos=tuple(photos),
        crowds={named[each]: tuple(found) for each, found in crowds.items() if found},
    )


def _instances_by_photo(
    dataset: ReferringDataset,
) -> tuple[Mapping[str, list[ReferringInstance]], Mapping[str, list[ReferringInstance]]]:
    """Return single instances and crowds by image id."""
    singles: dict[str, list[ReferringInstance]] = defaultdict(list)
    crowds: dict[str, list[ReferringInstance]] = defaultdict(list)
    for instance in dataset.instances:
        (crowds if instance.is_crowd else singles)[instance.image_id].append(instance)
    return singles, crowds


def _captions(folder: Path) -> Mapping[str, list[str]]:
    """Return the captions by image id; none if the folder has no file of captions."""
    found: dict[str, list[str]] = defaultdict(list)
    if (folder / CAPTIONS).is_file():
        for caption in read_coco_captions(folder / CAPTIONS):
            found[caption.image_id].append(caption.text.strip())
    return found


def _bare(source: str) -> PhotoSet:
    opened = open_source(source)
    if not isinstance(opened, LocalSource):
        raise ConfigError(
            f"{source!r} is not a folder, pattern or photo on this machine; copy the photos here, "
            f"or name the folder that has them"
        )
    root = Path(os.fsdecode(opened.root))
    images_dir = root if root.is_dir() else root.parent
    paths = [Path(os.fsdecode(path)) for path in opened.paths()]
    return PhotoSet(
        source=source,
        images_dir=images_dir,
        photos=tuple(
            Photo(file_name=path.relative_to(images_dir).as_posix(), path=path) for path in paths
        ),
        crowds={},
    )
