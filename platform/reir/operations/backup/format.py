"""The files of a backup: their columns, and conversion from and to records.

A photo has one row in a file of photos, and each of its instances one row in a file of instances.
Both files of the same number hold the same photos in the same order, so a reader needs only these
two at a time. docs/backup.md describes the format for other programs.
"""

# Shapes: N instances of all photos of a file, D vector dimension

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from reir.records import FloatArray, ImageRecord, IndexedImage, Instances, MaskRle

PHOTOS, INSTANCES = "photos", "instances"

LEDGER_COLUMNS = {
    "image_id": pa.string(),
    "uri": pa.string(),
    "status": pa.string(),
    "content_hash": pa.string(),
    "size_bytes": pa.int64(),
    "mtime_ns": pa.int64(),
    "width_px": pa.int64(),
    "height_px": pa.int64(),
    "num_instances": pa.int64(),
    "reason": pa.string(),
    "detail": pa.string(),
    "attributes": pa.string(),
    "same_as": pa.string(),
    "perceptual_hash": pa.string(),
}
"""Columns of a file of photos: all fields of `ImageRecord`, with the attributes as JSON. A further
column has the vector of the photo, which is null for a photo without instances of its own."""

IMAGE_VECTOR = "image_vector"
VECTOR = "vector"
_CORNERS = ("x1", "y1", "x2", "y2")
_MASK = ("mask_height", "mask_width", "mask_counts")
_FILE_NAME = re.compile(rf"({PHOTOS}|{INSTANCES})-(\d{{5,}})\.parquet")


@dataclass(frozen=True)
class Counts:
    """Numbers of what a backup contains, or a part of it."""

    photos: int = 0
    failed: int = 0
    duplicates: int = 0
    instances: int = 0
    masks: int = 0

    def __add__(self, other: Counts) -> Counts:
        """Add up all numbers."""
        return Counts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Counts)))


def file_name(kind: str, number: int) -> str:
    """Return the name of a file; `kind` is `PHOTOS` or `INSTANCES`."""
    return f"{kind}-{number:05}.parquet"


def parse_file_name(name: str) -> tuple[str, int] | None:
    """Return kind and number of a file; None if no file of a backup has this name."""
    match = _FILE_NAME.fullmatch(name)
    found = None if match is None else (match[1], int(match[2]))
    # One name for each number, so that no file of a manifest can be named twice.
    return found if found and file_name(*found) == name else None


def photos_schema(dim: int) -> Any:
    """Columns of a file of photos."""
    return pa.schema([*LEDGER_COLUMNS.items(), (IMAGE_VECTOR, pa.list_(pa.float32(), dim))])


def instances_schema(dim: int) -> Any:
    """Columns of a file of instances."""
    return pa.schema(
        [
            ("image_id", pa.string()),
            ("number", pa.int32()),
            *((name, pa.float32()) for name in (*_CORNERS, "objectness")),
            (VECTOR, pa.list_(pa.float32(), dim)),
            *zip(_MASK, (pa.int32(), pa.int32(), pa.string()), strict=True),
        ]
    )


def open_writer(sink: Any, schema: Any) -> Any:
    """Return a writer of Parquet for one of the two schemas."""
    vectors = [each.name for each in schema if pa.types.is_fixed_size_list(each.type)]
    texts = [each.name for each in schema if pa.types.is_string(each.type)]
    return pq.ParquetWriter(
        sink,
        schema,
        compression="zstd",
        # Vectors hardly repeat. Byte by byte, their exponents do, which saves a sixth of the size.
        use_dictionary=texts,
        use_byte_stream_split=[f"{name}.list.element" for name in vectors],
    )


def photos_table(images: Sequence[IndexedImage], dim: int) -> Any:
    """Return the rows of photos."""
    rows = [_ledger_values(image.record) for image in images]
    columns = {
        name: pa.array([row[name] for row in rows], kind) for name, kind in LEDGER_COLUMNS.items()
    }
    vectors = np.zeros((len(images), dim), dtype=np.float32)
    for row, image in zip(vectors, images, strict=True):
        if image.instances is not None:
            row[:] = image.instances.image_vector
    lacking = pa.array([image.instances is None for image in images], pa.bool_())
    columns[IMAGE_VECTOR] = _vector_column(vectors, lacking)
    return pa.table(columns, photos_schema(dim))


