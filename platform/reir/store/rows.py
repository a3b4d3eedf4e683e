"""The columns of the two collections of a version, and conversion between records and rows."""

# Shapes: D vector dimension

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
from pymilvus import DataType

from reir.records import FloatArray, ImageRecord, IndexedImage, Instances, MaskRle
from reir.store.contract import InstanceRow, StoredPhoto, VersionSpec
from reir.store.filter_fields import NUMBER_FIELDS, STRING_FIELDS, InstanceArrays
from reir.store.validation import instance_id

PENDING = "pending"
"""Status of a ledger row whose image is being written for the first time; users never see it."""

VERSION_PROPERTY = "reir.version"

IMAGE_COLUMNS = {
    "uri": DataType.VARCHAR,
    "status": DataType.VARCHAR,
    "content_hash": DataType.VARCHAR,
    "size_bytes": DataType.INT64,
    "mtime_ns": DataType.INT64,
    "width_px": DataType.INT64,
    "height_px": DataType.INT64,
    "num_instances": DataType.INT64,
    "reach": DataType.INT64,
    "reason": DataType.VARCHAR,
    "detail": DataType.VARCHAR,
    "attributes": DataType.JSON,
    "same_as": DataType.VARCHAR,
    "perceptual_hash": DataType.VARCHAR,
}
"""Columns of the ledger. `reach` is larger than every instance number that may be stored, so that
surplus instances of an interrupted write can be found by their keys (`reir.store.milvus`)."""

CORNERS = ("x1", "y1", "x2", "y2")
INSTANCE_COLUMNS = {
    **dict.fromkeys(STRING_FIELDS, DataType.VARCHAR),
    **{name: DataType.FLOAT for name, field in NUMBER_FIELDS.items() if not field.is_derived},
    "attributes": DataType.JSON,
}
"""Columns of the instances collection that every version has, in this order."""

INSTANCE_OUTPUT_FIELDS = ["instance_id", *INSTANCE_COLUMNS]

DERIVED_COLUMNS = {
    name: DataType.FLOAT for name, field in NUMBER_FIELDS.items() if field.is_derived
}
"""Further columns of the instances collection on a server, for filters only. An embedded store
filters in numpy and does not need them; versions of earlier releases do not have them."""

MASK = "mask"
"""Column of the instances collection, in versions with masks only: JSON, or "" for no mask."""

Row = dict[str, Any]

_RECORD_FIELDS = {each.name for each in fields(ImageRecord)}


@dataclass(frozen=True)
class StoredVersion:
    """What is stored in the properties of the collections of a version."""

    spec: VersionSpec
    created_ns: int

    def to_properties(self) -> dict[str, str]:
        """Convert to collection properties, which both Lite and a server store."""
        return {VERSION_PROPERTY: json.dumps({**asdict(self.spec), "created_ns": self.created_ns})}

    @classmethod
    def from_properties(cls, properties: Mapping[str, str]) -> StoredVersion:
        """Convert from collection properties."""
        values = json.loads(properties[VERSION_PROPERTY])
        created_ns = values.pop("created_ns")
        return cls(VersionSpec(**values), created_ns)


def mask_columns(spec: VersionSpec) -> dict[str, DataType]:
    """Columns of the instances collection that only versions with masks have."""
    return {MASK: DataType.VARCHAR} if spec.has_masks else {}


def ledger_row(image: IndexedImage, dim: int) -> dict[str, Any]:
    """Return the ledger row of an image. Without instances, its image vector is the zero vector."""
    # Milvus requires a vector in every row.
    vector = np.zeros(dim, np.float32) if image.instances is None else image.instances.image_vector
    row = {each: getattr(image.record, each) for each in _RECORD_FIELDS}
    return {
        **row,
        "attributes": dict(image.record.attributes),
        # A finished row is only written once no surplus instances are stored (`reir.store.milvus`).
        "reach": image.record.num_instances,
        "vector": vector,
    }


def record_from_row(row: Mapping[str, Any]) -> ImageRecord:
    """Convert a ledger row; columns that an earlier release did not have get default values."""
    return ImageRecord(**{name: row[name] for name in _RECORD_FIELDS & row.keys()})


