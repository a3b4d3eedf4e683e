"""A re-indexing job ends in the right state, wherever it is interrupted."""

from __future__ import annotations

import json
import shutil
import tarfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from reir.encoders import load_encoder_spec
from reir.errors import ConfigError, JobRunning, LeaseLost, SourceError, StoreUnavailable
from reir.images.decode import canonical_uri
from reir.index_report import IndexReport
from reir.operations import lease
from reir.operations.canary import Canary, add_canaries
from reir.operations.gate.verdicts import GateLimits
from reir.operations.live_history import live_history, make_live, roll_back
from reir.query.search import open_gallery
from reir.store.memory import MemoryStore
from reir_ingestion.known_sources import KnownSource, known_source, known_sources
from reir_ingestion.pipeline import index
from reir_ingestion.reindex import run
from reir_ingestion.reindex.job import REPORT_KIND, ReindexJob, State, load_job, save_job
from reir_ingestion.reindex.run import ReindexRequest, ReindexResult, drop_job, reindex
from reir_ingestion.sources import Source, SourceOptions, open_source
from reir_ingestion.stages import IndexOptions
from reir_testing import FakeEncoder
from reir_testing.fake_models import COLORS, LEFT, RIGHT, save_photo
from reir_testing.ingestion import write_scenes

G = "photos"
LIMITS = GateLimits(min_canaries=4, latency_ratio=1000)


def origin(folder: Path) -> KnownSource:
    return known_source(folder, SourceOptions())


@pytest.fixture(autouse=True)
def no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """No server searches the store of these tests."""
    monkeypatch.setattr(run, "SWITCH_SEEN_S", 0.0)


@pytest.fixture
def store(photos: Path) -> MemoryStore:
    """A store with one gallery, its source and a canary for each photo."""
    opened = MemoryStore()
    options = IndexOptions(origin=origin(photos), encoder_spec="")
    index(open_source(photos), G, opened, FakeEncoder(), options=options)
    canaries = [
        Canary(expression=f"the {color} one", uri=canonical_uri(photos / f"{color}.png"))
        for color in COLORS
    ]
    add_canaries(opened, G, canaries)
    return opened


def build(store: MemoryStore, source: Source, job: ReindexJob) -> IndexReport:
    options = IndexOptions(candidate=job.candidate, encoder_spec=job.encoder)
    return index(source, job.gallery, store, load_encoder_spec(job.encoder), options=options)


def start(store: MemoryStore, **changes: object) -> ReindexResult:
    values: dict[str, object] = {"encoder": "better:x", "limits": LIMITS}
    request = ReindexRequest(**(values | changes))  # type: ignore[arg-type]
    return reindex(store, G, request, partial(build, store))


def job_of(store: MemoryStore) -> ReindexJob:
    job = load_job(store, G)
    assert job is not None
    return job


def versions(store: MemoryStore) -> list[str]:
    return [each.name for each in store.versions(G)]


def finds_all(store: MemoryStore) -> bool:
    with open_gallery(G, store=store) as gallery:
        results = [gallery.search(f"the {color} one", k=1) for color in COLORS]
    return all(result[0].path.stem == color for result, color in zip(results, COLORS, strict=True))


# ---------------------------------------------------------------------------------- whole jobs


def test_a_new_model_becomes_live_and_the_old_version_is_kept(store: MemoryStore) -> None:
    old = store.live_version(G)
    result = start(store)
    assert result.job.state is State.DONE
    assert result.report is not None
    assert result.report.passed
    assert store.live_version(G) == result.job.candidate
    assert versions(store) == [old, result.job.candidate]
    assert finds_all(store)
    assert [each.by for each in live_history(store, G)] == ["reir index", "reir reindex"]
    assert list(store.find_documents(REPORT_KIND)) == [f"{G}/{result.job.candidate}"]
    assert roll_back(store, G) == (result.job.candidate, old)
    assert finds_all(store)


def test_a_full_refresh_with_the_same_model_sees_changed_files(
    store: MemoryStore, photos: Path
) -> None:
    (photos / "red.png").unlink()
    save_photo(photos / "new.png", "red", LEFT)
    result = start(store, encoder="", limits=GateLimits(lost_photos=0.2, br1_drop=1, br10_drop=1))
    assert result.job.state is State.DONE
    names = {row.uri.rpartition("/")[2] for row in store.iter_images(G, store.live_version(G))}
    assert names == {f"{color}.png" for color in COLORS[1:]} | {"new.png"}


def test_reir_index_goes_on_in_the_version_that_reindex_built(
    store: MemoryStore, photos: Path
) -> None:
    candidate = start(store, encoder="").job.candidate
    save_photo(photos / "later.png", "red", RIGHT)
    report = index(open_source(photos), G, store, FakeEncoder())
    assert (report.version, report.new, report.unchanged) == (candidate, 1, 8)
    assert store.live_version(G) == candidate


