"""The state of a re-indexing job, which is kept in the store.

    INDEXING -> CHECKING -> SWITCHING -> CATCHING_UP -> CLEANING -> DONE
                    |
                    +-----> REJECTED

A job that was killed continues at its state. Every step can be repeated without harm.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any

from reir.images.large_photos import LargePhotos
from reir.operations.gate.verdicts import GateLimits, GateReport, report_from
from reir.store.contract import InstanceStore
from reir_ingestion.known_sources import KnownSource
from reir_ingestion.sources import SourceOptions

KIND, REPORT_KIND = "reindex", "reindex-report"
"""Kinds of the documents: the last job of each gallery, and the reports of its jobs."""

KEPT_REPORTS = 20


class State(StrEnum):
    """What a job does now.

    Attributes:
        INDEXING: builds the candidate version.
        CHECKING: compares it with the live version.
        SWITCHING: makes it live.
        CATCHING_UP: indexes photos that were added to the old version in the meantime.
        CLEANING: deletes old versions.
        DONE: ended; the candidate is live.
        REJECTED: ended; the candidate failed the check, and was kept.
        DROPPED: ended; the candidate was deleted at the user's request.
    """

    INDEXING = "indexing"
    CHECKING = "checking"
    SWITCHING = "switching"
    CATCHING_UP = "catching up"
    CLEANING = "cleaning"
    DONE = "done"
    REJECTED = "rejected"
    DROPPED = "dropped"

    @property
    def is_end(self) -> bool:
        """Whether the job has ended."""
        return self in (State.DONE, State.REJECTED, State.DROPPED)


@dataclass(frozen=True, kw_only=True)
class ReindexJob:
    """One job.

    Attributes:
        gallery: name of the gallery.
        candidate: version that the job builds.
        live: version that was live when the job last compared.
        state: see `State`.
        encoder: spec of the encoder of the candidate, as `reir.encoders` accepts it.
        large_photos: how large photos are encoded; None keeps the live setting.
        sources: what is indexed.
        keep: number of old versions to keep.
        limits: of the check.
        canary_file: file with canaries; empty for those of the gallery.
        leftovers: candidates of earlier jobs that were never live; deleted when this job ends.
        started_s, updated_s: Unix times of the start and of the last change of state.
        error: why the job stopped at its state; empty if it was not stopped by an error.
    """

    gallery: str
    candidate: str
    live: str
    state: State
    encoder: str
    large_photos: LargePhotos | None
    sources: tuple[KnownSource, ...]
    keep: int
    limits: GateLimits
    canary_file: str
    leftovers: tuple[str, ...]
    started_s: float
    updated_s: float
    error: str = ""

    def to(self, state: State, **changes: Any) -> ReindexJob:
        """Return the job in its next state."""
        return replace(self, state=state, updated_s=time.time(), error="", **changes)


def save_job(store: InstanceStore, job: ReindexJob) -> None:
    """Write the state of a job."""
    values = asdict(replace(job, limits=GateLimits()))
    # `asdict` leaves objects that are no dataclasses as they are, but a document is plain JSON.
    values |= {"state": job.state.value, "limits": job.limits.model_dump()}
    store.put_document(KIND, job.gallery, values)


def load_job(store: InstanceStore, gallery: str) -> ReindexJob | None:
    """Return the last job of a gallery; None if there was none."""
    values = store.find_documents(KIND, gallery).get(gallery)
    return None if values is None else _job(values)


def save_report(store: InstanceStore, job: ReindexJob, report: GateReport) -> None:
    """Keep a report in the store, and delete those of the oldest jobs."""
    store.put_document(REPORT_KIND, f"{job.gallery}/{job.candidate}", report.to_dict())
    # The slash keeps "photos" apart from "photos2": the store compares the beginnings of names.
    names = store.find_documents(REPORT_KIND, f"{job.gallery}/")
    oldest = sorted(names, key=lambda name: float(names[name]["created_s"]))
    store.delete_documents(REPORT_KIND, oldest[:-KEPT_REPORTS])


def load_report(store: InstanceStore, job: ReindexJob) -> GateReport | None:
    """Return the report of a job; None if it has not been checked, or the report is deleted."""
    name = f"{job.gallery}/{job.candidate}"
    values = store.find_documents(REPORT_KIND, name).get(name)
    return None if values is None else report_from(values)


def _job(values: Mapping[str, Any]) -> ReindexJob:
    sources = tuple(
        KnownSource(**{**each, "options": SourceOptions(**each["options"])})
        for each in values["sources"]
    )
    large_photos = values["large_photos"]
    return ReindexJob(
        **{
            **values,
            "state": State(values["state"]),
            "large_photos": LargePhotos(large_photos) if large_photos else None,
            "sources": sources,
            "limits": GateLimits(**values["limits"]),
            "leftovers": tuple(values["leftovers"]),
        }
    )
