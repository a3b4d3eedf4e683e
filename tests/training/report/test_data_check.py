"""Leakage and the check of a data configuration, on real files."""

from __future__ import annotations

import json
import logging
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from reir.config import load_config
from reir.datasets import read_refer_json, write_reircoco
from reir.errors import ConfigError, DataError
from reir_testing import data_dir
from reir_testing.scenes import make_scenes, render, save_scenes, to_dataset
from reir_training.config import DataConfig, DataSource, NanoTrainConfig
from reir_training.data.leakage import coco_number, find_leaks, read_sources, training_photos
from reir_training.report.data_check import DataOnlyConfig, DataReport, SplitReport, check_data
from reir_training.run.driver import with_absolute_paths

DATA = data_dir()
needs_data = pytest.mark.skipif(DATA is None, reason="no REIR_DATA and no ../shared/data")
CATEGORIES = [{"id": 1, "name": "cat"}]
Box = Sequence[float]


def write_coco(
    folder: Path, names: Sequence[str], box: Box = (1, 2, 10, 12), size: tuple[int, int] = (32, 24)
) -> Path:
    """A COCO folder of small photos with one cat each."""
    (folder / "images").mkdir(parents=True)
    for name in names:
        Image.new("RGB", size).save(folder / "images" / name)
    images = [
        {"id": i, "file_name": name, "width": 32, "height": 24} for i, name in enumerate(names)
    ]
    cats = [
        {"id": i, "image_id": i, "category_id": 1, "bbox": list(box)} for i in range(len(names))
    ]
    document = {"images": images, "annotations": cats, "categories": CATEGORIES}
    (folder / "instances.json").write_text(json.dumps(document))
    return folder


def write_refs(folder: Path, splits: Sequence[tuple[int, str]], split_by: str = "unc") -> None:
    refs = [
        {
            "ref_id": number,
            "ann_id": image,
            "image_id": image,
            "split": split,
            "sentences": [{"sent_id": number, "sent": f"cat {number}", "raw": ""}],
        }
        for number, (image, split) in enumerate(splits)
    ]
    (folder / f"refs({split_by}).p").write_bytes(pickle.dumps(refs, protocol=2))


def coco(path: Path, **more: Any) -> DataSource:
    return DataSource(format="coco", path=path, **more)


def leaked_names(training: DataSource, evaluation: DataSource) -> list[str]:
    found = find_leaks(read_sources([training]), read_sources([evaluation]))
    return [name for leak in found for name in leak.file_names]


def only_split(report: DataReport) -> SplitReport:
    ((split,),) = [each.splits for each in report.sets]
    return split


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("COCO_train2014_000000123456.jpg", 123456),
        ("000000123456.jpg", 123456),
        ("val2017/000000123456.jpeg", 123456),
        ("a/b/COCO_val2014_000000000009.png", 9),
        ("COCO_test2015_000000000001.jpg", 1),
        ("COCO_train2014_000000123456", 123456),
        ("000000123456", 123456),
        ("202401021503.jpg", None),  # a time, as cameras name photos; COCO ids are below a million
        ("123456.jpg", None),
        ("123456", None),
        ("0000000123456.jpg", None),
        ("x_000000123456.jpg", None),
        ("scene-0-000000000001.png", None),
        ("", None),
    ],
)
def test_coco_numbers_are_found_in_names(name: str, number: int | None) -> None:
    assert coco_number(name) == number


def test_the_same_coco_photo_under_two_names_is_found(tmp_path: Path) -> None:
    train = write_coco(tmp_path / "a", ["000000000007.jpg", "000000000008.jpg"])
    val = write_coco(
        tmp_path / "b", ["COCO_train2014_000000000009.jpg", "COCO_val2014_000000000008.jpg"]
    )
    assert leaked_names(coco(train), coco(val)) == ["000000000008.jpg"]
    # numbers that a file counts its own photos by are no identity: both have images 0 and 1
    assert leaked_names(coco(val), coco(train)) == ["COCO_val2014_000000000008.jpg"]


def test_a_photo_that_another_set_has_encoded_again_is_the_same(tmp_path: Path) -> None:
    name = f"{1:012d}.jpg"
    train, val = write_coco(tmp_path / "a", [name]), write_coco(tmp_path / "b", [name])
    Image.new("RGB", (32, 24), "red").save(val / "images" / name)
    assert leaked_names(coco(train), coco(val)) == [name]


