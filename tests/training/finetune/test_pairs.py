"""Lists of sentences about photos of a gallery, their split, and the canaries of held-out ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import reir
from reir.errors import DataError
from reir.images.decode import canonical_uri, image_id
from reir.operations.canary import read_canaries, to_line
from reir.store import InstanceStore
from reir.store.memory import MemoryStore
from reir_testing.fake_models import LEFT, save_photos
from reir_testing.fakes import PALETTE, FakeEncoder
from reir_training.finetune.pairs import canaries_of_pairs, read_pairs, split_pairs

GALLERY = "colors"


@pytest.fixture
def store(tmp_path: Path) -> InstanceStore:
    store = MemoryStore()
    photos = save_photos(tmp_path / "photos")
    reir.index(photos, gallery=GALLERY, store=store, encoder=FakeEncoder(), progress=False)
    return store


def write(path: Path, *rows: str) -> Path:
    path.write_text("\n".join(rows) + "\n")
    return path


def test_pairs_name_photos_of_the_gallery(store: InstanceStore, tmp_path: Path) -> None:
    path = write(
        tmp_path / "pairs.csv",
        "photo,sentence,x1,y1,x2,y2",
        "red.png,the zorp,,,,",
        f"{tmp_path / 'photos' / 'blue.png'},the glim,10,10,40,50",
        "photos/red.png,another zorp,,,,",
    )
    pairs = read_pairs(store, GALLERY, path)
    red, blue = (canonical_uri(tmp_path / "photos" / f"{c}.png") for c in ("red", "blue"))
    assert pairs.uris == {image_id(red): red, image_id(blue): blue}
    assert [(e.image_id, e.text, e.instance_id) for e in pairs.dataset.expressions] == [
        (image_id(red), "the zorp", None),
        (image_id(blue), "the glim", "3"),
        (image_id(red), "another zorp", None),
    ]
    assert [(i.width_px, i.height_px) for i in pairs.dataset.images] == [(90, 60)] * 2
    assert pairs.skipped == ()
    moved = write(tmp_path / "moved.csv", *path.read_text().splitlines())
    assert read_pairs(store, GALLERY, moved).digest == pairs.digest
    other = write(tmp_path / "other.csv", *path.read_text().replace("10,10", "10,11").splitlines())
    assert read_pairs(store, GALLERY, other).digest != pairs.digest


def test_rows_about_unknown_photos_are_refused_or_left_out(
    store: InstanceStore, tmp_path: Path
) -> None:
    rows = ("photo,sentence", "red.png,the zorp", "gone.png,the dax", "blue.png, ", "no.png,a")
    with pytest.raises(DataError) as refused:
        read_pairs(store, GALLERY, write(tmp_path / "a.csv", *rows))
    message = str(refused.value)
    assert "has 3 problems, so nothing of it is used" in message
    assert "row 3: the photo 'gone.png' is not in gallery 'colors'" in message
    assert "row 4: the sentence" in message

    with pytest.raises(DataError, match="has 1 problem") as refused:
        read_pairs(store, GALLERY, write(tmp_path / "b.csv", *rows), skip_unknown=True)
    assert "gone.png" not in str(refused.value)

    good = [row for row in rows if not row.startswith("blue")]
    pairs = read_pairs(store, GALLERY, write(tmp_path / "c.csv", *good), skip_unknown=True)
    assert [each.text for each in pairs.dataset.expressions] == ["the zorp"]
    assert len(pairs.skipped) == 2
    assert pairs.skipped[0].startswith("row 3: the photo 'gone.png' is not in gallery")
    only = write(tmp_path / "d.csv", "photo,sentence", "x.png,the zorp")
    with pytest.raises(
        DataError, match=r"no row is about a known photo; row 2: the photo 'x\.png'"
    ):
        read_pairs(store, GALLERY, only, skip_unknown=True)


def test_whole_photos_are_held_out_and_always_the_same_ones(
    store: InstanceStore, tmp_path: Path
) -> None:
    colors = list(PALETTE)
    rows = [f"{color}.png,{text} {color}" for text in ("the", "a") for color in colors]
    path = write(tmp_path / "pairs.csv", "photo,sentence", *rows)
    dataset = read_pairs(store, GALLERY, path).dataset
    train, held_out = split_pairs(dataset, 0.25)
    assert (len(train.images), len(held_out.images)) == (6, 2)
    assert (len(train.expressions), len(held_out.expressions)) == (12, 4)
    assert not train.images_by_id.keys() & held_out.images_by_id.keys()
    backwards = write(tmp_path / "backwards.csv", "photo,sentence", *rows[::-1])
    again = split_pairs(read_pairs(store, GALLERY, backwards).dataset, 0.25)[1]
    assert again.images_by_id.keys() == held_out.images_by_id.keys()
    assert len(split_pairs(dataset, 0.001)[1].images) == 1
    with pytest.raises(DataError, match="leaves none to train on"):
        split_pairs(dataset.of_images({dataset.images[0].image_id}), 0.2)


def test_canaries_have_the_photo_and_where_known_the_box(
    store: InstanceStore, tmp_path: Path
) -> None:
    box = ",".join(map(str, LEFT))
    path = write(
        tmp_path / "pairs.csv", "photo,sentence,x1,y1,x2,y2", f"red.png,a,{box}", "blue.png,b,,,,"
    )
    pairs = read_pairs(store, GALLERY, path)
    canaries = canaries_of_pairs(pairs.dataset, pairs.uris)
    lines = write(tmp_path / "canaries.jsonl", *map(to_line, canaries))
    first, second = read_canaries(lines)
    red = canonical_uri(tmp_path / "photos" / "red.png")
    assert (first.expression, first.uri, second.box) == ("a", red, None)
    assert first.box == pytest.approx((10 / 90, 10 / 60, 40 / 90, 50 / 60), abs=1e-4)
    # A box may reach a pixel beyond its photo.
    instance = replace(pairs.dataset.instances[0], box_xyxy_px=(-1.0, 0.0, 91.0, 60.0))
    wide = canaries_of_pairs(replace(pairs.dataset, instances=(instance,)), pairs.uris)
    assert wide[0].box == (0.0, 0.0, 1.0, 1.0)


def test_a_box_of_which_nothing_is_left_is_left_out(store: InstanceStore, tmp_path: Path) -> None:
    rows = (
        "red.png,a,10,10,10.001,50",
        "blue.png,b,89.999,10,90.9,50",
        "green.png,c,10,10,10.02,50",
    )
    path = write(tmp_path / "pairs.csv", "photo,sentence,x1,y1,x2,y2", *rows)
    pairs = read_pairs(store, GALLERY, path)
    canaries = canaries_of_pairs(pairs.dataset, pairs.uris)
    lines = write(tmp_path / "canaries.jsonl", *map(to_line, canaries))
    thin, at_edge, kept = read_canaries(lines)
    assert (thin.box, at_edge.box) == (None, None)
    assert kept.box == pytest.approx((10 / 90, 10 / 60, 10.02 / 90, 50 / 60), abs=1e-4)


def test_repeated_sentences_are_one_canary(store: InstanceStore, tmp_path: Path) -> None:
    rows = (
        *("red.png,a,,,,", "red.png,a,,,,", "blue.png,a,,,,", "red.png,b,,,,"),
        # These boxes are the same in the file, which has four decimals.
        *("red.png,c,10,10,40,50", "red.png,c,10.001,10,40,50", "red.png,c,20,10,40,50"),
    )
    path = write(tmp_path / "pairs.csv", "photo,sentence,x1,y1,x2,y2", *rows)
    pairs = read_pairs(store, GALLERY, path)
    canaries = canaries_of_pairs(pairs.dataset, pairs.uris)
    read = read_canaries(write(tmp_path / "canaries.jsonl", *map(to_line, canaries)))
    assert canaries == read
    assert [each.expression for each in read] == ["a", "a", "b", "c", "c"]
    assert len(set(read)) == len(read)
