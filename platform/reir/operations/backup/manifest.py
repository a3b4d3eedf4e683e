"""`Manifest`: describes a finished backup; it is written after all other files.

Its checksum is the sha256 of its other values, as JSON with sorted keys, without spaces and with
everything but ASCII escaped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from reir.errors import DataError
from reir.operations.backup.folder import BackupFolder
from reir.operations.backup.format import INSTANCES, PHOTOS, Counts, parse_file_name
from reir.store.contract import VersionSpec

FORMAT = 1
"""Number of the format. A release that changes the files in a way that earlier releases cannot read
increments it."""

MANIFEST = "manifest.json"
_CHECKSUM = "checksum"


class BackupFile(BaseModel):
    """A Parquet file of a backup."""

    model_config = ConfigDict(frozen=True)

    name: str
    bytes: int = Field(ge=0)
    sha256: str
    rows: int = Field(ge=0)


class Manifest(BaseModel):
    """What a backup contains.

    Attributes:
        format: number of the format.
        gallery, version: what was backed up.
        spec: spec of the version.
        begun_s, ended_s: Unix times between which each photo was read.
        begun, ended: the same times for people.
        counts: what the files contain.
        files: all files besides the manifest, ordered by number; photos before instances.
        documents: kind -> name without the name of the gallery -> document.
        checksum: see the module.
    """

    model_config = ConfigDict(frozen=True)

    format: int
    gallery: str
    version: str
    spec: VersionSpec
    begun_s: float
    ended_s: float
    begun: str
    ended: str
    counts: Counts
    files: tuple[BackupFile, ...]
    documents: dict[str, dict[str, dict[str, Any]]]
    checksum: str = ""

    @model_validator(mode="after")
    def _check_files(self) -> Manifest:
        wanted = [
            (kind, number)
            for number in sorted({parsed[1] for parsed in self._parsed_names() if parsed})
            for kind in (PHOTOS, INSTANCES)
        ]
        if [*self._parsed_names()] != wanted:
            raise ValueError(
                f"files must be pairs {PHOTOS}-NUMBER.parquet and {INSTANCES}-NUMBER.parquet, "
                f"ordered by number"
            )
        for kind, counted in ((PHOTOS, self.counts.photos), (INSTANCES, self.counts.instances)):
            if (rows := sum(each.rows for each in self.files if kind in each.name)) != counted:
                raise ValueError(f"the files have {rows} {kind}, but counts has {counted}")
        return self

    @property
    def num_bytes(self) -> int:
        """Size of all files besides the manifest."""
        return sum(each.bytes for each in self.files)

    def pairs(self) -> Iterator[tuple[BackupFile, BackupFile]]:
        """Yield the file of photos and the file of instances of each number."""
        # `_check_files` has made sure that files of photos and of instances alternate.
        return zip(self.files[::2], self.files[1::2], strict=True)

    def _parsed_names(self) -> Iterator[tuple[str, int] | None]:
        return (parse_file_name(each.name) for each in self.files)


def write_manifest(folder: BackupFolder, manifest: Manifest) -> None:
    """Write the manifest with its checksum.

    Raises:
        DataError: it cannot be written.
    """
    values = manifest.model_dump(exclude={_CHECKSUM})
    text = json.dumps({**values, _CHECKSUM: checksum_of(values)}, indent=2)
    folder.write(MANIFEST, memoryview(f"{text}\n".encode()))


def read_manifest(folder: BackupFolder) -> Manifest:
    """Read the manifest and check it.

    Raises:
        DataError: there is none, it is damaged, or a newer release has written it.
    """
    if MANIFEST not in folder.sizes():
        raise DataError(
            f"there is no finished backup in {folder.place}: it has no {MANIFEST}, which `reir "
            f"backup` writes last, so the backup was not finished; use another backup"
        )
    path = f"{folder.place}/{MANIFEST}"
    try:
        values = json.loads(bytes(folder.read(MANIFEST)))
        number = int(values["format"])
    except (ValueError, TypeError, KeyError) as error:
        raise _damaged(path, f"it is not the JSON that `reir backup` writes ({error})") from error
    # Before the checksum and the fields, both of which a later format may define differently.
    if number > FORMAT:
        raise DataError(
            f"{path} has format {number}, and this release reads formats up to {FORMAT}; install "
            f"the release of REIR that wrote it, or a later one"
        )
    if values.pop(_CHECKSUM, None) != (checksum := checksum_of(values)):
        raise _damaged(path, "its values do not match its checksum")
    try:
        return Manifest(**values, checksum=checksum)
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise _damaged(path, f"{where or 'it'}: {error.errors()[0]['msg']}") from error


def checksum_of(values: dict[str, Any]) -> str:
    """Return the checksum of a manifest, whose values are given without it."""
    # Writer and reader get the same text: JSON turns tuples into lists, and keeps floats exactly.
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _damaged(path: str, why: str) -> DataError:
    return DataError(f"{path} is damaged: {why}; use another backup")