def test_a_worse_model_is_refused_and_kept_for_inspection(store: MemoryStore) -> None:
    old = store.live_version(G)
    result = start(store, encoder="worse:x")
    assert result.job.state is State.REJECTED
    assert result.report is not None
    assert "BR@1 of canaries" in [check.name for check in result.report.failed_checks]
    assert store.live_version(G) == old
    assert result.job.candidate in versions(store)
    assert finds_all(store)


def test_a_good_model_replaces_a_worse_live_one(store: MemoryStore) -> None:
    store.promote(G, start(store, encoder="worse:x").job.candidate)
    assert not finds_all(store)
    assert start(store).job.state is State.DONE
    assert finds_all(store)


def test_the_next_job_deletes_a_rejected_candidate(store: MemoryStore) -> None:
    old = store.live_version(G)
    rejected = start(store, encoder="worse:x").job.candidate
    result = start(store)
    assert result.deleted == (rejected,)
    assert versions(store) == [old, result.job.candidate]


def test_only_the_last_rejected_candidate_is_kept(store: MemoryStore) -> None:
    old = store.live_version(G)
    first = start(store, encoder="worse:x").job.candidate
    second = start(store, encoder="worse:x")
    assert second.deleted == (first,)
    assert versions(store) == [old, second.job.candidate]


def test_a_rejected_candidate_that_was_promoted_counts_as_an_old_version(
    store: MemoryStore,
) -> None:
    old = store.live_version(G)
    rejected = start(store, encoder="worse:x").job.candidate
    for version in (rejected, old):
        make_live(store, G, version, by="test")
    assert start(store, encoder="worse:x").job.state is State.REJECTED
    assert rejected in versions(store)
    assert start(store, keep=2).job.state is State.DONE
    assert {old, rejected} < set(versions(store))


@pytest.mark.parametrize("keep", [0, 1, 2])
def test_so_many_old_versions_are_kept(store: MemoryStore, keep: int) -> None:
    first = store.live_version(G)
    second = start(store, keep=5).job.candidate
    third = start(store, keep=5).job.candidate
    result = start(store, keep=keep)
    assert versions(store) == [*[first, second, third][3 - keep :], result.job.candidate]
    assert set(result.deleted) == {first, second, third} - set(versions(store))


def test_versions_that_were_never_live_are_left_alone(store: MemoryStore) -> None:
    spec = store.versions(G)[0].spec
    store.create_version(G, "mine", replace(spec, digest="other"))
    start(store, keep=0)
    assert "mine" in versions(store)


# ---------------------------------------------------------------------------------- which photos


def test_photos_that_are_in_no_source_are_indexed_too(store: MemoryStore, tmp_path: Path) -> None:
    upload = tmp_path / "uploads" / "up.png"
    upload.parent.mkdir()
    save_photo(upload, "red", RIGHT)
    index(open_source(upload), G, store, FakeEncoder())  # as an upload: no source is recorded
    start(store)
    rows = {row.uri for row in store.iter_images(G, store.live_version(G))}
    assert canonical_uri(upload) in rows
    assert len(rows) == 9


def test_photos_that_only_their_own_source_can_read_count_as_lost(
    store: MemoryStore, tmp_path: Path
) -> None:
    photo, archive = tmp_path / "in archive.png", tmp_path / "x.tar"
    save_photo(photo, "red", RIGHT)
    with tarfile.open(archive, "w") as tar:
        tar.add(photo, photo.name)
    index(open_source(archive), G, store, FakeEncoder())  # its source is not recorded
    result = start(store)
    assert (result.job.state, result.job.error) == (State.REJECTED, "")
    assert result.report is not None
    assert "lost photos" in [check.name for check in result.report.failed_checks]
    (failed,) = store.iter_images(G, result.job.candidate, status="failed")
    assert failed.uri.startswith("tar+")
    assert (failed.reason, "name it with --source" in failed.detail) == ("unreadable", True)
    limits = replace_limits(lost_photos=0.2, more_failures=0.2)
    assert start(store, limits=limits).job.state is State.DONE


def replace_limits(**changes: float) -> GateLimits:
    return LIMITS.model_copy(update=changes)


def test_photos_that_are_added_during_the_job_are_not_lost(
    store: MemoryStore, tmp_path: Path
) -> None:
    upload = tmp_path / "up.png"

    def upload_during_the_check(job: ReindexJob) -> None:
        if job.state is State.CHECKING:
            save_photo(upload, "red", RIGHT)
            index(open_source(upload), G, store, FakeEncoder())

    request = ReindexRequest(encoder="better:x", limits=LIMITS)
    reindex(store, G, request, partial(build, store), on_state=upload_during_the_check)
    rows = {row.uri for row in store.iter_images(G, store.live_version(G))}
    assert canonical_uri(upload) in rows


