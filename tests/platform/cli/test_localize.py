"""`reir localize` as a user types it; the models are fakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from reir.cli import localize
from reir.errors import ConfigError, ImageError, QueryError, ReirError
from reir.images.decode import read_image
from reir.query.photo_query import BoxLocator
from reir.query.search import CheckpointExtras
from reir_testing import FakeEncoder, FakeLocalizer, draw_scene
from reir_testing.evaluation.calibrations import score_calibration

RED, BLUE = (10, 10, 60, 90), (150, 20, 190, 60)


@pytest.fixture(autouse=True)
def fake_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reir.encoders.KINDS", {"clare-nano": lambda _: FakeEncoder()})
    monkeypatch.setattr("reir.models.localizers.KINDS", {"fake": lambda _: FakeLocalizer()})


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "two [bold].png"
    Image.fromarray(draw_scene((200, 100), [("red", RED), ("blue", BLUE)])).save(path)
    return path


def run(*arguments: object) -> Any:
    app = typer.Typer()
    localize.register(app)
    return CliRunner().invoke(app, [*map(str, arguments)])


@pytest.mark.parametrize("model", [(), ("--localizer", "fake:x")])
def test_the_described_instance_comes_first(photo: Path, model: tuple[str, ...]) -> None:
    done = run(photo, "the Blue one", "--json", *model)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["expression"] == "the Blue one"
    assert (found["width_px"], found["height_px"], found["present"]) == (200, 100, True)
    blue, red = found["boxes"]
    assert blue["box"] == pytest.approx([0.75, 0.2, 0.95, 0.6])
    assert red["box"] == pytest.approx([0.05, 0.1, 0.3, 0.9])
    assert blue["score"] > red["score"]
    assert list(found["timings_ms"]) == ["decode", "localize"]
    best = json.loads(run(photo, "the blue one", "-k", 1, "--json", *model).stdout)
    assert best["boxes"] == [blue]


def test_the_table_and_the_drawing(photo: Path, tmp_path: Path) -> None:
    picture = tmp_path / "found.png"
    done = run(photo, "the blue one", "--draw", picture, "--localizer", "fake:x")
    assert done.exit_code == 0, done.output
    assert "75-95" in done.stdout
    assert "2 instances" in done.stdout
    assert f"picture: {picture}".replace("\n", "") in done.stdout.replace("\n", "")
    drawn, plain = read_image(picture), read_image(photo)
    assert drawn.shape == plain.shape
    changed = np.argwhere((drawn != plain).any(axis=-1))
    assert len(changed) > 100


def test_the_table_is_printed_although_the_drawing_cannot_be_saved(tmp_path: Path) -> None:
    long = tmp_path / "long.png"
    Image.new("RGB", (16_384, 100), (128, 128, 128)).save(long)
    done = run(long, "the blue one", "--draw", tmp_path / "a.webp", "--localizer", "fake:x")
    assert "Nothing found in this photo" in done.stdout
    assert isinstance(done.exception, ReirError)
    assert "a picture of 16384 x 100 pixels cannot be" in str(done.exception)


def test_a_calibration_says_whether_it_is_there(
    photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extras = CheckpointExtras(calibration=score_calibration(FakeEncoder().digest, 20, -12))
    monkeypatch.setattr("reir.query.search.chosen_model", lambda _: (FakeEncoder(), extras))
    there, absent = run(photo, "the blue one"), run(photo, "the green one")
    assert "likely" in there.stdout
    assert "Probably not" not in there.stdout
    assert "Probably not in this photo" in absent.stdout


def test_an_empty_photo(tmp_path: Path) -> None:
    Image.new("RGB", (30, 20), (128, 128, 128)).save(tmp_path / "grey.png")
    for model in ((), ("--localizer", "fake:x")):
        done = run(tmp_path / "grey.png", "the blue one", *model)
        assert "Nothing found in this photo" in done.stdout


def test_mistakes_are_explained_before_a_model_is_loaded(photo: Path, tmp_path: Path) -> None:
    def refused(*arguments: object) -> Exception:
        error = run(*arguments).exception
        assert isinstance(error, Exception)
        return error

    assert isinstance(refused(photo, " "), QueryError)
    missing = refused(tmp_path / "gone.png", "red")
    assert isinstance(missing, ImageError)
    assert "does not exist" in str(missing)
    (tmp_path / "broken.jpg").write_bytes(b"no photo")
    assert isinstance(refused(tmp_path / "broken.jpg", "red"), ImageError)
    two = refused(photo, "red", "--localizer", "fake:x", "--encoder", "clare-nano")
    assert isinstance(two, ConfigError)
    assert "are two models; leave one of them out" in str(two)
    assert "unknown localizer 'x'" in str(refused(photo, "red", "--localizer", "x"))
    assert "cannot write .txt" in str(refused(photo, "red", "--draw", tmp_path / "a.txt"))


def test_a_localizer_has_no_masks(photo: Path) -> None:
    locator = BoxLocator(FakeLocalizer())
    with pytest.raises(QueryError, match="cannot come from a localizer"):
        locator.locate(read_image(photo), ["red"], masks=True)
