"""`reir label` as a user types it, with a localizer that knows colors and sides."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from reir.datasets import read_reircoco
from reir.errors import ConfigError, DataError
from reir_testing.fakes import FakeLocalizer
from reir_testing.photo_sets import three_photos
from reir_training.cli import label


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three photos, and a list of sentences about them."""
    monkeypatch.setattr("reir.models.localizers.KINDS", {"fake": lambda _: FakeLocalizer()})
    three_photos(tmp_path)
    rows = ("0.png,the red one on the left", "0.png,blue", "1.png,green", "2.png,the red one")
    (tmp_path / "pairs.csv").write_text("\n".join(("photo,sentence", *rows)) + "\n")
    return tmp_path


def run(folder: Path, *arguments: str, out: Path | None = None) -> str:
    app = typer.Typer()
    label.register(app)
    app.callback()(lambda: None)  # so that the name of the only command is expected
    words = ["label", str(folder / "pairs.csv"), str(out or folder / "new" / "labels.json")]
    words += ["--localizer", "fake:x", "--images", str(folder), *arguments]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0
    return done.stdout


def test_labels_are_written_and_counted(folder: Path) -> None:
    values = json.loads(run(folder, "--json"))
    assert values["file"] == str(folder / "new" / "labels.json")
    assert (values["sentences"], values["kept"], values["drawn"]) == (4, 3, 0)
    assert values["refused"]["nothing found"] == 1
    labels = read_reircoco(folder / "new" / "labels.json")
    found = {e.text: labels.instances_by_id[str(e.instance_id)] for e in labels.expressions}
    assert found["blue"].box_xyxy_px == pytest.approx((110, 40, 150, 80), abs=1e-3)
    assert all(each.score is not None for each in labels.instances)


def test_the_table_says_why_sentences_were_refused(folder: Path) -> None:
    shown = [line.split() for line in run(folder, "--second", "fake:y").splitlines()]
    assert ["all", "4"] in shown
    assert ["kept", "3"] in shown
    assert ["refused:", "nothing", "found", "1"] in shown


def test_an_output_that_cannot_be_written_is_refused_before_the_model_is_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reir.models.localizers.KINDS", {})
    (folder / "new").touch()
    with pytest.raises(FileExistsError, match="new"):
        run(folder)
    (folder / "new").unlink()
    (folder / "new").symlink_to("/proc")  # a folder in which nobody can create a file
    with pytest.raises(OSError, match=r"/new/labels\.json"):
        run(folder)


def test_a_failure_leaves_the_output_as_it_was(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reir.models.localizers.KINDS", {})
    out = folder / "labels.json"
    with pytest.raises(ConfigError, match="fake:x"):
        run(folder, out=out)
    assert not out.exists()
    out.write_text("old")
    with pytest.raises(ConfigError, match="fake:x"):
        run(folder, out=out)
    assert out.read_text() == "old"


def test_a_file_is_written_in_a_folder_that_takes_no_other(folder: Path) -> None:
    with (folder / "labels.json").open("w") as opened:
        run(folder, out=Path(f"/proc/self/fd/{opened.fileno()}"))
    assert read_reircoco(folder / "labels.json").expressions


def test_a_bad_list_leaves_no_file(folder: Path) -> None:
    (folder / "pairs.csv").write_text("photo,sentence\n0.png,\ngone.png,a\n")
    with pytest.raises(DataError, match="has 2 problems"):
        run(folder)
    assert not (folder / "new").exists()