def test_several_sources_are_indexed(store: MemoryStore, tmp_path: Path) -> None:
    write_scenes(tmp_path / "more", 3)
    options = IndexOptions(origin=origin(tmp_path / "more"))
    index(open_source(tmp_path / "more"), G, store, FakeEncoder(), options=options)
    assert [Path(each.text).name for each in known_sources(store, G)] == ["more", "photos"]
    result = start(store)
    assert len(result.indexed) == 2
    assert {each.new for each in result.indexed} == {8, 3}


def test_a_source_that_is_gone_stops_the_job_before_it_begins(
    store: MemoryStore, photos: Path
) -> None:
    photos.rename(photos.with_name("elsewhere"))
    with pytest.raises(SourceError, match="does not exist"):
        start(store)
    assert load_job(store, G) is None


def test_lost_photos_are_refused(store: MemoryStore, photos: Path) -> None:
    for color in COLORS[:4]:
        (photos / f"{color}.png").unlink()
    result = start(store)
    assert result.job.state is State.REJECTED
    assert result.report is not None
    assert "lost photos" in [check.name for check in result.report.failed_checks]


def test_without_a_known_source_it_has_to_be_named(store: MemoryStore, photos: Path) -> None:
    (known,) = known_sources(store, G)
    store.delete_documents("source", list(store.find_documents("source")))
    with pytest.raises(ConfigError, match="name them with --source"):
        start(store)
    assert start(store, sources=(known,)).job.state is State.DONE


# --------------------------------------------------------------------------------- interruptions


class KilledError(BaseException):
    """Stands for SIGKILL: nothing in the job may catch it."""


def kill_in(state: State, store: MemoryStore, *, after: bool = False) -> None:
    """Start a job, and stop it at the beginning or at the end of a state."""
    seen: list[State] = []

    def stop(job: ReindexJob) -> None:
        if after and seen and seen[-1] is state:
            raise KilledError
        seen.append(job.state)
        if not after and job.state is state:
            raise KilledError

    request = ReindexRequest(encoder="better:x", limits=LIMITS)
    with pytest.raises(KilledError):
        reindex(store, G, request, partial(build, store), on_state=stop)


RUNNING = [state for state in State if not state.is_end]
MOMENTS = [(state, after) for state in RUNNING for after in (False, True)][:-1]
"""Start and end of each state; the end of the last one is the end of the job."""


@pytest.mark.parametrize(("state", "after"), MOMENTS)
def test_a_killed_job_continues_at_its_state(store: MemoryStore, state: State, after: bool) -> None:
    kill_in(state, store, after=after)
    assert finds_all(store), "searches answer throughout"
    candidate = job_of(store).candidate
    result = start(store)
    assert result.job.state is State.DONE
    assert result.job.candidate == candidate == store.live_version(G)
    assert finds_all(store)


def test_a_job_that_was_killed_while_indexing_encodes_only_what_is_missing(
    store: MemoryStore,
) -> None:
    def half(source: Source, job: ReindexJob) -> IndexReport:
        folder = Path(source.text)
        half_folder = folder.with_name("half")
        half_folder.mkdir()
        for color in COLORS[:4]:
            shutil.copy2(folder / f"{color}.png", half_folder)
        # The ledger is keyed by URI, so the half has to be indexed from the same place.
        aside = folder.with_name("aside")
        folder.rename(aside)
        half_folder.rename(folder)
        build(store, open_source(folder), job)
        shutil.rmtree(folder)
        aside.rename(folder)
        raise KilledError

    request = ReindexRequest(encoder="better:x", limits=LIMITS)
    with pytest.raises(KilledError):
        reindex(store, G, request, half)
    result = start(store)
    (report,) = result.indexed
    assert (report.new, report.unchanged) == (4, 4)


def test_an_error_is_kept_with_the_job_and_cleared_when_it_continues(store: MemoryStore) -> None:
    def fails(source: Source, job: ReindexJob) -> IndexReport:
        raise StoreUnavailable("milvus:19530", "connection refused")

    request = ReindexRequest(encoder="better:x", limits=LIMITS)
    with pytest.raises(StoreUnavailable):
        reindex(store, G, request, fails)
    assert job_of(store).state is State.INDEXING
    assert "connection refused" in job_of(store).error
    assert start(store).job.error == ""


