"""Builds whole datasets offline: what is written, accounted for, split and resumed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
import yaml
from PIL import Image
from typer.testing import CliRunner

from reir.datasets import read_reircoco
from reir.errors import ConfigError, DataError
from reir_ingestion.build_dataset.answers.failures import ModelUnavailable
from reir_ingestion.build_dataset.build import BuildOptions, BuildReport, build_dataset
from reir_ingestion.build_dataset.cli import register
from reir_ingestion.build_dataset.judges.rules import RulesJudge
from reir_ingestion.build_dataset.outcomes import Builder
from reir_ingestion.build_dataset.photos import open_photos
from reir_ingestion.build_dataset.scenes import SceneReader
from reir_ingestion.build_dataset.tasks import Verdict, Writing, WritingTask, Written
from reir_ingestion.build_dataset.writers.template import TemplateWriter
from reir_testing import FakeEncoder
from reir_testing.data_engine.drawn_photos import SCENES, draw_photos
from reir_training.config import DataSource
from reir_training.data.examples import build_photos, read_dataset


class CountingEncoder(FakeEncoder):
    """Counts the photos that it encodes."""

    def __init__(self) -> None:
        super().__init__()
        self.num_photos = 0

    def encode_images(self, images: Any) -> Any:
        self.num_photos += len(images)
        return super().encode_images(images)


def build(
    photos: Path, out: Path, writer: Any = None, encoder: FakeEncoder | None = None, **options: Any
) -> BuildReport:
    encoder = encoder or FakeEncoder()
    judge = RulesJudge(encoder.encode_expressions)
    return build_dataset(
        open_photos(str(photos)),
        out,
        SceneReader(encoder, out / "work" / "scenes"),
        lambda _scenes: Builder(writer or TemplateWriter(), [judge], 3),
        BuildOptions(**options),
    )


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_dataset_is_built_offline_and_training_reads_it(tmp_path: Path) -> None:
    photos, out = draw_photos(tmp_path / "photos"), tmp_path / "out"
    report = build(photos, out, val_share=0.0)
    assert report.statistics.photos == {"written": 4, "refused": 0, "failed": 0}
    dataset = read_reircoco(out / "reircoco_train.json")
    texts = {each.text for each in dataset.expressions}
    assert {"red dog", "the left red dog", "the car", "bus right of the car"} & texts
    assert len(dataset.instances) == 7
    source = DataSource(format="reircoco", path=out, images=str(photos / "images"))
    examples = build_photos(source, read_dataset(source))
    assert sum(len(each.expressions) for each in examples) == len(dataset.expressions) > 7
    assert all(each.path.is_file() for each in examples)
    assert examples[0].captions == ("A drawing with number 0.",)


def test_captions_of_an_earlier_run_do_not_stay(tmp_path: Path) -> None:
    photos, out = draw_photos(tmp_path / "photos"), tmp_path / "out"
    build(photos, out)
    assert (out / "captions.json").is_file()
    (photos / "captions.json").unlink()
    build(photos, out)
    assert not (out / "captions.json").exists()


def test_every_expression_describes_the_instance_that_it_is_written_about(tmp_path: Path) -> None:
    photos, out = draw_photos(tmp_path / "photos"), tmp_path / "out"
    report = build(photos, out)
    for outcome in report.outcomes:
        for each in outcome.kept:
            category = outcome.task.instance(each.number).category
            assert each.text.index(category) == min(
                each.text.find(name) % 1000 for name in ("dog", "car", "bus", "cat", "cup")
            )


def test_every_photo_is_accounted_for(tmp_path: Path) -> None:
    photos = draw_photos(tmp_path / "photos")
    (photos / "images" / "001.png").write_bytes(b"no photo")
    (photos / "images" / "002.png").unlink()
    report = build(photos, tmp_path / "out")
    told = {each["photo"]: each for each in lines(tmp_path / "out" / "photos.jsonl")}
    assert {name: each["status"] for name, each in told.items()} == {
        "000.png": "written",
        "001.png": "failed",
        "002.png": "failed",
        "003.png": "written",
    }
    assert told["001.png"]["reason"].startswith("not_an_image: ")
    assert told["002.png"]["reason"].startswith("missing: ")
    assert report.statistics.photo_reasons == {"not_an_image": 1, "missing": 1}


def test_near_duplicates_are_in_the_same_split(tmp_path: Path) -> None:
    photos, out = draw_photos(tmp_path / "photos", num=24), tmp_path / "out"
    rng = np.random.default_rng(0)
    for first in range(0, 24, 2):
        # Rough patterns, whose perceptual hashes differ; the second photo is a bit brighter.
        blocks = rng.integers(40, 200, (6, 8, 1), dtype=np.uint8).repeat(3, axis=2)
        for at, pixels in ((first, blocks), (first + 1, blocks + 3)):
            large = Image.fromarray(pixels).resize((160, 120), Image.Resampling.BICUBIC)
            large.save(photos / "images" / f"{at:03d}.png")
    build(photos, out, val_share=0.5)
    split_of = [each["split"] for each in lines(out / "photos.jsonl")]
    assert split_of[::2] == split_of[1::2]
    assert {"train", "val"} == set(split_of)
    val = {each.file_name for each in read_reircoco(out / "reircoco_val.json").images}
    train = {each.file_name for each in read_reircoco(out / "reircoco_train.json").images}
    assert not val & train
    assert len(val | train) == 24


def test_a_rerun_encodes_no_photo_again_and_writes_the_same(tmp_path: Path) -> None:
    photos, out, encoder = draw_photos(tmp_path / "photos"), tmp_path / "out", CountingEncoder()
    build(photos, out, encoder=encoder)
    first = (out / "reircoco_train.json").read_bytes()
    build(photos, out, encoder=encoder)
    assert encoder.num_photos == 4
    assert (out / "reircoco_train.json").read_bytes() == first
    Image.new("RGB", (160, 120), "red").save(photos / "images" / "000.png")
    build(photos, out, encoder=encoder)
    assert encoder.num_photos == 8


class FixedWriter:
    """Writes the same texts about the first instance of each photo."""

    name, version = "fixed", "1"

    def __init__(self, *texts: str) -> None:
        self._texts = texts

    def write(self, _: WritingTask) -> Writing:
        return Writing(expressions=tuple(Written(1, text) for text in self._texts))


class SilentWriter(TemplateWriter):
    """Its model does not answer about the last photo."""

    def write(self, task: WritingTask) -> Writing:
        if task.scene.photo.file_name == "003.png":
            raise ModelUnavailable("no answer: status 500")
        return super().write(task)


@pytest.mark.parametrize(("val_share", "split"), [(0.0, "train"), (1.0, "val")])
def test_a_photo_without_an_answer_is_in_no_split(
    tmp_path: Path, val_share: float, split: str
) -> None:
    photos, out = draw_photos(tmp_path / "photos"), tmp_path / "out"
    build(photos, out, SilentWriter(), val_share=val_share)
    told = {each["photo"]: each["split"] for each in lines(out / "photos.jsonl")}
    assert told == dict.fromkeys(["000.png", "001.png", "002.png"], split) | {"003.png": ""}
    images = read_reircoco(out / f"reircoco_{split}.json").images
    assert {each.file_name for each in images} == {"000.png", "001.png", "002.png"}
    captions = json.loads((out / "captions.json").read_text())["annotations"]
    assert [each["image_id"] for each in captions] == ["000.png", "001.png", "002.png"]


def test_an_evaluation_needs_a_photo(tmp_path: Path) -> None:
    photos, out = draw_photos(tmp_path / "photos", [SCENES[3]]), tmp_path / "out"
    (photos / "images" / "000.png").write_bytes(b"no photo")
    build(photos, out, val_share=1.0)
    assert yaml.safe_load((out / "data.yaml").read_text())["evaluation"] == []


def test_every_file_is_on_the_disk_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power failure cannot be had here, so this looks at what would survive it."""
    photos, out = draw_photos(tmp_path / "photos"), tmp_path / "out"
    sync, synced = os.fsync, set()

    def note(descriptor: int) -> None:
        synced.add((os.fstat(descriptor).st_ino, os.fstat(descriptor).st_size))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    build(photos, out)
    files = [path for path in out.iterdir() if path.is_file()]
    assert len(files) == 10
    unsynced = [each for each in files if (each.stat().st_ino, each.stat().st_size) not in synced]
    assert unsynced == []