@pytest.mark.parametrize("stem", ["202401021503", "000000000007"])
def test_cameras_of_one_set_may_number_photos_alike(tmp_path: Path, stem: str) -> None:
    folder, files = tmp_path / "a", [f"cam{n}/{stem}.png" for n in (1, 2)]
    for name in ("cam1", "cam2"):
        (folder / "images" / name).mkdir(parents=True)
    for name, color in zip(files, ("red", "blue"), strict=True):
        Image.new("RGB", (32, 24), color).save(folder / "images" / name)
    images = [{"id": i, "file_name": n, "width": 32, "height": 24} for i, n in enumerate(files)]
    for number, name in enumerate(("train.json", "val.json")):
        cat = {"id": 0, "image_id": number, "category_id": 1, "bbox": [1, 2, 10, 12]}
        document = {"images": [images[number]], "annotations": [cat], "categories": CATEGORIES}
        (folder / name).write_text(json.dumps(document))
    train, val = coco(folder, annotations="train.json"), coco(folder, annotations="val.json")
    assert leaked_names(train, val) == []
    assert leaked_names(train, train) == files[:1]
    # Under another path, the folder is still the same one.
    (tmp_path / "link").symlink_to(folder)
    assert leaked_names(train, coco(tmp_path / "link", annotations="val.json")) == []
    for name in files:
        (folder / "images" / name).unlink()
    # Only bytes that differ show that photos with the same COCO id are different ones.
    assert leaked_names(train, val) == (files[:1] if coco_number(files[0]) else [])
    assert leaked_names(train, train) == files[:1]


def test_photos_without_coco_number_are_compared_by_name_and_bytes(tmp_path: Path) -> None:
    train = write_coco(tmp_path / "a", ["1.png", "2.png", "3.png"])
    val = write_coco(tmp_path / "b", ["1.png", "2.png", "4.png"])
    Image.new("RGB", (32, 24), "red").save(val / "images" / "2.png")
    assert leaked_names(coco(train), coco(val)) == ["1.png"]
    (val / "images" / "2.png").unlink()  # nothing but the name is left to go by
    assert leaked_names(coco(train), coco(val)) == ["1.png", "2.png"]


