"""Feedback is given and exported by the command, and the data set is read again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reir.cli import main
from reir.datasets.reircoco import read_reircoco
from reir.images.decode import canonical_uri, image_id
from reir.operations.feedback import read_feedback
from reir.operations.search_log import default_folder
from reir.records import ImageRecord, IndexedImage
from reir.store import VersionSpec, open_store
from reir_testing import FakeEncoder, draw_scene

G, V = "photos", "v1"
SIZE = (200, 100)
URIS = [canonical_uri(f"/data/{name}") for name in ("one/a b.jpg", "two/c.jpg")]
IDS = [image_id(uri) for uri in URIS]
REMOTE = "s3://bucket/d.jpg"

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs a command on a store with three photos."""
    monkeypatch.setenv("REIR_HOME", str(tmp_path / "home"))
    location = str(tmp_path / "store")
    encoder = FakeEncoder()
    store = open_store(location)
    store.create_version(G, V, VersionSpec(dim=encoder.dim, digest=encoder.digest))
    (instances,) = encoder.encode_images([draw_scene(SIZE, [("red", (20, 10, 80, 90))])])
    for uri in (*URIS, REMOTE):
        record = ImageRecord(
            image_id=image_id(uri),
            uri=uri,
            status="indexed",
            num_instances=len(instances),
            width_px=SIZE[0],
            height_px=SIZE[1],
        )
        store.upsert_images(G, V, [IndexedImage(record, instances)])
    store.promote(G, V)
    store.close()

    def run(*words: str) -> tuple[int, str]:
        code = main.run([*words, "--store", location])
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return run


def test_feedback_is_given_and_exported(run: Run, tmp_path: Path) -> None:
    assert run("feedback", G, "the red one", "--right", f"{IDS[0]}#0") == (0, "Recorded: right.\n")
    assert run("feedback", "give", G, "the blue one", "--wrong", f"{IDS[0]}#0")[0] == 0
    assert run("feedback", G, "a giraffe", "--absent")[0] == 0
    sides = ("0.1", "0.2", "0.5", "0.75")
    for photo in (IDS[1], image_id(REMOTE)):
        assert run("feedback", G, "the \x1b[31m cup", "--box", photo, *sides)[0] == 0
    said = read_feedback(default_folder(), G)
    assert [each.verdict for each in said] == ["right", "wrong", "absent", "box", "box"]
    assert (said[3].uri, said[3].box) == (URIS[1], (0.1, 0.2, 0.5, 0.75))
    out = tmp_path / "out.json"
    code, printed = run("feedback", "export", G, str(out), "--json")
    assert code == 0
    assert json.loads(printed) == {
        "gallery": G,
        "file": str(out),
        "photos": "/data",
        "expressions": 2,
        "instances": 2,
        "images": 2,
        "feedback": 5,
        "used": 2,
        "left_out": {"wrong": 1, "absent": 1, "remote": 1},
    }
    dataset = read_reircoco(out)
    assert [image.file_name for image in dataset.images] == ["one/a b.jpg", "two/c.jpg"]
    assert [each.text for each in dataset.expressions] == ["the red one", "the [31m cup"]
    assert dataset.instances[0].box_xyxy_px == pytest.approx((20, 10, 80, 90), abs=1)
    assert dataset.instances[1].box_xyxy_px == pytest.approx((20, 20, 100, 75))
    code, printed = run("feedback", "export", G, str(out))
    assert "2 expressions of 2 instances in 2 photos, from 2 of 5 verdicts" in printed
    assert "Left out: 1 (says that the object is not in the gallery)." in printed


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ([], "give one of --right, --wrong, --absent and --box, got none of them"),
        (["--absent", "--right", "x#1"], "got --right and --absent"),
        (["--right", "x#1"], "'x#1' is not in gallery 'photos'"),
        (["--wrong", f"{IDS[0]}#99"], "#99' is not in gallery 'photos'"),
        (["--box", "x", "0", "0", "1", "1"], "image_id: 'x' is not in gallery"),
        (["--box", IDS[0], "0", "0", "1", "2"], "x1, y1, x2, y2 in [0, 1]"),
    ],
)
def test_wrong_feedback_is_explained(run: Run, words: list[str], problem: str) -> None:
    code, printed = run("feedback", G, "the red one", *words)
    assert code == 2
    assert problem in " ".join(printed.split())
    assert not default_folder().exists()


def test_what_cannot_be_exported_is_explained(run: Run, tmp_path: Path) -> None:
    out = str(tmp_path / "out.json")
    code, printed = run("feedback", "export", G, out)
    assert (code, "has no feedback about gallery 'photos'" in printed) == (1, True)
    run("feedback", G, "a giraffe", "--absent")
    code, printed = run("feedback", "export", G, out)
    assert (code, "none of the 1 verdicts" in printed) == (1, True)
    assert "1 absent" in printed
    assert not Path(out).exists()


def test_a_photo_that_is_gone_is_left_out(run: Run, tmp_path: Path) -> None:
    for photo in IDS:
        run("feedback", G, "the red one", "--right", f"{photo}#0")
    store: Any = open_store(str(tmp_path / "store"))
    store.delete_images(G, V, [IDS[0]])
    store.close()
    code, printed = run("feedback", "export", G, str(tmp_path / "out.json"), "--json")
    assert (code, json.loads(printed)["left_out"]) == (0, {"photo gone": 1})
