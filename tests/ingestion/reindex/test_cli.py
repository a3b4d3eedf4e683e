"""`reir reindex`, `reir sources`, `reir canary` and `reir rollback` as a user types them."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from reir.cli import main
from reir.operations.lease import hold_lease
from reir.store import open_store
from reir_ingestion.reindex.cli import REJECTED
from reir_ingestion.reindex.job import State, load_job, save_job
from reir_ingestion.reindex.run import lease_of
from reir_testing.fake_models import COLORS, RIGHT, save_photo, save_photos

# The fake models answer in less than a millisecond, and other tests run beside this one.
CALM = ("--limit", "min_canaries=4", "--limit", "latency_ratio=1000")

Run = Callable[..., str]


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REIR_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("REIR_HOME", str(tmp_path / "home"))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command, and return what it prints on standard output, or on both."""

    def run_command(*arguments: str, status: int = 0, both: bool = False) -> str:
        assert main.run(arguments) == status
        shown = capsys.readouterr()
        return shown.out + shown.err if both else shown.out

    return run_command


@pytest.fixture
def gallery(photos: Path, tmp_path: Path, run: Run) -> str:
    """A gallery of the photos, with canaries."""
    run("index", str(photos), "--gallery", "pets")
    lines = [
        json.dumps({"expression": f"the {color} one", "photo": str(photos / f"{color}.png")})
        for color in COLORS
    ]
    file = tmp_path / "canaries.jsonl"
    file.write_text("\n".join([*lines, '{"expression": "a giraffe", "absent": true}']))
    assert "It has 9 now" in run("canary", "add", "pets", str(file))
    return "pets"


def test_a_new_model_goes_live_and_can_be_rolled_back(gallery: str, run: Run) -> None:
    (old,) = json.loads(run("versions", gallery, "--json"))
    shown = run("reindex", gallery, "--encoder", "better:x", *CALM)
    assert "BR@1 of canaries" in shown
    assert "failed " not in shown.replace("failed photos", "")
    old_now, new = json.loads(run("versions", gallery, "--json"))
    assert (old_now["live"], new["live"]) == (False, True)
    assert f"Version {new['name']} of gallery pets is live." in shown
    found = json.loads(run("search", "the red one", "--gallery", gallery, "--json"))
    assert (found["version"], found["hits"][0]["uri"].rpartition("/")[2]) == (
        new["name"],
        "red.png",
    )
    shown = run("rollback", gallery)
    assert f"Version {old['name']} of gallery pets is live again" in shown
    assert json.loads(run("versions", gallery, "--json"))[0]["live"]


