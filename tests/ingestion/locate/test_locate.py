"""`reir locate`: the decision about each photo of a folder, and what happens to bad files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from reir.errors import ConfigError, QueryError, SourceError
from reir.query.localize import PixelLocalizer
from reir.query.search import CheckpointExtras
from reir_ingestion.locate.cli import MAX_DRAWN, Tally, register
from reir_ingestion.locate.photos import LocatedPhoto, locate_photos
from reir_ingestion.sources import open_source
from reir_testing import FakeEncoder, draw_scene
from reir_testing.evaluation.calibrations import score_calibration

CALIBRATION = score_calibration(FakeEncoder().digest, 20, -12)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Return a folder with a red and a blue box, an empty photo and two bad files."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for color in ("red", "blue"):
        pixels = draw_scene((120, 80), [(color, (12, 20, 48, 60))])
        Image.fromarray(pixels).save(folder / f"{color}.png")
    Image.new("RGB", (60, 40), "white").save(folder / "nothing.png")
    (folder / "broken.jpg").write_bytes(b"not a photo")
    (folder / "empty.png").write_bytes(b"")
    (folder / "note.txt").write_text("no photo")
    return folder


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> typer.Typer:
    """Return the command line with a model that finds colors."""
    extras = CheckpointExtras(calibration=CALIBRATION)
    monkeypatch.setattr("reir.query.search.chosen_model", lambda _: (FakeEncoder(), extras))
    app = typer.Typer()
    app.callback()(lambda: None)
    register(app)
    return app


def test_every_photo_is_decided_or_says_why_not(photos: Path) -> None:
    localizer = PixelLocalizer(FakeEncoder(), CALIBRATION)
    found = {
        Path(each.uri).name: each
        for each in locate_photos(open_source(photos), localizer, "the red box")
    }
    assert [name for name, each in found.items() if each.present] == ["red.png"]
    assert found["red.png"].box == pytest.approx((0.1, 0.25, 0.4, 0.75))
    assert found["red.png"].presence == pytest.approx(
        CALIBRATION.of_photo(found["red.png"].score or 0.0, 0.0, 3)
    )
    assert found["blue.png"].box is not None
    assert (found["nothing.png"].box, found["nothing.png"].presence) == (None, 0.0)
    assert found["broken.jpg"].error.startswith("not_an_image: ")
    assert found["empty.png"].error.startswith("empty: ")
    assert len(found) == 5


def test_the_threshold_decides(photos: Path) -> None:
    localizer = PixelLocalizer(FakeEncoder(), CALIBRATION)
    source = open_source(photos)
    every = list(locate_photos(source, localizer, "the red box", 0.0))
    assert sorted(Path(each.uri).name for each in every if each.present) == ["blue.png", "red.png"]
    presences = [each.presence for each in every if each.presence]
    assert not any(
        each.present
        for each in locate_photos(source, localizer, "the red box", max(presences) + 1e-9)
    )


def test_a_list_may_name_photos_that_are_gone(photos: Path) -> None:
    (photos / "list.txt").write_text("red.png\ngone.png\n")
    localizer = PixelLocalizer(FakeEncoder())
    first, second = locate_photos(open_source(photos / "list.txt"), localizer, "the red box")
    assert (first.present, first.presence) == (True, None)
    assert second.error.startswith("missing: ")


def test_the_table_names_the_photos_and_the_bad_files(command: typer.Typer, photos: Path) -> None:
    done = CliRunner().invoke(command, ["locate", str(photos), "the red box"])
    assert done.exit_code == 0
    assert " %  x 10-40 y 25-75" in done.stdout
    assert "red.png" in done.stdout
    assert "blue.png" not in done.stdout
    assert "1 of 3 photos have it; 2 photos could not be read" in done.stdout
    assert "not read: .txt 1" in done.stdout
    assert "broken.jpg: not_an_image: " in done.stderr


def test_json_has_one_line_for_each_photo(command: typer.Typer, photos: Path) -> None:
    done = CliRunner().invoke(command, ["locate", str(photos), "the red box", "--json"])
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == 5
    assert all(
        set(line) == {"uri", "present", "presence", "box", "score", "error"} for line in lines
    )
    assert [Path(line["uri"]).name for line in lines if line["present"]] == ["red.png"]


def test_draw_writes_a_picture(command: typer.Typer, photos: Path, tmp_path: Path) -> None:
    picture = tmp_path / "found.png"
    asked = ["locate", str(photos), "the red box", "--draw", str(picture)]
    assert CliRunner().invoke(command, asked).exit_code == 0
    with Image.open(picture) as drawn:
        assert drawn.width > 300
    wrong = CliRunner().invoke(command, [*asked[:-1], str(tmp_path / "found.txt")])
    assert isinstance(wrong.exception, ConfigError)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [(["nowhere", "a dog"], SourceError), (["PHOTOS", "  "], QueryError)],
)
def test_wrong_arguments_are_refused(
    command: typer.Typer, photos: Path, arguments: list[str], error: type[Exception]
) -> None:
    real = [str(photos) if each == "PHOTOS" else each for each in arguments]
    assert isinstance(CliRunner().invoke(command, ["locate", *real]).exception, error)


def test_without_a_calibration_there_is_no_threshold(
    command: typer.Typer, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "reir.query.search.chosen_model", lambda _: (FakeEncoder(), CheckpointExtras())
    )
    asked = ["locate", str(photos), "red", "--min-presence", "0.5"]
    done = CliRunner().invoke(command, asked)
    assert "needs a calibration" in str(done.exception)


def test_the_tally_keeps_the_best_photos_only() -> None:
    tally = Tally()
    many = [LocatedPhoto(uri=f"{n}", present=n % 2 == 0, presence=n / 1000) for n in range(1000)]
    assert list(tally.counted(iter(many))) == many
    assert [each.uri for each in tally.best] == [str(998 - 2 * n) for n in range(MAX_DRAWN)]
    assert tally.summary() == "500 of 1,000 photos have it"
