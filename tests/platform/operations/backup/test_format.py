"""The columns of the files, and conversion to them and back."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reir.operations.backup import format as backup_format
from reir.records import ImageRecord, IndexedImage, Instances
from reir_testing.rewriting import DIM


def saved(table: Any) -> Any:
    """Return a table as a reader gets it from a file."""
    sink = pa.BufferOutputStream()
    with backup_format.open_writer(sink, table.schema) as writer:
        writer.write_table(table)
    return pq.read_table(pa.BufferReader(sink.getvalue()))


def round_trip(images: list[IndexedImage], dim: int = DIM) -> list[IndexedImage]:
    tables = backup_format.photos_table(images, dim), backup_format.instances_table(images, dim)
    return backup_format.images_of(*map(saved, tables))


def test_files_of_photos_have_all_columns_of_the_ledger() -> None:
    assert list(backup_format.LEDGER_COLUMNS) == [each.name for each in fields(ImageRecord)]


def test_images_survive_bit_by_bit(every_kind: list[IndexedImage]) -> None:
    for found, wanted in zip(round_trip(every_kind), every_kind, strict=True):
        assert found.record == wanted.record
        if wanted.instances is None:
            assert found.instances is None
            continue
        assert found.instances is not None
        assert found.instances.masks == wanted.instances.masks
        for name in ("boxes", "objectness", "vectors", "image_vector"):
            one, other = getattr(found.instances, name), getattr(wanted.instances, name)
            assert one.tobytes() == other.tobytes(), name


@settings(deadline=None)
@given(bits=st.lists(st.integers(0, 2**32 - 1), min_size=4, max_size=4))
def test_every_finite_float_survives(bits: list[int]) -> None:
    vectors = np.array([bits], dtype=np.uint32).view(np.float32)
    vectors[~np.isfinite(vectors)] = -0.0
    instances = Instances(
        np.array([[0, 0, 1, 1]], np.float32), np.ones(1, np.float32), vectors, vectors[0]
    )
    record = ImageRecord(image_id="a", uri="u", status="indexed", num_instances=1)
    (found,) = round_trip([IndexedImage(record, instances)], dim=4)
    assert found.instances is not None
    assert found.instances.vectors.tobytes() == vectors.tobytes()


@settings(deadline=None)
@given(
    attributes=st.dictionaries(
        st.text(),
        st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False),
    )
)
def test_every_attribute_survives(attributes: dict[str, Any]) -> None:
    record = ImageRecord(
        image_id="a", uri="u", status="failed", reason="empty", attributes=attributes
    )
    (found,) = round_trip([IndexedImage(record, None)])
    assert found.record == record


def test_counts(every_kind: list[IndexedImage]) -> None:
    tables = [
        table(every_kind, DIM)
        for table in (backup_format.photos_table, backup_format.instances_table)
    ]
    counts = backup_format.counts_of(*tables)
    num_instances = sum(image.record.num_instances for image in every_kind)
    assert (counts.photos, counts.failed, counts.duplicates) == (42, 1, 1)
    assert (counts.instances, counts.masks) == (num_instances, num_instances)
    empty = backup_format.photos_table([], DIM), backup_format.instances_table([], DIM)
    assert backup_format.counts_of(*empty) == backup_format.Counts()
    assert backup_format.images_of(*map(saved, empty)) == []


def test_files_that_do_not_belong_together_are_rejected(every_kind: list[IndexedImage]) -> None:
    photos = backup_format.photos_table(every_kind, DIM)
    instances = backup_format.instances_table(every_kind, DIM)
    for wrong in (instances.slice(1), instances.take([*range(1, len(instances)), 0])):
        with pytest.raises(ValueError, match="file of the same number"):
            backup_format.images_of(photos, wrong)


def test_photos_leave_a_table(every_kind: list[IndexedImage]) -> None:
    leaving = {every_kind[n].record.image_id for n in (0, 1, 41)}
    tables = (
        backup_format.photos_table(every_kind, DIM),
        backup_format.instances_table(every_kind, DIM),
    )
    found = backup_format.images_of(
        *(backup_format.without_images(saved(table), leaving) for table in tables)
    )
    assert [each.record for each in found] == [each.record for each in every_kind[2:41]]


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("photos-00000.parquet", ("photos", 0)),
        ("instances-123456.parquet", ("instances", 123456)),
        ("photos-000000.parquet", None),
        ("photos-1.parquet", None),
        ("../photos-00000.parquet", None),
        ("photos-00000.parquet.tmp", None),
        ("manifest.json", None),
    ],
)
def test_names_of_files(name: str, found: tuple[str, int] | None) -> None:
    assert backup_format.parse_file_name(name) == found


def test_a_photo_with_wrong_values_is_rejected(every_kind: list[IndexedImage]) -> None:
    image = every_kind[1]
    tables = backup_format.photos_table([image], DIM), backup_format.instances_table([image], DIM)
    wrong = replace(image.record, status="indexed", width_px=-1)
    assert wrong.width_px == -1
    columns = tables[0].set_column(2, "status", pa.array(["lost"]))
    with pytest.raises(ValueError, match="status must be"):
        backup_format.images_of(columns, tables[1])
