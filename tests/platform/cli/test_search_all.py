"""`reir search --all`: lines and tables of every photo, and the options that do not fit."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import numpy as np
import pytest

from reir.cli import every_photo, main
from reir.cli.every_photo import expectation
from reir.query.every_photo import PhotoScan, ScannedPart
from reir.query.photo_curve import Decision
from reir.query.presence import Calibration
from reir.query.search import CheckpointExtras, Gallery
from reir.store.memory import MemoryStore
from reir_testing.evaluation.calibrations import score_calibration
from reir_testing.lookup_gallery import (
    DIM,
    LookupEncoder,
    fill_gallery,
    images_from_vectors,
)

CALIBRATION = score_calibration("table", 20, -10)
ALL = ("search", "number 0", "--gallery", "photos", "--all")


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> MemoryStore:
    """Return the store of a gallery of four photos, one of which has the object."""
    store = MemoryStore()
    fill_gallery(store, images_from_vectors(np.eye(DIM, dtype=np.float32), [1] * DIM))
    use(monkeypatch, store, CALIBRATION)
    return store


def use(
    monkeypatch: pytest.MonkeyPatch, store: MemoryStore, calibration: Calibration | None
) -> None:
    extras = CheckpointExtras(calibration=calibration)
    monkeypatch.setattr(
        "reir.query.search.open_gallery",
        lambda name, **_: Gallery(name, store, LookupEncoder(), extras),
    )


@pytest.mark.usefixtures("store")
def test_json_has_a_line_for_each_photo(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run([*ALL, "--json", "--min-presence", "0"]) == 0
    first, *photos, last = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["search"]["min_presence"] == 0
    assert [each["photo"]["image_id"] for each in photos] == [f"img00{n}" for n in range(DIM)]
    assert last == {"end": {"found": DIM, "contradicted": 0}}


@pytest.mark.usefixtures("store")
def test_tables_say_what_to_expect(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main.run([*ALL]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "Photos whose presence is at least 0.7. To expect if one of 4 photos has the object: "
        "recall 54 %, precision 64 %."
    )
    assert lines[2].split() == ["#", "presence", "photo", "x", "%", "y", "%"]
    assert lines[3].split()[:3] == ["1", "100", "%"]
    assert lines[-1] == "1 photo found in gallery photos, version v1"
    monkeypatch.setattr(every_photo, "TABLE_ROWS", 3)
    assert main.run([*ALL, "--recall", "1"]) == 0
    text = capsys.readouterr().out
    assert text.count("presence  photo") == 2
    assert "\n4 " in text
    assert text.splitlines()[-1].startswith("4 photos found")


@pytest.mark.usefixtures("store")
def test_the_last_line_tells_how_many_photos_have_other_colors(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def parts(self: PhotoScan) -> AsyncIterator[ScannedPart]:
        yield ScannedPart([], num_contradicted=2)

    monkeypatch.setattr(PhotoScan, "parts", parts)
    assert main.run([*ALL]) == 0
    assert " ".join(capsys.readouterr().out.split()).endswith(
        "0 photos found in gallery photos, version v1; 2 photos left out, because the colors do "
        "not fit (--no-verify keeps them)"
    )


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["red", "--precision", "0.9"], "--precision needs --all"),
        (["red", "--all", "-k", "3"], "-k is not possible with --all"),
        (["red", "--all", "--not", "blue"], "--not is not possible with --all"),
        (["--all", "--like", "x#0"], "--like is not possible with --all"),
        (["--all"], "--all needs an EXPRESSION"),
        (["number 0", "--all", "--precision", "0.99"], "gallery of 4 photos"),
        (["number 0", "--all", "--recall", "1", "--min-presence", "1"], "with min_presence"),
    ],
)
def test_options_that_exclude_each_other_are_refused(
    options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(["search", "--gallery", "photos", *options]) == main.INVALID_USE
    assert said in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("every", [(), ("--all",)])
@pytest.mark.parametrize(
    ("option", "value"), [("--encoder", "clare-nano"), ("--checkpoint", "runs/mine")]
)
def test_a_server_takes_no_encoder(
    option: str,
    value: str,
    every: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("REIR_SERVER", "http://localhost:1")
    assert main.run(["search", "blue", option, value, *every]) == main.INVALID_USE
    said = f"{option} {value} is not possible with --server or $REIR_SERVER: a server has its own"
    assert said in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("every", [(), ("--all",)])
def test_a_server_takes_no_store_that_was_typed(
    every: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("REIR_SERVER", "http://localhost:1")
    assert main.run(["search", "blue", "--store", "mine", *every]) == main.INVALID_USE
    said = "--store mine is not possible with --server or $REIR_SERVER: a server has its own store"
    assert said in " ".join(capsys.readouterr().err.split())


def test_a_server_is_asked_whatever_the_store_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("REIR_STORE", "mine")
    assert main.run(["search", "blue", "--server", "localhost"]) == main.INVALID_USE
    assert "'localhost'" in capsys.readouterr().err


def test_shares_are_written_with_two_digits_and_never_as_powers_of_ten() -> None:
    shares = (0.004321, 0.05, 0.5449, 0.994, 0.995, 0.9999, 1.0)
    written = ["0.43 %", "5 %", "54 %", "99 %", "100 %", "100 %", "100 %"]
    for share, said in zip(shares, written, strict=True):
        decision = Decision(min_presence=0.5, precision=share, recall=share)
        assert expectation(decision, 9).endswith(f"recall {said}, precision {said}.")


def test_without_a_calibration_nothing_is_decided(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use(monkeypatch, store, None)
    assert main.run([*ALL]) == main.INVALID_USE
    assert "create one with `reir calibrate`" in " ".join(capsys.readouterr().err.split())