def test_a_split_has_the_boxes_of_the_file_that_is_named(tmp_path: Path) -> None:
    photos = draw_photos(tmp_path / "photos")
    document = json.loads((photos / "instances.json").read_text())
    for each in document["annotations"]:
        each["id"] += 7
    document["categories"][0]["name"] = "wolf"
    (tmp_path / "other.json").write_text(json.dumps(document))
    splits = {"splits": {"train": [0, 1], "val": [2, 3]}, "expressions": []}
    (photos / "expressions.json").write_text(json.dumps(splits))

    def classes(annotations: Path | None, split: str) -> list[list[str | None]]:
        opened = open_photos(str(photos), annotations=annotations, split=split)
        return [[found.category for found in photo.instances] for photo in opened.photos]

    assert classes(None, "val") == [["cat", "cup"], ["dog"]]
    (photos / "instances.json").unlink()
    assert classes(tmp_path / "other.json", "train") == [["dog", "dog"], ["car", "wolf"]]
    with pytest.raises(DataError, match=r"expressions.json: no split 'tran', .*mean 'train'"):
        open_photos(str(photos), annotations=tmp_path / "other.json", split="tran")


def test_text_of_a_writer_cannot_reach_the_page_as_html(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    drawn = draw_photos(tmp_path / "drawn")
    name = "<img src=x onerror=alert(1)>.png"
    shutil.copy(drawn / "images" / "000.png", drawn / "images" / name)
    document = json.loads((drawn / "instances.json").read_text())
    document["images"][0]["file_name"] = name
    document["categories"][3]["name"] = "<script>dog</script>"
    (drawn / "instances.json").write_text(json.dumps(document))
    build(drawn, tmp_path / "out", FixedWriter("a red <b>dog</b>", "the red thing & co"))
    page = (tmp_path / "out" / "statistics.html").read_text()
    assert "<script" not in page
    assert "<b>" not in page
    assert "onerror" not in page
    assert "default-src 'none'" in page
    reasons = [each["reason"] for each in lines(tmp_path / "out" / "refused.jsonl")]
    assert any(reason.startswith("bad language: has '<'") for reason in reasons)


class RefusingJudge:
    """Refuses everything, and counts what it is asked."""

    name, version = "refusing", "1"

    def __init__(self) -> None:
        self.texts: list[str] = []

    def judge(self, _: WritingTask, expressions: Any) -> list[Verdict]:
        self.texts += [each.text for each in expressions]
        return [Verdict(problems={"grounded": "no"}) for _ in expressions]


def test_a_judge_sees_only_what_earlier_checks_accept(tmp_path: Path) -> None:
    out, judge, unseen = tmp_path / "out", RefusingJudge(), RefusingJudge()
    report = build_dataset(
        open_photos(str(draw_photos(tmp_path / "photos"))),
        out,
        SceneReader(FakeEncoder(), out / "work"),
        lambda _: Builder(FixedWriter("dog", "a good one"), [judge, unseen], 3),
        BuildOptions(),
    )
    assert judge.texts == ["a good one"] * 4
    assert unseen.texts == []
    assert report.statistics.photos["refused"] == 4
    assert report.statistics.not_kept == {"bad language": 4, "not grounded": 4}


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> typer.Typer:
    monkeypatch.setattr("reir.checkpoint.load_encoder", lambda _: FakeEncoder())
    app = typer.Typer()
    app.callback()(lambda: None)
    register(app)
    return app


def test_the_command_prints_counts(command: typer.Typer, tmp_path: Path) -> None:
    photos, out = draw_photos(tmp_path / "photos"), tmp_path / "out"
    done = CliRunner().invoke(command, ["build-dataset", str(photos), str(out), "--json"])
    assert done.exit_code == 0, done.output
    counts = json.loads(done.stdout)
    assert counts["photos"] == {"written": 4, "refused": 0, "failed": 0}
    assert counts["requests"] == 0
    assert json.loads((out / "statistics.json").read_text())["expressions"] == counts["expressions"]
    done = CliRunner().invoke(command, ["build-dataset", str(photos), str(out)])
    assert "4 photos written" in done.stdout


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--writer", "templat"], "did you mean 'template'?"),
        (["--judge", "rules,x"], "use one of rules, endpoint, transformers, ray-data"),
        (["--writer", "endpoint"], "REIR_ENDPOINT_URL"),
        (["--writer", "endpoint", "--endpoint", "http://localhost:1/v1"], "--model"),
        (["--writer", "transformers"], "--model"),
        (["--judge", "ray-data"], "ray-data needs the hub name or folder of a model; set --model"),
        (["--engine-option", "max_model_len"], "'max_model_len' must have the form"),
        (["--split", "train"], "train"),
    ],
    ids=["writer", "judge", "endpoint", "model", "local", "cluster", "engine", "split"],
)
def test_wrong_options_say_what_to_do(
    command: typer.Typer, tmp_path: Path, options: list[str], named: str
) -> None:
    photos = draw_photos(tmp_path / "photos") / "images"
    if "--split" not in options:
        photos = photos.parent
    arguments = ["build-dataset", str(photos), str(tmp_path / "out"), *options]
    done = CliRunner().invoke(command, arguments)
    assert isinstance(done.exception, ConfigError)
    assert named in str(done.exception)
