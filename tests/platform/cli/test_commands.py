"""The command line on a real embedded store; only the checkpoint is a fake."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from reir.checkpoint import load_color_reader
from reir.cli import main, search
from reir.cli.doctor.galleries import check_galleries
from reir.images.decode import canonical_uri, image_id, path_of_uri
from reir.query import request
from reir.query.language import NOTE
from reir.query.presence import (
    GALLERY_FEATURES,
    PHOTO_FEATURES,
)
from reir.query.search import CheckpointExtras
from reir.query.verify.photos import PixelVerifier
from reir.records import ImageRecord, IndexedImage
from reir.store import InstanceStore, VersionSpec, open_store
from reir_testing import FakeEncoder, FakeLocalizer, draw_scene
from reir_testing.evaluation.calibrations import by_score, score_calibration

ENCODER = FakeEncoder()
SPEC = VersionSpec(
    dim=ENCODER.dim, digest=ENCODER.digest, settings={"num_candidates": ENCODER.num_candidates}
)
SCENES = {
    "one.png": draw_scene((200, 100), [("red", (10, 10, 40, 90)), ("blue", (150, 20, 190, 60))]),
    "two [bold].png": draw_scene((200, 100), [("red", (150, 10, 190, 60))]),
    "three.png": draw_scene((200, 100), [("green", (60, 10, 90, 60))]),
}


class Terminal:
    """Runs commands in this process and keeps what they print."""

    def __init__(self, capture: pytest.CaptureFixture[str], store: Path) -> None:
        self.capture = capture
        self.store = store
        self.error = ""

    def run(self, *arguments: str, expect: int = 0) -> str:
        """Run `reir ...` on the store; return standard output."""
        code = main.run([*arguments, "--store", str(self.store)])
        output, self.error = self.capture.readouterr()
        assert code == expect, f"{output}\n{self.error}"
        return output

    def json(self, *arguments: str) -> Any:
        return json.loads(self.run(*arguments, "--json"))

    def refused(self, *arguments: str, expect: int) -> str:
        """Run a command that must fail with one line and no traceback; return that line."""
        assert self.run(*arguments, expect=expect) == ""
        assert self.error.startswith("error: ")
        assert self.error.count("\n") == 1
        return self.error


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for name, scene in SCENES.items():
        Image.fromarray(scene).save(folder / name)
    return folder


@pytest.fixture(scope="module")
def store_folder(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> Path:
    """A store with gallery `photos`: version v1, and v2 with three failures, which is live."""
    folder = tmp_path_factory.mktemp("store")
    store = open_store(str(folder))
    for version in ("v1", "v2"):
        fill(store, "photos", version, photos)
    store.upsert_images("photos", "v2", [failed("a\nb.jpg", "empty"), failed("c.jpg", "truncated")])
    store.upsert_images("photos", "v2", [failed("d.jpg", "truncated")])
    store.promote("photos", "v2")
    store.close()
    return folder


@pytest.fixture
def terminal(
    store_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Terminal:
    monkeypatch.setattr("reir.checkpoint.load_encoder", lambda _: ENCODER)
    monkeypatch.delenv("REIR_DEBUG", raising=False)
    return Terminal(capsys, store_folder)


def fill(store: InstanceStore, gallery: str, version: str, photos: Path) -> None:
    store.create_version(gallery, version, SPEC)
    instances = ENCODER.encode_images(list(SCENES.values()))
    images = []
    for name, found in zip(SCENES, instances, strict=True):
        uri = canonical_uri(photos / name)
        record = ImageRecord(
            image_id=image_id(uri), uri=uri, status="indexed", num_instances=len(found)
        )
        images.append(IndexedImage(record, found))
    store.upsert_images(gallery, version, images)


def failed(name: str, reason: str) -> IndexedImage:
    uri = canonical_uri(f"/photos/{name}")
    detail = "0 bytes\x1b[31m" if reason == "empty" else "no end"
    record = ImageRecord(
        image_id=image_id(uri), uri=uri, status="failed", reason=reason, detail=detail
    )
    return IndexedImage(record, None)


@pytest.fixture
def spare(store_folder: Path, photos: Path) -> Iterator[str]:
    """A gallery that a test may change: v1 is live, v2 is there."""
    with_store = open_store(str(store_folder))
    for version in ("v1", "v2"):
        fill(with_store, "spare", version, photos)
    with_store.promote("spare", "v1")
    yield "spare"
    if "spare" in with_store.galleries():
        with_store.drop_gallery("spare")
    with_store.close()


# search


def test_search_prints_a_line_a_hit_and_what_was_searched(
    terminal: Terminal, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(photos)
    lines = terminal.run("search", "the red one on the left", "--gallery", "photos").splitlines()
    assert lines[0].split() == ["#", "score", "photo", "x", "%", "y", "%", "area"]
    assert lines[1].split()[2:] == ["one.png", "5-20", "10-90", "12.0", "%"]
    assert "two [bold].png" in lines[2]  # no markup, and relative to this folder
    assert len(lines) == 1 + 3 + 2
    assert lines[-1].startswith("3 hits in gallery photos, version v2; text ")


def test_a_localizer_looks_at_the_photos_of_the_hits(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reir.models.localizers.KINDS", {"fake": lambda _: FakeLocalizer()})
    asked = ["search", "blue", "--gallery", "photos", "--localizer", "fake:x"]
    first = terminal.json(*asked)["hits"][0]
    assert first["zoom"]["box"] == first["box"] == pytest.approx([0.75, 0.2, 0.95, 0.6])
    assert len(first["zoom"]["steps"]) == 1
    assert "looks" in terminal.run(*asked).splitlines()[0]
    error = terminal.refused(*asked, "--server", "http://localhost:1", expect=2)
    assert "--localizer fake:x is not possible with --server or $REIR_SERVER: a" in error
    assert "--localizer is not possible with --all" in terminal.refused(*asked, "--all", expect=2)


def test_search_shows_other_folders_in_full_and_never_cuts_a_path(
    terminal: Terminal, photos: Path
) -> None:
    assert f" {photos / 'two [bold].png'} " in terminal.run("search", "red", "--gallery", "photos")


def test_search_json_is_the_result(terminal: Terminal, photos: Path) -> None:
    found = terminal.json("search", "Green", "--gallery", "photos", "-k", "1")
    (hit,) = found.pop("hits")
    assert hit["uri"] == canonical_uri(photos / "three.png")
    assert hit["box"] == pytest.approx([0.3, 0.1, 0.45, 0.6])
    assert found.pop("timings_ms").keys() == {"text", "search", "rank"}
    assert found == {
        "expression": "Green",
        "gallery": "photos",
        "version": "v2",
        "degraded": [],
        "digest": ENCODER.digest,
        "presence": None,
        "found": True,
        "equally_good": 1,
        "cursor": found["cursor"],
    }
    assert found["cursor"]


def test_search_groups_and_filters(terminal: Terminal, photos: Path) -> None:
    def uris(*options: str) -> list[str]:
        found = terminal.json("search", "red", "--gallery", "photos", *options)
        return [Path(hit["uri"]).name for hit in found["hits"]]

    assert uris().count("one.png") == 1
    assert uris("--per-image", "2").count("one.png") == 2
    three = canonical_uri(photos / "three.png")
    assert uris("--where", f'uri == "{three}"') == ["three.png"]


def test_search_without_hits_says_so(terminal: Terminal) -> None:
    output = terminal.run("search", "red", "--gallery", "photos", "--where", "area > 0.9")
    assert output.startswith("Nothing found in gallery photos, version v2; ")


def test_search_draws_the_hits(terminal: Terminal, tmp_path: Path) -> None:
    picture = tmp_path / "hits.png"
    output = terminal.run("search", "red", "--gallery", "photos", "--draw", str(picture))
    assert output.splitlines()[-1] == f"picture: {picture}"
    colors = Image.open(picture).convert("RGB").getcolors(1 << 20)
    assert colors is not None
    assert (220, 20, 20) in {color for _, color in colors}


def test_hits_are_printed_although_their_picture_is_too_large(
    terminal: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reir.results.SearchResult.draw", lambda _: Image.new("L", (1, 16384)))
    asked = ("search", "red", "--gallery", "photos", "--draw", str(tmp_path / "hits.webp"))
    lines = terminal.run(*asked, expect=1).splitlines()
    assert lines[-1].startswith("3 hits in gallery photos, version v2; ")
    assert "hits.webp: a picture of 1 x 16384 pixels cannot be" in terminal.error
    assert "use .png, or a smaller k" in terminal.error


def test_search_takes_more_like_this_and_not_that(terminal: Terminal) -> None:
    def names(*options: str) -> list[str]:
        found = terminal.json("search", *options, "--gallery", "photos")
        return [path_of_uri(hit["uri"]).name for hit in found["hits"]]

    best = terminal.json("search", "green", "--gallery", "photos", "-k", "1")["hits"][0]
    assert sorted(names("--like", best["instance_id"])) == ["one.png", "two [bold].png"]
    assert names("red", "--not", "left")[0] == "two [bold].png"
    assert names("red", "--like", best["instance_id"])
    terminal.refused("search", expect=2)
    assert "give an EXPRESSION, --like INSTANCE_ID or both" in terminal.error
    terminal.refused("search", "--not", "red", expect=2)
    terminal.refused("search", "--like", "nothing#0", "--gallery", "photos", expect=2)


def test_search_explains(terminal: Terminal) -> None:
    lines = terminal.run("search", "red", "--gallery", "photos", "--explain").splitlines()
    assert lines[0].split()[-4:] == ["dual", "re-rank", "margin", "neighbors"]
    assert lines[1].split()[-4] == lines[1].split()[1]
    assert lines[1].split()[-3] == "-"


def test_search_verifies_unless_something_else_orders_the_hits(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[bool, bool]] = []
    ask_here = search._ask_here

    def noted(asked_for: request.Query, *rest: Any) -> Any:
        asked.append((asked_for.verify, asked_for.rerank))
        return ask_here(asked_for, *rest)

    monkeypatch.setattr(search, "_ask_here", noted)
    for options in ([], ["--rerank"], ["--no-verify"]):
        terminal.run("search", "red", "--gallery", "photos", *options)
    assert asked == [(True, False), (False, True), (False, False)]


def test_search_refines_boxes_on_their_pixels(terminal: Terminal) -> None:
    found = terminal.json("search", "green", "--gallery", "photos", "-k", "1", "--localize")
    assert found["degraded"] == []
    assert "localize" in found["timings_ms"]
    assert found["hits"][0]["box"] == pytest.approx([0.3, 0.1, 0.45, 0.6])


def test_search_zooms_in_and_says_where_it_looked(terminal: Terminal) -> None:
    found = terminal.json("search", "green", "--gallery", "photos", "-k", "1", "--zoom")
    assert found["degraded"] == []
    zoom = found["hits"][0]["zoom"]
    assert zoom["steps"][0]["frame"] == [0, 0, 1, 1]
    assert found["hits"][0]["box"] == zoom["box"]
    table = terminal.run("search", "green", "--gallery", "photos", "-k", "1", "--zoom")
    assert {"zoom", "looks"} <= set(table.split())


def test_search_warns_once_about_a_sentence_that_is_not_english(terminal: Terminal) -> None:
    for more in ((), ("--where", "area > 0.9")):
        said = terminal.run("search", "der rote Kasten links", "--gallery", "photos", *more)
        assert said.splitlines()[0] == NOTE
        assert said.count("English") == 1
        assert "English" not in terminal.run("search", "the red box", "--gallery", "photos", *more)


def test_search_says_when_it_is_not_there(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibration = score_calibration(ENCODER.digest, 20, -18, photo=by_score(PHOTO_FEATURES, 1, 0))
    verifier = PixelVerifier(load_color_reader)
    monkeypatch.setattr(
        "reir.query.search.load_extras",
        lambda *_: CheckpointExtras(calibration=calibration, verifier=verifier),
    )
    there = terminal.run("search", "red left tall", "--gallery", "photos").splitlines()
    assert there[0].split()[:5] == ["#", "score", "object", "in", "photo"]
    assert there[1].split()[2] == "likely"
    assert "; probability that it is there " in there[-1]
    absent = terminal.run("search", "purple", "--gallery", "photos").splitlines()
    assert absent[0] == "Probably not in this gallery. The nearest misses:"
    assert "red, not purple" in "\n".join(absent)
    sure = calibration
    unsure = by_score(GALLERY_FEATURES, 0, -0.4)
    calibration = replace(sure, gallery=unsure, threshold=0.3)
    doubtful = terminal.run("search", "purple", "--gallery", "photos").splitlines()
    assert doubtful[0] == "It may not be in this gallery. The closest matches:"
    assert terminal.json("search", "purple", "--gallery", "photos")["found"]
    calibration = sure
    options = ("--gallery", "photos", "--min-presence", "0.5")
    assert len(terminal.json("search", "red left tall", *options)["hits"]) == 1
    assert terminal.json("search", "purple", *options)["hits"] == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["search", "  "], "expression: is empty"),
        (["search", "red", "--where", "aera > 1"], "did you mean 'area'"),
        (["search", "red", "--draw", "hits.txt"], "cannot write .txt; use .png"),
        (["search", "red", "--draw", "hits"], "cannot write a file without a suffix"),
        (["search", "red", "--draw", "nowhere/hits.png"], "folder nowhere does not exist"),
        (["rm", "photos", "--json"], "add --yes"),
    ],
)
def test_wrong_use_is_one_line_and_status_2(
    terminal: Terminal, options: list[str], said: str
) -> None:
    assert said in terminal.refused(*options, expect=2)


@pytest.mark.parametrize("option", ["-k", "--per-image"])
@pytest.mark.parametrize("value", ["0", "1001", "many"])
def test_counts_out_of_range_are_status_2(terminal: Terminal, option: str, value: str) -> None:
    terminal.run("search", "red", option, value, expect=2)
    assert option in terminal.error
    assert search.MAX_COUNT == request.MAX_K


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["search", "red", "--gallery", "photo"], "has photos; did you mean 'photos'?"),
        (["search", "red"], "no gallery 'default': this store has photos; `reir index"),
        (["versions", "x"], "`reir index SOURCE --gallery x` creates it"),
        (["promote", "photos", "v22"], "no version 'v22': it has v1, v2; did you mean 'v2'?"),
        (["failures", "photos", "--version", "v9"], "it has v1, v2"),
        (["rm", "photos", "--version", "v2", "--yes"], "'v2' of gallery 'photos' is live"),
        (["rm", "nothing", "--yes"], "this store has photos"),
    ],
)
def test_what_is_not_there_is_one_line_and_status_1(
    terminal: Terminal, arguments: list[str], said: str
) -> None:
    assert said in terminal.refused(*arguments, expect=1)


def test_search_refuses_a_version_of_another_checkpoint(
    terminal: Terminal, spare: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Retrained(FakeEncoder):
        def __init__(self) -> None:
            super().__init__()
            self.digest = "f" * 64

    monkeypatch.setattr("reir.checkpoint.load_encoder", lambda _: Retrained())
    said = terminal.refused("search", "red", "--gallery", spare, expect=1)
    assert ENCODER.digest[:12] in said
    assert "f" * 12 in said
    assert f"reir index SOURCE --gallery {spare}" in said


# galleries


def test_galleries_lists_what_is_live(terminal: Terminal) -> None:
    lines = terminal.run("galleries").splitlines()
    assert lines[1].split() == ["photos", "v2", "6", "3", "4", "2"]
    assert terminal.json("galleries") == [
        {
            "gallery": "photos",
            "live": "v2",
            "photos": 6,
            "failed": 3,
            "instances": 4,
            "versions": 2,
        }
    ]


def test_galleries_of_an_empty_store_says_what_to_do(terminal: Terminal, tmp_path: Path) -> None:
    terminal.store = tmp_path
    assert terminal.run("galleries") == ""
    assert "reir index SOURCE --gallery NAME" in terminal.error
    assert terminal.json("galleries") == []


def test_versions_marks_the_live_one(terminal: Terminal) -> None:
    lines = terminal.run("versions", "photos").splitlines()
    digest = ENCODER.digest[:12]
    assert lines[1].split() == ["v1", "3", "0", "4", digest, "num_candidates", "30"]
    assert lines[2].split()[:2] == ["v2", "live"]
    found = terminal.json("versions", "photos")
    assert [(each["name"], each["live"]) for each in found] == [("v1", False), ("v2", True)]
    assert found[0]["spec"]["digest"] == ENCODER.digest


def test_promote_says_how_to_go_back(terminal: Terminal, spare: str) -> None:
    assert "go back with: reir rollback spare" in terminal.run("promote", spare, "v2")
    assert terminal.json("search", "red", "--gallery", spare)["version"] == "v2"
    assert terminal.json("promote", spare, "v1") == {"gallery": spare, "live": "v1", "was": "v2"}
    assert terminal.run("promote", spare, "v1") == "Version v1 of gallery spare is live.\n"


def test_rm_deletes_one_version_or_all(terminal: Terminal, spare: str) -> None:
    said = terminal.run("rm", spare, "--version", "v2", "--yes")
    assert said == "Deleted version v2 of gallery spare (3 photos, 4 instances).\n"
    assert [each["name"] for each in terminal.json("versions", spare)] == ["v1"]
    assert terminal.json("rm", spare, "--yes") == {"gallery": spare, "removed": ["v1"]}
    assert [each["gallery"] for each in terminal.json("galleries")] == ["photos"]


@pytest.mark.parametrize(("answer", "code", "left"), [("n", 1, 2), ("", 1, 2), ("y", 0, 0)])
def test_rm_asks_first(
    terminal: Terminal, spare: str, answer: str, code: int, left: int, tmp_path: Path
) -> None:
    typed = tmp_path / "typed"
    typed.write_text(answer)
    with typed.open() as keyboard, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", keyboard)
        terminal.run("rm", spare, expect=code)
    assert "Delete gallery spare (6 photos, 8 instances)?" in terminal.error
    names = [each["gallery"] for each in terminal.json("galleries")]
    assert (len(terminal.json("versions", spare)) if spare in names else 0) == left


def test_failures_lists_photos_reasons_and_a_summary(terminal: Terminal) -> None:
    output = terminal.run("failures", "photos")
    assert "/photos/a\\nb.jpg  empty      0 bytes\\x1b[31m" in output
    assert output.splitlines()[-1] == "3 failed: truncated 2, empty 1"
    short = terminal.run("failures", "photos", "--limit", "1")
    assert "... and 2 more; use --limit 0 to list all" in short
    assert terminal.run("failures", "photos", "--limit", "0") == output
    found = terminal.json("failures", "photos")
    assert found["reasons"] == {"truncated": 2, "empty": 1}
    assert sorted(each["reason"] for each in found["failures"]) == ["empty", *["truncated"] * 2]
    assert terminal.run("failures", "photos", "--version", "v1").startswith("No failures in")


# doctor


def test_doctor_finds_a_working_installation(terminal: Terminal) -> None:
    found = {each["name"]: each for each in terminal.json("doctor")}
    for name in ("python", "torch", "checkpoint", "store", "gallery photos"):
        assert found[name]["status"] == "ok", found[name]
    assert ENCODER.digest[:12] in found["checkpoint"]["detail"]
    assert found["gallery photos"]["detail"] == "6 photos, 4 instances"
    assert [each["gallery"] for each in terminal.json("galleries")] == ["photos"]  # it cleans up
    lines = terminal.run("doctor").splitlines()
    assert any(line.startswith("ok   python ") for line in lines)


def test_doctor_fails_where_the_checkpoint_or_the_store_does(
    terminal: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    occupied = tmp_path / "file"
    occupied.write_text("not a folder")
    terminal.store = occupied
    output = terminal.run("doctor", "--checkpoint", str(tmp_path), expect=1)
    assert f"fail checkpoint     {tmp_path} is not a checkpoint" in output
    assert "-> correct --store or REIR_STORE" in output


def test_doctor_warns_of_galleries_of_another_checkpoint(terminal: Terminal, spare: str) -> None:
    def status(digest: str) -> list[tuple[str, str]]:
        encoder = FakeEncoder()
        encoder.digest = digest
        with_store = open_store(str(terminal.store))
        found = list(check_galleries(with_store, encoder))
        with_store.close()
        return [(check.name, check.status) for check in found]

    assert status(ENCODER.digest) == [("gallery photos", "ok"), (f"gallery {spare}", "ok")]
    assert status("other") == [("gallery photos", "warn"), (f"gallery {spare}", "warn")]
