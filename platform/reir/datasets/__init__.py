"""Readers of published annotation formats, which return a `ReferringDataset`."""

from __future__ import annotations

from reir.datasets.coco import (
    Caption,
    read_coco_captions,
    read_coco_images,
    read_coco_instances,
)
from reir.datasets.dataset import (
    BoxPx,
    Expression,
    ReferringDataset,
    ReferringImage,
    ReferringInstance,
)
from reir.datasets.grefcoco import read_grefcoco
from reir.datasets.photo_sentences import read_photo_sentences, write_photo_sentences
from reir.datasets.photos import (
    CaptionPair,
    read_caption_pairs,
    read_human_expressions,
    read_photos,
)
from reir.datasets.readers import Format, SplitBy, read_annotations, read_as
from reir.datasets.refer import read_refer, read_refer_json
from reir.datasets.reircoco import read_reircoco, write_reircoco
from reir.datasets.resedis import read_resedis
from reir.datasets.simrec import read_simrec
from reir.datasets.sorec import read_sorec

__all__ = [
    "BoxPx",
    "Caption",
    "CaptionPair",
    "Expression",
    "Format",
    "ReferringDataset",
    "ReferringImage",
    "ReferringInstance",
    "SplitBy",
    "read_annotations",
    "read_as",
    "read_caption_pairs",
    "read_coco_captions",
    "read_coco_images",
    "read_coco_instances",
    "read_grefcoco",
    "read_human_expressions",
    "read_photo_sentences",
    "read_photos",
    "read_refer",
    "read_refer_json",
    "read_reircoco",
    "read_resedis",
    "read_simrec",
    "read_sorec",
    "write_photo_sentences",
    "write_reircoco",
]
