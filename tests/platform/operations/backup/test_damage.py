"""A damaged backup is recognized before anything is written, by the name of the file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from reir.errors import ConfigError, DataError
from reir.operations.backup.manifest import MANIFEST, checksum_of
from reir.operations.backup.reports import BackupReport, RestoreReport
from reir.store.memory import MemoryStore
from reir_testing.rewriting import SPEC

BackUp = Callable[..., BackupReport]
Restore = Callable[..., RestoreReport]
Damage = Callable[[Path], None]

PHOTOS, INSTANCES = "photos-00000.parquet", "instances-00000.parquet"


def flip(name: str, place: float) -> Damage:
    """Return a function that changes one byte of a file; `place` is in [0, 1)."""

    def damage(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[int(place * len(content))] ^= 0x10
        (folder / name).write_bytes(content)

    return damage


def truncate(name: str) -> Damage:
    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-1])

    return damage


def remove(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def edit(change: Callable[[dict[str, Any]], object], *, honest: bool = True) -> Damage:
    """Return a function that changes the manifest, and also its checksum if `honest`."""

    def damage(folder: Path) -> None:
        values = json.loads((folder / MANIFEST).read_text())
        old = values.pop("checksum")
        change(values)
        checksum = checksum_of(values) if honest else old
        (folder / MANIFEST).write_text(json.dumps({**values, "checksum": checksum}))

    return damage


def write(text: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / MANIFEST).write_text(text)

    return damage


def extra_file(values: dict[str, Any]) -> None:
    for kind in ("photos", "instances"):
        values["files"].append({**values["files"][0], "name": f"{kind}-00001.parquet", "rows": 0})


def rename_file(values: dict[str, Any]) -> None:
    values["files"][0]["name"] = "../photos-00000.parquet"


def swap_columns(folder: Path) -> None:
    """Write a file that is intact, but not one of a backup."""
    table = pq.read_table(folder / PHOTOS)
    pq.write_table(table.drop_columns(["uri"]), folder / PHOTOS)
    content = (folder / PHOTOS).read_bytes()

    def change(values: dict[str, Any]) -> None:
        checksum = hashlib.sha256(content).hexdigest()
        values["files"][0] |= {"bytes": len(content), "sha256": checksum}

    edit(change)(folder)


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    folder = tmp_path_factory.mktemp("backups") / "intact"
    store = MemoryStore()
    every_kind, back_up = map(request.getfixturevalue, ("every_kind", "back_up"))
    store.create_version("photos", "v1", SPEC)
    store.upsert_images("photos", "v1", every_kind)
    back_up(store, folder)
    return folder


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(truncate(PHOTOS), f"{PHOTOS} is damaged: it has", id="short-photos"),
        pytest.param(truncate(INSTANCES), f"{INSTANCES} is damaged: it has", id="short-instances"),
        pytest.param(flip(PHOTOS, 0.5), f"{PHOTOS} is damaged: its content", id="flip-photos"),
        pytest.param(flip(INSTANCES, 0), f"{INSTANCES} is damaged: its content", id="flip-first"),
        pytest.param(flip(INSTANCES, 0.999), f"{INSTANCES} is damaged: its", id="flip-last"),
        pytest.param(remove(PHOTOS), f"{PHOTOS} is missing", id="no-photos"),
        pytest.param(remove(INSTANCES), f"{INSTANCES} is missing", id="no-instances"),
        pytest.param(remove(MANIFEST), "the backup was not finished", id="no-manifest"),
        pytest.param(write("not JSON"), f"{MANIFEST} is damaged: it is not", id="no-json"),
        pytest.param(write("[1]"), f"{MANIFEST} is damaged: it is not", id="a-list"),
        pytest.param(write("\xff\x00"), f"{MANIFEST} is damaged: it is not", id="binary"),
        pytest.param(write("{}"), f"{MANIFEST} is damaged: it is not", id="no-keys"),
        pytest.param(edit(extra_file), "photos-00001.parquet is missing", id="extra-entry"),
        pytest.param(
            edit(lambda values: values["files"].pop()), "must be pairs", id="missing-entry"
        ),
        pytest.param(edit(rename_file), "must be pairs", id="foreign-name"),
        pytest.param(
            edit(lambda values: values.pop("spec")), f"{MANIFEST} is damaged: spec", id="no-spec"
        ),
        pytest.param(
            edit(lambda values: values["counts"].update(photos=7)), "counts has 7", id="counts"
        ),
        pytest.param(
            edit(lambda values: values.update(gallery="other"), honest=False),
            "do not match its checksum",
            id="changed-value",
        ),
        pytest.param(
            edit(lambda values: values.update(format=2)),
            "has format 2, and this release reads formats up to 1",
            id="newer-format",
        ),
        pytest.param(swap_columns, f"{PHOTOS} is damaged: it has no column 'uri'", id="columns"),
    ],
)
def test_damage_is_named_and_nothing_is_written(
    intact: Path, tmp_path: Path, restore: Restore, damage: Damage, message: str
) -> None:
    folder = tmp_path / "b"
    shutil.copytree(intact, folder)
    damage(folder)
    store = MemoryStore()
    with pytest.raises(DataError) as error:
        restore(store, folder)
    assert message in str(error.value)
    assert str(folder) in str(error.value)
    # The wrong columns are only found when the rows are read, and a lease is held by then.
    assert store.galleries() == []
    assert store.find_documents("lease") == {}


def test_every_value_of_the_manifest_matters(
    intact: Path, tmp_path: Path, restore: Restore
) -> None:
    text = (intact / MANIFEST).read_bytes()
    folder = tmp_path / "b"
    shutil.copytree(intact, folder)
    for place in range(0, len(text), 7):
        changed = bytearray(text)
        changed[place] ^= 1
        # The last digit of a number may be too small to change it.
        with contextlib.suppress(ValueError):
            if json.loads(changed) == json.loads(text):
                continue
        (folder / MANIFEST).write_bytes(changed)
        with pytest.raises(DataError):
            restore(MemoryStore(), folder)


def test_places_that_cannot_be_backups(tmp_path: Path, restore: Restore) -> None:
    with pytest.raises(DataError, match="there is no finished backup"):
        restore(MemoryStore(), tmp_path / "nothing")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is a file"):
        restore(MemoryStore(), tmp_path / "file")
    with pytest.raises(ConfigError, match="name a local path, s3://"):
        restore(MemoryStore(), "ftp://user:secret@host/x")