def test_a_worse_model_is_refused(gallery: str, run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "report"
    arguments = ("reindex", gallery, "--encoder", "worse:x", "--report", str(folder), *CALM)
    shown = run(*arguments, status=REJECTED)
    assert "Refused: BR@1 of canaries" in shown
    report = json.loads((folder / "report.json").read_text())
    assert not report["passed"]
    assert report["num_lost"] == len(report["lost"]) > 0
    page = (folder / "report.html").read_text()
    assert "Re-indexing of pets: refused" in page
    assert "data:image/jpeg" in page
    job = json.loads(run("reindex", gallery, "--status", "--json"))
    assert (job["state"], job["runs_in"]) == ("rejected", None)
    assert "BR@1 of canaries" in job["failed_checks"]
    assert "To delete the new version:  reir reindex pets --drop" in run(
        "reindex", gallery, "--status"
    )
    found = json.loads(
        run("search", "the red one", "--gallery", gallery, "--version", job["candidate"], "--json")
    )
    assert found["version"] == job["candidate"]
    assert "dropped" in run("reindex", gallery, "--drop")
    assert len(json.loads(run("versions", gallery, "--json"))) == 1


def test_json_has_everything(gallery: str, run: Run) -> None:
    result = json.loads(run("reindex", gallery, "--json", *CALM))
    assert (result["state"], result["passed"]) == ("done", True)
    assert result["indexed"][0]["new"] == len(COLORS)
    assert Path(result["report_folder"], "report.html").is_file()
    assert {check["name"] for check in result["report"]["checks"]} >= {"lost photos", "photos"}


def test_the_status_names_the_process_that_works_on_the_job(
    gallery: str, run: Run, tmp_path: Path
) -> None:
    run("reindex", gallery, *CALM)
    with closing(open_store(str(tmp_path / "store"))) as store:
        job = load_job(store, gallery)
        assert job is not None
        save_job(store, job.to(State.INDEXING))
        shown = run("reindex", gallery, "--status")
        assert "no process" in shown
        assert "To finish it:  reir reindex pets" in shown
        with hold_lease(store, lease_of(gallery)):
            shown = run("reindex", gallery, "--status")
            assert f"process {os.getpid()} on" in shown
            assert "To finish it" not in shown
            assert "already running" in run("reindex", gallery, status=1, both=True)


def test_canaries_of_a_file_are_used_instead_of_those_of_the_gallery(
    gallery: str, run: Run, photos: Path, tmp_path: Path
) -> None:
    """The expression does not fit the photo, so no model gets it right."""
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text(json.dumps({"expression": "the red one", "photo": str(photos / "blue.png")}))
    result = json.loads(run("reindex", gallery, "--canary", str(wrong), "--json", *CALM))
    (check,) = [c for c in result["report"]["checks"] if c["name"] == "BR@1 of canaries"]
    assert (check["live"], check["candidate"]) == (0.0, 0.0)


def test_a_dry_run_changes_nothing(gallery: str, run: Run, tmp_path: Path, photos: Path) -> None:
    save_photo(tmp_path / "up.png", "red", RIGHT)
    run("index", str(tmp_path / "up.png"), "--gallery", gallery)
    before = run("versions", gallery, "--json")
    plan = json.loads(run("reindex", gallery, "--dry-run", "--json"))
    assert plan["sources"] == {str(photos): 8, str(tmp_path / "up.png"): 1}
    assert (plan["photos"], plan["others"]) == (9, 0)
    assert plan["photos_per_s"] > 0
    assert plan["seconds"] == pytest.approx(9 / plan["photos_per_s"])
    assert 0 < plan["bytes_needed"] < plan["bytes_free"]
    run("sources", gallery, "--forget", str(tmp_path / "up.png"))
    plan = json.loads(run("reindex", gallery, "--dry-run", "--json"))
    assert (plan["photos"], plan["others"]) == (9, 1)
    assert run("versions", gallery, "--json") == before
    shown = run("reindex", gallery, "--dry-run")
    assert "8 photos" in shown
    assert "other photos" in shown


def test_a_dry_run_measures_photos_that_only_their_source_can_read(
    photos: Path, run: Run, tmp_path: Path
) -> None:
    archive = tmp_path / "x.tar"
    with tarfile.open(archive, "w") as tar:
        tar.add(photos, ".")
    run("index", str(archive), "--gallery", "packed")
    plan = json.loads(run("reindex", "packed", "--dry-run", "--json"))
    assert plan["photos"] == len(COLORS)
    assert plan["photos_per_s"] > 0
    # one photo that the plain reader can read is enough for a sample of such photos
    save_photo(tmp_path / "up.png", "red", RIGHT)
    run("index", str(tmp_path / "up.png"), "--gallery", "packed")
    plan = json.loads(run("reindex", "packed", "--dry-run", "--json"))
    assert plan["photos_per_s"] > 0


def test_limits_and_keep_may_change_when_a_job_continues(
    gallery: str, run: Run, tmp_path: Path
) -> None:
    def interrupt() -> tuple[int, int]:
        """Set the last job back, and return what it kept and how many canaries it needed."""
        with closing(open_store(str(tmp_path / "store"))) as store:
            job = load_job(store, gallery)
            assert job is not None
            save_job(store, job.to(State.INDEXING))
            return job.keep, job.limits.min_canaries

    run("reindex", gallery, "--keep", "2", *CALM)
    assert interrupt() == (2, 4)
    run("reindex", gallery)
    assert interrupt() == (2, 4)
    run("reindex", gallery, "--keep", "0", "--limit", "min_canaries=3")
    assert interrupt() == (0, 3)


def test_sources_are_listed_and_forgotten(gallery: str, run: Run, photos: Path) -> None:
    (source,) = json.loads(run("sources", gallery, "--json"))
    assert (source["source"], source["options"]) == (str(photos), [])
    assert str(photos) in run("sources", gallery)
    shown = run("sources", gallery, "--forget", "elsewhere", status=2, both=True)
    assert "was not indexed from 'elsewhere'" in shown
    run("sources", gallery, "--forget", str(photos))
    assert json.loads(run("sources", gallery, "--json")) == []
    assert "name them with --source" in run("reindex", gallery, status=2, both=True)
    assert "is live" in run("reindex", gallery, "--source", str(photos), *CALM)


def test_a_folder_whose_name_is_not_utf_8_is_indexed_and_known(run: Run, tmp_path: Path) -> None:
    folder = save_photos(tmp_path / os.fsdecode(b"caf\xe9"))
    run("index", str(folder), "--gallery", "odd")
    (source,) = json.loads(run("sources", "odd", "--json"))
    assert source["source"] == str(folder)
    assert r"caf\udce9" in run("sources", "odd")
    result = json.loads(run("reindex", "odd", "--json", "--limit", "latency_ratio=1000"))
    assert result["indexed"][0]["new"] == len(COLORS)
    run("sources", "odd", "--forget", str(folder))
    assert json.loads(run("sources", "odd", "--json")) == []


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("reindex", "cats"), "no gallery 'cats'"),
        (("reindex", "pets", "--limit", "recal=1"), "did you mean 'recall'"),
        (("reindex", "pets", "--limit", "recall"), "must have the form section.key=value"),
        (("reindex", "pets", "--status"), "has never been re-indexed"),
        (("reindex", "pets", "--drop"), "has no re-indexing job that could be dropped"),
        (("reindex", "pets", "--canary", "none.jsonl"), "cannot read the canaries"),
        (("rollback", "pets"), "it has no other version"),
        (("search", "x", "--gallery", "pets", "--version", "v"), "has no version 'v'"),
        (("canary", "rm", "pets"), "--expression, or use --all"),
        (("canary", "rm", "pets", "--expression", "x"), "has no canary 'x'"),
        (("canary", "add", "pets", "none.jsonl"), "cannot read the canaries"),
    ],
)
def test_mistakes_are_explained(
    gallery: str, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], problem: str
) -> None:
    assert main.run(arguments) in (1, 2)
    assert problem in " ".join(capsys.readouterr().err.split())


def test_canaries_can_be_listed_moved_and_removed(
    gallery: str, run: Run, tmp_path: Path, photos: Path
) -> None:
    values: list[dict[str, Any]] = json.loads(run("canary", "list", gallery, "--json"))
    assert [each["kind"] for each in values].count("absent") == 1
    assert "not in the gallery" in run("canary", "list", gallery)
    moved = tmp_path / "moved.jsonl"
    moved.write_text(run("canary", "list", gallery, "--lines"))
    assert "Removed 1 of 9" in run("canary", "rm", gallery, "--expression", "a giraffe")
    assert json.loads(run("canary", "rm", gallery, "--all", "--json"))["removed"] == 8
    assert json.loads(run("canary", "add", gallery, str(moved), "--json")) == {
        "gallery": gallery,
        "added": 9,
        "total": 9,
    }
    unknown = tmp_path / "unknown.jsonl"
    unknown.write_text(json.dumps({"expression": "x", "photo": str(photos / "white.png")}))
    shown = run("canary", "add", gallery, str(unknown), status=2, both=True)
    assert "1 photo of" in shown
    assert "white.png" in shown
