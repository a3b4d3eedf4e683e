"""What backups and restores report, while they run and at their end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from reir.operations.backup.format import Counts

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and the total."""


@dataclass(frozen=True, kw_only=True)
class BackupReport:
    """A backup that was written.

    Attributes:
        gallery, version: what was backed up.
        dest: the folder, without secrets.
        begun_s, ended_s: Unix times between which each photo was read.
        counts: what the backup contains.
        num_bytes: size of the files.
        read_again: photos that were new, changed or deleted since they were first listed.
        incomplete: photos of which the store has lost instances; the backup has the others.
        orphans: duplicates whose instances no photo of the store holds.
        recorded: whether the store keeps a record of the backup, which a store in a read-only
            folder cannot.
    """

    gallery: str
    version: str
    dest: str
    begun_s: float
    ended_s: float
    counts: Counts
    num_bytes: int
    read_again: int
    incomplete: int
    orphans: int
    recorded: bool = False

    @property
    def seconds(self) -> float:
        """Time that the backup took."""
        return self.ended_s - self.begun_s

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        values: dict[str, Any] = asdict(self)
        counts, size = values.pop("counts"), values.pop("num_bytes")
        return {**values, **counts, "bytes": size, "seconds": round(self.seconds, 3)}


@dataclass(frozen=True, kw_only=True)
class RestoreReport:
    """A backup that was restored.

    Attributes:
        gallery, version: the version that was written.
        source: the folder of the backup, without secrets.
        existed: whether the version existed before; False for one that was created by a restore of
            this backup that has not ended.
        counts: what the backup contains.
        written: photos that this run wrote; the others were in the store already.
        erased: photos that were left out, because they were erased from the gallery.
        problems: what differs between the backup and the store; empty if nothing does.
        queries: number of searches that were compared.
        recall: mean share of the ten nearest instances of a query that the searches found.
        live: whether the version is live now.
        documents: documents of the gallery that were restored, such as canaries and sources.
        seconds: time that the restore took.
    """

    gallery: str
    version: str
    source: str
    existed: bool
    counts: Counts
    written: int
    erased: int
    problems: tuple[str, ...]
    queries: int
    recall: float
    live: bool
    documents: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        values: dict[str, Any] = asdict(self)
        counts = values.pop("counts")
        return {**values, **counts, "seconds": round(self.seconds, 3)}