def test_an_interrupted_job_is_not_mixed_up_with_another_request(store: MemoryStore) -> None:
    kill_in(State.CHECKING, store)
    with pytest.raises(ConfigError, match=r"\(--encoder\) stopped at 'checking'"):
        start(store, encoder="worse:x")
    assert start(store, encoder="").job.encoder == "better:x"


def test_a_job_that_continues_takes_new_limits_canaries_and_keep(
    store: MemoryStore, photos: Path, tmp_path: Path
) -> None:
    for color in COLORS[:4]:
        (photos / f"{color}.png").unlink()
    kill_in(State.CHECKING, store)
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text(
        json.dumps({"expression": "the red one", "photo": str(photos / f"{COLORS[4]}.png")})
    )
    limits = replace_limits(min_canaries=1, lost_photos=0.5, br1_drop=1, br10_drop=1)
    result = start(store, limits=limits, keep=0, canary_file=str(wrong))
    assert result.job.state is State.DONE
    assert (result.job.limits, result.job.keep) == (limits, 0)
    assert result.job.canary_file == str(wrong)
    assert versions(store) == [result.job.candidate]


def test_a_job_that_continues_keeps_what_was_not_given_again(store: MemoryStore) -> None:
    kill_in(State.CHECKING, store)
    before = replace(job_of(store), limits=replace_limits(recall=0.5), keep=3)
    save_job(store, before)
    result = reindex(store, G, ReindexRequest(), partial(build, store))
    assert (result.job.limits, result.job.keep) == (before.limits, 3)


def test_two_jobs_of_one_gallery_exclude_each_other(store: MemoryStore) -> None:
    def try_another(job: ReindexJob) -> None:
        if job.state is State.CHECKING:
            with pytest.raises(JobRunning, match=f"reindex/{G} is already running"):
                start(store)

    request = ReindexRequest(encoder="better:x", limits=LIMITS)
    result = reindex(store, G, request, partial(build, store), on_state=try_another)
    assert result.job.state is State.DONE


def test_a_job_whose_lease_was_taken_over_changes_nothing_more(store: MemoryStore) -> None:
    def lose(job: ReindexJob) -> None:
        if job.state is State.SWITCHING:
            store.delete_documents(lease.KIND, list(store.find_documents(lease.KIND)))

    old = store.live_version(G)
    request = ReindexRequest(encoder="better:x", limits=LIMITS)
    with pytest.raises(LeaseLost):
        reindex(store, G, request, partial(build, store), on_state=lose)
    assert store.live_version(G) == old
    assert job_of(store).state is State.SWITCHING


def test_a_promotion_by_hand_during_the_check_is_noticed(store: MemoryStore) -> None:
    """The candidate was compared with another version than the one that it would replace."""
    states: list[State] = []
    store.create_version(G, "other", store.versions(G)[0].spec)
    index(
        open_source(Path(known_sources(store, G)[0].text)),
        G,
        store,
        FakeEncoder(),
        options=IndexOptions(candidate="other"),
    )

    def promote(job: ReindexJob) -> None:
        if job.state is State.SWITCHING and State.SWITCHING not in states:
            store.promote(G, "other")
        states.append(job.state)

    request = ReindexRequest(encoder="better:x", limits=LIMITS)
    result = reindex(store, G, request, partial(build, store), on_state=promote)
    assert states.count(State.CHECKING) == 2
    assert result.job.live == "other"
    assert store.live_version(G) == result.job.candidate


def test_a_candidate_that_was_promoted_by_hand_is_finished(store: MemoryStore) -> None:
    rejected = start(store, encoder="worse:x").job
    store.promote(G, rejected.candidate)
    save_job(store, rejected.to(State.CHECKING))
    assert start(store, encoder="").job.state is State.DONE


# ------------------------------------------------------------------------------------- dropping


def test_an_abandoned_job_can_be_dropped(store: MemoryStore) -> None:
    old = store.live_version(G)
    kill_in(State.CHECKING, store)
    assert drop_job(store, G).state is State.DROPPED
    assert versions(store) == [old]
    with pytest.raises(ConfigError, match="has no re-indexing job that could be dropped"):
        drop_job(store, G)
    assert start(store).job.state is State.DONE


def test_a_job_whose_candidate_is_live_cannot_be_dropped(store: MemoryStore) -> None:
    kill_in(State.CATCHING_UP, store)
    with pytest.raises(ConfigError, match=r"already made its version .* live"):
        drop_job(store, G)


def test_candidates_have_names_of_their_own(store: MemoryStore) -> None:
    names = [run._candidate_name([]), run._candidate_name([run._candidate_name([])])]
    assert names[0][:9] == names[1][:9]
    assert len({names[0], run._candidate_name([names[0]]), run._candidate_name(names)}) == 3
