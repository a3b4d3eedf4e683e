"""Masks of the shipped checkpoint: at query time, in the index, in pictures, in other formats."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import reir
from reir.checkpoint import SHIPPED
from reir.cli.main import build_app
from reir.images import rle
from reir_testing import data_dir


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four real photos."""
    data = data_dir()
    if data is None:
        pytest.skip("needs real photos: set REIR_DATA")
    folder = tmp_path_factory.mktemp("photos")
    for source in sorted((data / "photos" / "images").iterdir())[:4]:
        (folder / source.name).write_bytes(source.read_bytes())
    return folder


@pytest.fixture(scope="module")
def store(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store with the photos in two galleries, without masks and with masks."""
    location = str(tmp_path_factory.mktemp("store"))
    run("index", str(photos), "--gallery", "plain", "--store", location, "--runner", "local")
    run(
        *("index", str(photos), "--gallery", "masked", "--store", location, "--runner", "local"),
        "--masks",
    )
    return location


def run(*arguments: str) -> str:
    result = CliRunner().invoke(build_app(), arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_hits_have_masks_inside_their_boxes_when_localized(store: str) -> None:
    with reir.open("plain", store=store) as gallery:
        (hit, *_) = gallery.search("the animal")
        assert hit.mask is None
        found = gallery.search("the animal", localize=True)
    assert all(each.mask is not None for each in found)
    for each in found:
        assert each.mask is not None
        rows, columns = np.nonzero(rle.decode(each.mask))
        assert len(rows) > 0
        height, width = each.mask.size
        x1, y1, x2, y2 = each.box
        # The mask ends at the box that was found or at the first one, which is close to it.
        assert columns.min() / width > x1 - 0.1
        assert columns.max() / width < x2 + 0.1
        assert rows.min() / height > y1 - 0.1
        assert rows.max() / height < y2 + 0.1


def test_an_index_with_masks_returns_them_without_pixels(store: str, photos: Path) -> None:
    with reir.open("masked", store=store) as gallery, reir.open("plain", store=store) as plain:
        found, without = gallery.search("the animal"), plain.search("the animal")
    assert all(each.mask is not None for each in found)
    for one, other in zip(found, without, strict=True):
        assert one.box == pytest.approx(other.box, abs=1e-6)
    assert found.presence == pytest.approx(without.presence)  # the calibration still fits


def test_masks_are_drawn_and_exported(store: str, tmp_path: Path) -> None:
    options = ("search", "the animal", "--gallery", "plain", "--store", store, "-k", "2")
    picture = tmp_path / "hits.png"
    data = json.loads(run(*options, "--localize", "--draw", str(picture), "--export", "coco"))
    assert all("segmentation" in each for each in data["annotations"])
    assert data["categories"] == [{"id": 1, "name": "the animal"}]
    boxes_only = tmp_path / "boxes.png"
    run(*options, "--draw", str(boxes_only))
    assert np.asarray(Image.open(picture)).shape == np.asarray(Image.open(boxes_only)).shape
    assert (np.asarray(Image.open(picture)) != np.asarray(Image.open(boxes_only))).any()


def test_the_checkpoint_with_its_mask_head_stays_small() -> None:
    assert sum(each.stat().st_size for each in SHIPPED.iterdir()) < 80e6


def test_an_encoder_without_masks_is_refused(photos: Path, tmp_path: Path) -> None:
    arguments = ("index", str(photos), "--store", str(tmp_path), "--masks")
    result = CliRunner().invoke(build_app(), [*arguments, "--encoder", f"owlv2:{photos}"])
    assert result.exit_code != 0
    assert "has no masks; use the shipped checkpoint" in str(result.exception or result.output)