def test_leaks_equal_a_comparison_of_all_pairs(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    forms: list[Callable[[int], str]] = [
        lambda n: f"{n:012d}.jpg",
        lambda n: f"COCO_train2014_{n:012d}.jpg",
        lambda n: f"COCO_val2014_{n:012d}.jpg",
    ]

    def draw() -> dict[str, int]:
        numbers = rng.choice(60, size=25, replace=False).tolist()
        return {forms[rng.integers(3)](n): n for n in numbers}

    one, other = draw(), draw()
    train, val = write_coco(tmp_path / "a", list(one)), write_coco(tmp_path / "b", list(other))
    expected = [name for name, n in one.items() if any(n == m for m in other.values())]
    assert expected
    assert leaked_names(coco(train), coco(val)) == expected


def test_training_refuses_leaked_photos_with_a_remedy(tmp_path: Path) -> None:
    names = [f"{n:012d}.jpg" for n in range(6)]
    train, val = write_coco(tmp_path / "a", names), write_coco(tmp_path / "b", names[:5])
    config = DataConfig(data=(coco(train),), evaluation=(coco(val),))
    with pytest.raises(DataError) as caught:
        training_photos(config)
    said = str(caught.value)
    assert f"5 photos of the evaluation set {val} would be trained on from {train}" in said
    assert f"{names[0]}, {names[1]}, {names[2]} and 2 more" in said
    assert "exclude_evaluation: true" in said


def test_excluded_photos_are_not_trained_on_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = [f"{n:012d}.jpg" for n in range(4)]
    train, val = write_coco(tmp_path / "a", names), write_coco(tmp_path / "b", names[1:3])
    config = DataConfig(data=(coco(train),), evaluation=(coco(val),), exclude_evaluation=True)
    with caplog.at_level(logging.WARNING):
        photos = training_photos(config)
    assert [photo.path.name for photo in photos] == [names[0], names[3]]
    assert "2 photos of the evaluation set" in caplog.text
    report = check_data(config)
    assert report.fit
    assert [split.leaked for each in report.sets for split in each.splits] == [2, 0]
    assert any("excluded from training" in note for note in report.notes)
    everything = DataConfig(data=(coco(val),), evaluation=(coco(train),), exclude_evaluation=True)
    with pytest.raises(DataError, match="2 photos of evaluation sets are excluded"):
        training_photos(everything)
    (problem,) = check_data(everything).problems
    assert "2 photos of evaluation sets are excluded" in problem


def test_leaks_between_a_held_out_split_and_other_sources_are_found(tmp_path: Path) -> None:
    save_scenes(tmp_path / "a", {"train": make_scenes(3, 1), "val": make_scenes(2, 2)})
    save_scenes(tmp_path / "b", {"train": make_scenes(1, 2)})
    first = DataSource(format="photos", path=tmp_path / "a")
    assert len(training_photos(DataConfig(data=(first,)))) == 5
    both = DataConfig(data=(first, DataSource(format="photos", path=tmp_path / "b")))
    with pytest.raises(DataError, match=r"1 photo of the evaluation set .*a \[val\].*/b"):
        training_photos(both)


def test_photos_held_out_from_a_split_keep_their_expressions(tmp_path: Path) -> None:
    folder = write_coco(tmp_path / "g", [f"COCO_train2014_{n:012d}.jpg" for n in range(5)])
    write_refs(folder, [*((n, "train") for n in range(4)), (4, "testA")])
    source = DataSource(format="refer", path=folder, split="train", held_out=2)
    photos = training_photos(DataConfig(data=(source,)))
    assert sorted(photo.split for photo in photos) == ["train", "train", "val", "val"]
    assert all(len(photo.expressions) == 1 for photo in photos)
    whole = source.model_copy(update={"split": None})
    with pytest.raises(DataError, match=r"held_out=2 .* has splits, \['testA', 'train'\]"):
        training_photos(DataConfig(data=(whole,)))


def test_leaks_in_both_layouts_of_refcoco_are_found(tmp_path: Path) -> None:
    folder = write_coco(tmp_path / "g", [f"COCO_train2014_{n:012d}.jpg" for n in range(4)])
    write_refs(folder, [(0, "train"), (1, "train"), (1, "val"), (2, "testA")], "google")
    source = DataSource(format="refer", path=folder, split_by="google")
    photos = training_photos(DataConfig(data=(source,)))
    # photo 1 is held out though it is in "train" too; 2 is for tests, 3 is in no split
    assert [(p.path.name[-5], p.split, [e.text for e in p.expressions]) for p in photos] == [
        ("0", "train", ["cat 0"]),
        ("1", "val", ["cat 2"]),
    ]
    uses = {s.split: s.use for s in check_data(DataConfig(data=(source,))).sets[0].splits}
    assert uses == {"train": "train", "val": "held out", "testA": "unused", "rest": "unused"}
    one_split = source.model_copy(update={"split": "train"})
    assert [p.split for p in training_photos(DataConfig(data=(one_split,)))] == ["train", "train"]
    entry = {"img_id": "COCO_train2014_000000000000_1", "sents": "a cat", "bbox": [1, 2, 3, 4]}
    (tmp_path / "val.json").write_text(json.dumps([{**entry, "width": 32, "height": 24}]))
    val = DataSource(format="refer_json", path=tmp_path, annotations="val.json")
    with pytest.raises(DataError, match=r"1 photo of .*val\.json would be trained on"):
        training_photos(DataConfig(data=(source,), evaluation=(val,)))


def test_generated_scenes_are_counted_correctly(tmp_path: Path) -> None:
    splits = {"train": make_scenes(30, 1), "val": make_scenes(5, 2)}
    save_scenes(tmp_path, splits, per_instance=2)
    report = check_data(DataConfig(data=(DataSource(format="photos", path=tmp_path),)))
    assert report.fit
    assert report.problems == report.notes == ()
    for found, (name, scenes) in zip(report.sets[0].splits, splits.items(), strict=True):
        expected = to_dataset(scenes, per_instance=2)
        words = sorted(len(text.text.split()) for text in expected.expressions)
        assert (found.split, found.photos) == (name, len(scenes))
        assert found.instances == sum(len(scene.shapes) for scene in scenes)
        assert found.expressions == len(words) == sum(found.expressions_by_kind.values())
        assert found.expressions_by_kind["relation"] > 0
        assert found.mean_words == pytest.approx(sum(words) / len(words), abs=0.01)
        assert words[int(0.94 * len(words))] <= found.p95_words <= words[-1]
        assert found.sampled == min(20, len(scenes))
        assert (found.missing, found.unreadable, found.leaked) == ((), (), 0)
    assert [split.use for split in report.sets[0].splits] == ["train", "held out"]


def test_missing_and_broken_files_are_reported(tmp_path: Path) -> None:
    folder = write_coco(tmp_path / "a", ["1.png", "2.png", "3.png", "4.png"])
    (folder / "images" / "1.png").unlink()
    (folder / "images" / "2.png").write_bytes(b"no image")
    Image.new("RGB", (24, 32)).save(folder / "images" / "3.png")
    report = check_data(DataConfig(data=(coco(folder),)))
    split = only_split(report)
    assert split.missing == ("1.png",)
    assert split.sampled == 3
    broken, turned = split.unreadable
    assert broken.startswith("2.png: not_an_image: ")
    assert turned == "3.png: 24 x 32 px, annotated as 32 x 24 px"
    assert not report.fit
    assert "1 of 4 photos are not in" in report.problems[0]
    assert "2 of 3 sampled photos cannot be used" in report.problems[1]
    elsewhere = DataConfig(
        data=(coco(write_coco(tmp_path / "b", ["9.png"])),), evaluation=(coco(folder),)
    )
    assert check_data(elsewhere).fit  # an evaluation set may have its photos elsewhere


@pytest.mark.parametrize(
    ("box", "outside", "empty", "fit"),
    [
        ([1, 2, 31, 22], 0, 0, True),
        ([1, 2, 32, 23], 0, 0, True),
        ([1, 2, 32.5, 10], 1, 0, False),
        ([-1.5, 2, 10, 10], 1, 0, False),
        ([1, 2, 10, 23.5], 1, 0, False),
        ([5, 5, 0, 10], 0, 1, False),
    ],
    ids=["inside", "rounded", "right", "left", "below", "flat"],
)
def test_boxes_outside_or_without_area_are_counted(
    tmp_path: Path, box: Box, outside: int, empty: int, fit: bool
) -> None:
    report = check_data(DataConfig(data=(coco(write_coco(tmp_path / "a", ["1.png"], box)),)))
    split = only_split(report)
    assert (split.boxes_outside, split.boxes_empty) == (outside, empty)
    assert report.fit == fit


def test_duplicate_and_ambiguous_expressions_are_counted(tmp_path: Path) -> None:
    scenes = make_scenes(1, 3)
    dataset = to_dataset(scenes, scope="photo", per_instance=1)
    first, second, *_ = dataset.expressions
    texts = [("a b", first), ("A  b", first), ("c d", first), ("c d", second), ("e", second)]
    changed = dataset.with_expressions(
        type(of)(
            expression_id=str(number), image_id=of.image_id, instance_id=of.instance_id, text=text
        )
        for number, (text, of) in enumerate(texts)
    )
    (tmp_path / "images").mkdir()
    Image.fromarray(render(scenes[0])).save(tmp_path / "images" / scenes[0].file_name)
    write_reircoco(changed, tmp_path / "reircoco_train.json")
    report = check_data(DataConfig(data=(DataSource(format="reircoco", path=tmp_path),)))
    split = only_split(report)
    assert (split.expressions, split.duplicates, split.ambiguous) == (5, 1, 2)
    assert split.expressions_by_kind == {"unnamed": 5}
    assert report.fit
    assert len(report.notes) == 2


def test_an_unreadable_set_is_reported_and_the_others_are_checked(tmp_path: Path) -> None:
    folder = write_coco(tmp_path / "a", ["1.png"])
    told: list[str] = []
    config = DataConfig(data=(coco(tmp_path / "absent"), coco(folder)))
    report = check_data(config, told.append)
    assert told == [str(tmp_path / "absent"), str(folder)]
    assert [each.label for each in report.sets] == [str(folder)]
    (problem,) = report.problems
    assert "absent" in problem
    assert "instances.json" in problem
    unknown = DataConfig(data=(coco(folder, split="trian"),))
    assert "no split 'trian'" in check_data(unknown).problems[0]


def test_data_without_expressions_is_noted(tmp_path: Path) -> None:
    report = check_data(DataConfig(data=(coco(write_coco(tmp_path / "a", ["1.png"])),)))
    assert report.notes == (
        "no training photo has expressions or captions, so only boxes are learned",
    )
    caption = {"id": 1, "image_id": 0, "caption": "A cat."}
    (tmp_path / "a" / "captions.json").write_text(json.dumps({"annotations": [caption]}))
    report = check_data(DataConfig(data=(coco(tmp_path / "a"),)))
    assert only_split(report).captions == 1
    assert report.notes == ()


def test_every_source_needs_a_photo_to_train_on(tmp_path: Path) -> None:
    good = write_coco(tmp_path / "good", ["1.png"])
    bare = write_coco(tmp_path / "bare", ["2.png"])
    document = json.loads((bare / "instances.json").read_text())
    (bare / "instances.json").write_text(json.dumps({**document, "annotations": []}))
    config = DataConfig(data=(coco(good), coco(bare)))
    with pytest.raises(DataError) as refused:
        training_photos(config)
    assert check_data(config).problems == (str(refused.value),)
    assert f"{bare} (coco) has no annotated photo to train on; annotate" in str(refused.value)
    # Held-out photos alone are not enough either.
    save_scenes(tmp_path / "held", {"val": make_scenes(2, 2), "train": []})
    held_out = DataConfig(data=(DataSource(format="photos", path=tmp_path / "held"),))
    (problem,) = check_data(held_out).problems
    assert "no photo is left to train on" in problem


def test_sentences_without_boxes_are_data_for_weak_rec(tmp_path: Path) -> None:
    folder = write_coco(tmp_path / "a", ["1.png"])
    (folder / "pairs.jsonl").write_text('{"photo": "1.png", "sentence": "a cat"}\n')
    source = DataSource(format="sentences", path=folder, annotations="pairs.jsonl")
    report = check_data(DataConfig(data=(source,)))
    assert report.fit
    assert any("no box, so only weak-rec can learn from it" in note for note in report.notes)


def test_expressions_of_crowds_are_not_taken_for_sentences_without_boxes(tmp_path: Path) -> None:
    folder = write_coco(tmp_path / "a", ["1.png"])
    write_refs(folder, [(0, "train")])
    document = json.loads((folder / "instances.json").read_text())
    (crowd,) = document["annotations"]
    crowd["iscrowd"] = 1
    (folder / "instances.json").write_text(json.dumps(document))
    report = check_data(DataConfig(data=(DataSource(format="refer", path=folder),)))
    (problem,) = report.problems
    assert "has no annotated photo to train on" in problem
    assert not any("no box" in note for note in report.notes)


def test_any_training_configuration_can_be_checked() -> None:
    values = {"data": [{"format": "coco", "path": "a"}], "weights": "w", "towers": "t"}
    assert load_config(DataOnlyConfig, values).data[0].path == Path("a")
    with pytest.raises(ConfigError, match="unknown key 'evaluaton'; did you mean 'evaluation'"):
        load_config(DataOnlyConfig, {**values, "evaluaton": []})


def test_paths_of_evaluation_sets_become_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = {"format": "coco", "path": "a"}
    values = {"data": [source], "evaluation": [source], "weights": "w"}
    config = with_absolute_paths(load_config(NanoTrainConfig, values))
    assert config.data[0].path == config.evaluation[0].path == tmp_path / "a"


@needs_data
@pytest.mark.data
def test_published_files_of_every_format_can_be_checked() -> None:
    assert DATA is not None
    refer = DATA / "photos_masks" / "refer_layout"
    refs = [("refcoco", "unc", 59), ("refcoco+", "unc", 59), ("refcocog", "umd", 24)]
    config = DataConfig.model_validate(
        {
            "data": [{"format": "photos", "path": DATA / "photos"}],
            "evaluation": [
                *({"format": "refer", "path": refer / n, "split_by": by} for n, by, _ in refs),
                *(
                    {"format": "refer_json", "path": path.parent, "annotations": path.name}
                    for path in sorted((DATA / "refs_only" / "refcoco").glob("*.json"))
                ),
            ],
        }
    )
    report = check_data(config)
    assert report.fit, report.problems
    photos = {split.split: split for split in report.sets[0].splits}
    assert (photos["train"].photos, photos["val"].photos) == (2082, 251)
    assert photos["train"].expressions_by_kind == {"long": 8032, "short": 4094}
    totals = [sum(split.expressions for split in each.splits) for each in report.sets[1:4]]
    assert totals == [num for _, _, num in refs]
    assert sum(split.expressions for each in report.sets[4:] for split in each.splits) == 57_457


@needs_data
@pytest.mark.data
def test_leaks_between_published_refcoco_and_coco_are_found() -> None:
    assert DATA is not None
    values: dict[str, Any] = {
        "data": [{"format": "coco", "path": DATA / "photos_masks"}],
        "evaluation": [
            {
                "format": "refer_json",
                "path": DATA / "refs_only" / "refcoco",
                "annotations": "refcocog_test.json",
            }
        ],
    }
    with pytest.raises(DataError, match="5 photos of the evaluation set"):
        training_photos(DataConfig.model_validate(values))
    kept = training_photos(DataConfig.model_validate({**values, "exclude_evaluation": True}))
    every = training_photos(
        DataConfig(data=(DataSource(format="coco", path=DATA / "photos_masks"),))
    )
    tested = read_refer_json(DATA / "refs_only" / "refcoco" / "refcocog_test.json").images
    names = {image.file_name.removeprefix("COCO_train2014_") for image in tested}
    assert len(kept) == len(every) - 5
    assert [p.path for p in kept] == [p.path for p in every if p.path.name not in names]
