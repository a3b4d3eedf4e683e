"""Takes a re-indexing job from its state to its end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reir.encoders import stored_spec
from reir.errors import ConfigError, GalleryNotFound, LeaseLost, ReirError
from reir.images.large_photos import LargePhotos
from reir.index_report import IndexReport
from reir.operations.canary import canaries_of, read_canaries
from reir.operations.gate.verdicts import GateLimits, GateReport, judge
from reir.operations.lease import Lease, hold_lease
from reir.operations.live_history import live_history, make_live
from reir.store.contract import InstanceStore
from reir_ingestion.known_sources import KnownSource, known_sources
from reir_ingestion.reindex.job import ReindexJob, State, load_job, save_job, save_report
from reir_ingestion.reindex.known_files import KnownFilesSource
from reir_ingestion.sources import Source, SourceFile

if TYPE_CHECKING:
    from reir.operations.canary import Canary

_CHUNK = 512
MAX_OTHER_PHOTOS = 200_000
"""Limit of the photos that are in no source: they are sent to every worker."""

KEPT_VERSIONS = 1
"""Number of old versions that a job keeps by default; `reir rollback` needs at least one."""

SWITCH_SEEN_S = 2.0
"""After a switch, servers still search the version before for up to a second."""

Build = Callable[[Source, ReindexJob], IndexReport]
"""Indexes a source into the candidate version of a job, or into the live version that it became."""

OnState = Callable[[ReindexJob], None]


@dataclass(frozen=True, kw_only=True)
class ReindexRequest:
    """What the user asks for; None and empty values keep what the gallery or the job has.

    Attributes:
        encoder: spec of the encoder.
        large_photos: how to encode large photos.
        sources: what to index; empty for the sources that the gallery was indexed from.
        keep: number of old versions to keep; `KEPT_VERSIONS` for a new job.
        limits: of the check; those of `GateLimits` for a new job.
        canary_file: file with canaries.
    """

    encoder: str = ""
    large_photos: LargePhotos | None = None
    sources: tuple[KnownSource, ...] = ()
    keep: int | None = None
    limits: GateLimits | None = None
    canary_file: str = ""


@dataclass(frozen=True, kw_only=True)
class ReindexResult:
    """How a job ended.

    Attributes:
        job: in its last state.
        report: of the check; None if this process did not check.
        indexed: report of each source that this process indexed.
        deleted: versions that this process deleted.
    """

    job: ReindexJob
    report: GateReport | None = None
    indexed: tuple[IndexReport, ...] = ()
    deleted: tuple[str, ...] = ()


def reindex(
    store: InstanceStore,
    gallery: str,
    request: ReindexRequest,
    build: Build,
    *,
    on_state: OnState = lambda _: None,
) -> ReindexResult:
    """Start a job, or continue the one that was interrupted, and take it to its end.

    Args:
        store: the store.
        gallery: name of the gallery, which must have a live version.
        request: what to build. A job that is continued takes over `keep`, `limits` and
            `canary_file`; a request that differs from it in anything else is refused.
        build: indexes one source.
        on_state: called at the start of every state.

    Raises:
        JobRunning: another process re-indexes this gallery.
        ConfigError: the request differs from that of the interrupted job, or no source is known.
        SourceError: a source of the gallery does not exist.
        GalleryNotFound: there is no such gallery, or none of its versions is live.
    """
    with hold_lease(store, lease_of(gallery)) as lease:
        job = load_job(store, gallery)
        if job is None or job.state.is_end:
            job = _new_job(store, gallery, request, job)
            save_job(store, job)
        else:
            _check_request(job, request)
            job = _with_changes(job, request)
            save_job(store, job)
        return _Run(store, lease, build, on_state).finish(job)


def lease_of(gallery: str) -> str:
    """Return the name of the lease that a job of a gallery holds while a process works on it."""
    return f"reindex/{gallery}"


def drop_job(store: InstanceStore, gallery: str) -> ReindexJob:
    """Delete the candidate of a job that was interrupted or rejected.

    Raises:
        JobRunning: another process continues the job now.
        ConfigError: there is no such job, or its candidate is live already.
    """
    with hold_lease(store, lease_of(gallery)):
        job = load_job(store, gallery)
        if job is None or job.state in (State.DONE, State.DROPPED):
            raise ConfigError(f"gallery '{gallery}' has no re-indexing job that could be dropped")
        if store.live_version(gallery) == job.candidate:
            raise ConfigError(
                f"the re-indexing job of gallery '{gallery}' has already made its version "
                f"{job.candidate} live; run `reir reindex {gallery}` to finish it, and go back "
                f"with `reir rollback {gallery}`"
            )
        for version in (job.candidate, *job.leftovers):
            drop_if_present(store, gallery, version)
        job = job.to(State.DROPPED, leftovers=())
        save_job(store, job)
        return job


def drop_if_present(store: InstanceStore, gallery: str, version: str) -> bool:
    """Delete a version that is not live; return False if it does not exist."""
    try:
        store.drop_version(gallery, version)
    except GalleryNotFound:
        return False
    return True


def _new_job(
    store: InstanceStore, gallery: str, request: ReindexRequest, last: ReindexJob | None
) -> ReindexJob:
    live = store.live_version(gallery)
    names = [each.name for each in store.versions(gallery)]
    sources = request.sources or tuple(known_sources(store, gallery))
    if not sources:
        raise ConfigError(
            f"it is not known from which sources gallery '{gallery}' was indexed, because an "
            f"earlier release did it; name them with --source"
        )
    for each in sources:
        each.open()  # an unmounted disk is reported before any work is done
    leftovers = () if last is None else (last.candidate, *last.leftovers)
    # Versions that were live are kept or deleted by their number, `--keep`.
    kept = {live, *(each.version for each in live_history(store, gallery))}
    now_s = time.time()
    return ReindexJob(
        gallery=gallery,
        candidate=_candidate_name(names),
        live=live,
        state=State.INDEXING,
        encoder=request.encoder or stored_spec(store, gallery),
        large_photos=request.large_photos,
        sources=sources,
        keep=KEPT_VERSIONS if request.keep is None else request.keep,
        limits=request.limits or GateLimits(),
        canary_file=request.canary_file,
        leftovers=tuple(each for each in leftovers if each in names and each not in kept),
        started_s=now_s,
        updated_s=now_s,
    )


def _candidate_name(taken: Sequence[str]) -> str:
    """Return a new name for a version, which tells when it was built."""
    name = time.strftime("r%Y%m%d-%H%M%S", time.gmtime())
    number, found = 2, name
    while found in taken:
        found, number = f"{name}-{number}", number + 1
    return found


def _check_request(job: ReindexJob, request: ReindexRequest) -> None:
    """Check that a request fits the job that it continues.

    Raises:
        ConfigError: it asks for something else.
    """
    # What was not asked for is as in the job. `_with_changes` takes over what does not affect the
    # candidate.
    different = [
        name
        for name, wanted, has in (
            ("encoder", request.encoder, job.encoder),
            ("large-photos", request.large_photos, job.large_photos),
            ("source", [each.text for each in request.sources], [e.text for e in job.sources]),
        )
        if wanted not in ("", None, []) and wanted != has
    ]
    if different:
        raise ConfigError(
            f"a re-indexing job of gallery '{job.gallery}' with other settings "
            f"({', '.join(f'--{name}' for name in different)}) stopped at '{job.state}'; finish it "
            f"with `reir reindex {job.gallery}`, or drop it with `reir reindex {job.gallery} "
            f"--drop`"
        )


def _with_changes(job: ReindexJob, request: ReindexRequest) -> ReindexJob:
    """Return the job with the settings of the request that a job may change while it continues."""
    return replace(
        job,
        keep=job.keep if request.keep is None else request.keep,
        limits=request.limits or job.limits,
        canary_file=request.canary_file or job.canary_file,
    )


class _Run:
    """One process that works on a job."""

    def __init__(self, store: InstanceStore, lease: Lease, build: Build, on_state: OnState) -> None:
        self._store, self._lease, self._build, self._on_state = store, lease, build, on_state
        self._report: GateReport | None = None
        self._indexed: list[IndexReport] = []
        self._deleted: list[str] = []

    def finish(self, job: ReindexJob) -> ReindexResult:
        """Take the job to its end."""
        steps: dict[State, Callable[[ReindexJob], ReindexJob]] = {
            State.INDEXING: self._index,
            State.CHECKING: self._check,
            State.SWITCHING: self._switch,
            State.CATCHING_UP: self._catch_up,
            State.CLEANING: self._clean,
        }
        while not job.state.is_end:
            self._on_state(job)
            try:
                following = steps[job.state](job)
            except LeaseLost:
                raise  # the job belongs to another process now, so its state must not change
            except ReirError as error:
                save_job(self._store, replace(job, error=str(error)[:2000]))
                raise
            # A process that has lost the lease must not overwrite the state of its successor.
            self._lease.check()
            save_job(self._store, following)
            job = following
        return ReindexResult(
            job=job,
            report=self._report,
            indexed=tuple(self._indexed),
            deleted=tuple(self._deleted),
        )

    def _index(self, job: ReindexJob) -> ReindexJob:
        """Index all sources into the candidate, and then what is in the gallery besides."""
        sources = [each.open() for each in job.sources]
        for source in sources:
            self._indexed.append(self._build(source, job))
        self._index_others(job, sources, self._store.live_version(job.gallery))
        return job.to(State.CHECKING)

    def _check(self, job: ReindexJob) -> ReindexJob:
        """Compare the candidate with the version that is live now."""
        # Loads models, which takes seconds.
        from reir.operations.gate.measure import measure_versions

        live = self._store.live_version(job.gallery)
        if live == job.candidate:  # somebody has promoted it
            return job.to(State.CATCHING_UP)
        measured = measure_versions(
            self._store, job.gallery, live, job.candidate, self._canaries(job)
        )
        self._report = judge(job.gallery, live, job.candidate, measured, job.limits)
        save_report(self._store, job, self._report)
        if self._report.passed:
            return job.to(State.SWITCHING, live=live)
        # One rejected candidate is kept; otherwise a schedule whose runs fail would fill the disk.
        self._drop(job, job.leftovers)
        return job.to(State.REJECTED, live=live, leftovers=())

    def _switch(self, job: ReindexJob) -> ReindexJob:
        """Make the candidate live, unless the version that it was compared with no longer is."""
        live = self._store.live_version(job.gallery)
        # The candidate itself is live if the process was killed right after the switch.
        if live not in (job.live, job.candidate):
            return job.to(State.CHECKING)
        self._lease.check()
        make_live(self._store, job.gallery, job.candidate, by="reir reindex")
        return job.to(State.CATCHING_UP)

    def _catch_up(self, job: ReindexJob) -> ReindexJob:
        """Index photos that were added to the old version since its photos were listed."""
        # The user may have deleted the old version since the switch.
        if job.live in (each.name for each in self._store.versions(job.gallery)):
            self._index_others(job, [each.open() for each in job.sources], job.live)
        return job.to(State.CLEANING)

    def _clean(self, job: ReindexJob) -> ReindexJob:
        """Delete candidates of earlier jobs, and all but `keep` of the versions that were live."""
        surplus = self._surplus(job)
        if job.live in surplus:
            # Only without --keep. Servers and open galleries learn of the switch a moment later.
            time.sleep(SWITCH_SEEN_S)
        self._drop(job, (*job.leftovers, *surplus))
        return job.to(State.DONE, leftovers=())

    def _drop(self, job: ReindexJob, versions: Sequence[str]) -> None:
        """Delete versions, as far as they still exist and are not live."""
        live = self._store.live_version(job.gallery)
        for version in versions:
            if version != live and drop_if_present(self._store, job.gallery, version):
                self._deleted.append(version)

    def _surplus(self, job: ReindexJob) -> list[str]:
        """Return the versions to delete.

        Only versions that were live once: others, such as one for another encoder, were made by a
        user, who may still want them.
        """
        live = self._store.live_version(job.gallery)
        newest_first = [each.version for each in reversed(live_history(self._store, job.gallery))]
        # A version that was live several times counts once, by its last time.
        earlier = [each for each in dict.fromkeys(newest_first) if each != live]
        existing = {each.name for each in self._store.versions(job.gallery)}
        return [each for each in earlier if each in existing][job.keep :]

    def _canaries(self, job: ReindexJob) -> list[Canary]:
        if job.canary_file:
            return read_canaries(Path(job.canary_file))
        return canaries_of(self._store, job.gallery)

    def _index_others(self, job: ReindexJob, sources: Sequence[Source], version: str) -> None:
        """Index the photos of a version that the candidate lacks and that no source has lost.

        These are uploaded photos, and photos that were indexed from a source after it was listed.
        """
        others = tuple(islice(self._others(job, sources, version), MAX_OTHER_PHOTOS + 1))
        if len(others) > MAX_OTHER_PHOTOS:
            raise ConfigError(
                f"more than {MAX_OTHER_PHOTOS:,} photos of gallery '{job.gallery}' are in none of "
                f"its sources; name the sources that they are in with --source"
            )
        if others:
            text = f"photos of gallery {job.gallery} that are in none of its sources"
            self._indexed.append(self._build(KnownFilesSource(text, others), job))

    def _others(
        self, job: ReindexJob, sources: Sequence[Source], version: str
    ) -> Iterator[SourceFile]:
        rows = self._store.iter_images(job.gallery, version, status="indexed")
        while chunk := list(islice(rows, _CHUNK)):
            ids = [row.image_id for row in chunk]
            # Photos on which the candidate failed are present, too: they have been tried.
            present = self._store.get_images(job.gallery, job.candidate, ids)
            for row in chunk:
                if row.image_id not in present and not any(s.has_lost(row.uri) for s in sources):
                    yield SourceFile(row.uri, row.size_bytes, row.mtime_ns, row.attributes)


def job_summary(job: ReindexJob) -> dict[str, Any]:
    """Return what `reir reindex --json` and the monitor show of a job."""
    return {
        "gallery": job.gallery,
        "state": job.state.value,
        "candidate": job.candidate,
        "live": job.live,
        "encoder": job.encoder,
        "sources": [each.text for each in job.sources],
        "started_s": job.started_s,
        "updated_s": job.updated_s,
        "error": job.error,
    }