def image_from_rows(ledger: Mapping[str, Any], found: Sequence[Mapping[str, Any]]) -> IndexedImage:
    """Return the image as it was written, from complete rows of both collections."""
    # If the store has lost instances, the number in the ledger is too large; the rows decide.
    record = replace(record_from_row(ledger), num_instances=len(found))
    if not record.holds_instances:
        return IndexedImage(record, None)
    image_vector = np.asarray(ledger["vector"], dtype=np.float32)
    # An image has masks for all of its instances or for none, so none is missing here.
    masks = tuple(mask for row in found if (mask := mask_from_row(row)) is not None)
    instances = Instances(
        boxes=_numbers([[row[corner] for corner in CORNERS] for row in found], 4),
        objectness=np.array([row["objectness"] for row in found], dtype=np.float32),
        vectors=_numbers([row["vector"] for row in found], len(image_vector)),
        image_vector=image_vector,
        masks=masks or None,
    )
    return IndexedImage(record, instances)


def instance_ids(images: Mapping[str, Mapping[str, Any]], count: str) -> list[str]:
    """Ids of the instances of these ledger rows; column `count` has the number for each row."""
    return [
        instance_id(image_id, number)
        for image_id, row in images.items()
        for number in range(row[count])
    ]


def instances_of(found: Mapping[str, Row], images: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """Rows in `found` that belong to these images, ordered by instance number."""
    return [found[key] for key in instance_ids(images, "num_instances") if key in found]


def _numbers(rows: Sequence[Any], width: int) -> FloatArray:
    """(N, width) float32, also if N is 0."""
    return np.array(rows, dtype=np.float32).reshape(-1, width)


def instance_rows(
    image: IndexedImage, *, with_masks: bool, with_derived: bool
) -> list[dict[str, Any]]:
    """Return the rows of an image's instances, with the columns that the version has."""
    if image.instances is None:
        return []
    areas = image.instances.areas.tolist()
    found = [_instance_row(image.record, image.instances, i, area) for i, area in enumerate(areas)]
    if with_derived:
        _add_derived(found, image.instances)
    if with_masks:
        masks = image.instances.masks or [None] * len(found)
        for row, mask in zip(found, masks, strict=True):
            row[MASK] = "" if mask is None else json.dumps(asdict(mask))
    return found


def photo_from_instances(found: Sequence[InstanceRow]) -> StoredPhoto:
    """Return a photo, from all its instances with their vectors."""
    return StoredPhoto(
        image_id=found[0].image_id,
        uri=found[0].uri,
        attributes=found[0].attributes,
        boxes=np.array([row.box for row in found], dtype=np.float32),
        objectness=np.array([row.objectness for row in found], dtype=np.float32),
        vectors=np.array([row.vector for row in found], dtype=np.float32),
    )


def _add_derived(found: Sequence[dict[str, Any]], instances: Instances) -> None:
    """Add the derived columns to the rows of a photo."""
    arrays = InstanceArrays.of_photo(instances.boxes, instances.objectness)
    for name in DERIVED_COLUMNS:
        values = NUMBER_FIELDS[name].values(arrays).tolist()
        for row, value in zip(found, values, strict=True):
            row[name] = value


def mask_from_row(row: Mapping[str, Any]) -> MaskRle | None:
    """Return the mask in a row of the instances collection; None if it has none."""
    if not row.get(MASK):
        return None
    values = json.loads(row[MASK])
    return MaskRle(tuple(values["size"]), values["counts"])


def _instance_row(
    record: ImageRecord, instances: Instances, number: int, area: float
) -> dict[str, Any]:
    x1, y1, x2, y2 = instances.boxes[number].tolist()
    return {
        "instance_id": instance_id(record.image_id, number),
        "image_id": record.image_id,
        "uri": record.uri,
        "x1": x1,
        "y1": y1,
        "x2": x2,
        "y2": y2,
        "objectness": float(instances.objectness[number]),
        "area": area,
        "attributes": dict(record.attributes),
        "vector": instances.vectors[number],
    }


def instance_from_row(row: Mapping[str, Any], score: float = 0.0) -> InstanceRow:
    """Return the instance of a row, with its vector if the row has one."""
    vector = row.get("vector")
    return InstanceRow(
        instance_id=row["instance_id"],
        image_id=row["image_id"],
        uri=row["uri"],
        box=(row["x1"], row["y1"], row["x2"], row["y2"]),
        objectness=row["objectness"],
        area=row["area"],
        score=score,
        vector=None if vector is None else np.asarray(vector, dtype=np.float32),
        attributes=row["attributes"],
    )