def instances_table(images: Sequence[IndexedImage], dim: int) -> Any:
    """Return the rows of the instances of photos."""
    found = [
        (each.record.image_id, each.instances) for each in images if each.instances is not None
    ]
    boxes = _stacked([each.boxes for _, each in found], 4)
    masks = [mask for _, each in found for mask in each.masks or [None] * len(each)]
    columns = {
        "image_id": [image_id for image_id, each in found for _ in range(len(each))],
        "number": [number for _, each in found for number in range(len(each))],
        **{corner: boxes[:, place] for place, corner in enumerate(_CORNERS)},
        "objectness": _stacked([each.objectness[:, None] for _, each in found], 1)[:, 0],
        VECTOR: _vector_column(_stacked([each.vectors for _, each in found], dim)),
        "mask_height": [None if mask is None else mask.size[0] for mask in masks],
        "mask_width": [None if mask is None else mask.size[1] for mask in masks],
        "mask_counts": [None if mask is None else mask.counts for mask in masks],
    }
    return pa.table(columns, instances_schema(dim))


def counts_of(photos: Any, instances: Any) -> Counts:
    """Count what two tables contain."""
    return Counts(
        photos=photos.num_rows,
        failed=pc.sum(pc.equal(photos["status"], "failed")).as_py() or 0,
        duplicates=pc.sum(pc.not_equal(photos["same_as"], "")).as_py() or 0,
        instances=instances.num_rows,
        masks=instances.num_rows - instances["mask_counts"].null_count,
    )


def without_images(table: Any, image_ids: Set[str]) -> Any:
    """Return a table of photos or instances without the rows of these images."""
    return table.filter(pc.invert(pc.is_in(table["image_id"], pa.array(image_ids, pa.string()))))


def records_of(photos: Any) -> list[ImageRecord]:
    """Return the ledger rows in a table of photos.

    Raises:
        ValueError, TypeError: a value is not allowed in its column.
    """
    rows = photos.select(list(LEDGER_COLUMNS)).to_pylist()
    return [ImageRecord(**{**row, "attributes": json.loads(row["attributes"])}) for row in rows]


def images_of(photos: Any, instances: Any) -> list[IndexedImage]:
    """Return the images of two tables of the same number.

    Raises:
        ValueError, TypeError: a value is not allowed, or the tables do not belong together.
    """
    records = records_of(photos)
    wanted = [(each.image_id, number) for each in records for number in range(each.num_instances)]
    stored = [instances[name].to_pylist() for name in ("image_id", "number")]
    # Without nulls: a photo without instances of its own has no vector either.
    image_vectors = _vectors_of(photos[IMAGE_VECTOR])
    num_holders = sum(each.holds_instances for each in records)
    if wanted != [*zip(*stored, strict=True)] or len(image_vectors) != num_holders:
        raise ValueError(
            f"{len(stored[0])} instances and {len(image_vectors)} image vectors are not those of "
            f"the {len(records)} photos in the file of the same number"
        )
    read, start = _instance_reader(instances), 0
    image_vector = iter(image_vectors)
    images = []
    for record in records:
        part = slice(start, start := start + record.num_instances)
        found = read(part, next(image_vector)) if record.holds_instances else None
        images.append(IndexedImage(record, found))
    return images


def vectors_of(instances: Any) -> FloatArray:
    """Return the (N, D) vectors in a table of instances."""
    return _vectors_of(instances[VECTOR])


def _instance_reader(instances: Any) -> Callable[[slice, FloatArray], Instances]:
    """Return a function that makes `Instances` of some rows, and of the vector of their photo."""
    boxes = np.stack([instances[corner].to_numpy() for corner in _CORNERS], axis=1)
    objectness, vectors = instances["objectness"].to_numpy(), vectors_of(instances)
    masks = [
        None if runs is None else MaskRle((height, width), runs)
        for height, width, runs in zip(
            *(instances[each].to_pylist() for each in _MASK), strict=True
        )
    ]

    def read(part: slice, image_vector: FloatArray) -> Instances:
        found = tuple(mask for mask in masks[part] if mask is not None)
        return Instances(boxes[part], objectness[part], vectors[part], image_vector, found or None)

    return read


def _ledger_values(record: ImageRecord) -> dict[str, Any]:
    # ASCII, so that any text survives, also one that UTF-8 cannot encode.
    attributes = json.dumps(dict(record.attributes))
    return {name: getattr(record, name) for name in LEDGER_COLUMNS} | {"attributes": attributes}


def _stacked(parts: Sequence[FloatArray], width: int) -> FloatArray:
    """(N, width) float32, also if there are no parts."""
    return np.concatenate([np.empty((0, width), dtype=np.float32), *parts])


def _vector_column(vectors: FloatArray, lacking: Any = None) -> Any:
    """Return vectors as a column, with null for those that `lacking` marks."""
    values = pa.array(vectors.ravel(), pa.float32())
    return pa.FixedSizeListArray.from_arrays(values, vectors.shape[1], mask=lacking)


def _vectors_of(column: Any) -> FloatArray:
    """Return the vectors in a column, without those that are null."""
    values = column.combine_chunks().flatten().to_numpy()
    return np.asarray(values, dtype=np.float32).reshape(-1, column.type.list_size)
