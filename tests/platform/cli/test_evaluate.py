"""`reir eval` as a user types it."""

from __future__ import annotations

import json
import pickle
import tomllib
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from reir.cli import evaluate, evaluated_model
from reir.datasets import write_reircoco
from reir.errors import CheckpointError, ConfigError, DataError
from reir.evaluate import EncodedShard, Shard, encode_shard
from reir.models.interfaces import InstanceEncoder
from reir.query.presence import save_calibration
from reir_testing import FakeEncoder, FakeLocalizer, draw_scene
from reir_testing.evaluation.calibrations import fake_calibration
from reir_testing.photo_sets import three_photos
from reir_testing.scenes import make_scenes, save_scenes

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def fake_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reir.checkpoint.load_encoder", lambda _path: FakeEncoder())


def run(*arguments: str) -> Any:
    app = typer.Typer()
    evaluate.register(app)
    return CliRunner().invoke(app, ["eval", *arguments])


def annotated(folder: Path) -> list[str]:
    write_reircoco(three_photos(folder), folder / "val.json")
    return ["--annotations", str(folder / "val.json"), "--images", str(folder)]


def test_a_checkpoint_that_is_none(tmp_path: Path) -> None:
    result = run("reir", *annotated(tmp_path), "--checkpoint", str(tmp_path))
    assert isinstance(result.exception, CheckpointError)


def test_reir_prints_json_and_table(tmp_path: Path, fake_model: None) -> None:
    common = ["reir", *annotated(tmp_path)]
    printed = run(*common, "--json")
    assert printed.exit_code == 0, printed.output
    report = json.loads(printed.stdout)
    assert report["br1_50"] == 75
    assert {f"br{k}_{t}" for k in (1, 5, 10) for t in (50, 70, 90)} <= report.keys()
    limited = json.loads(run(*common, "--json", "--limit", "1").stdout)
    assert limited["counts"]["photos"] == 1
    assert "image recall" in run(*common).stdout
    assert run(*common, "--limit", "0").exit_code == 2


def test_rec_prints_json_and_table(tmp_path: Path, fake_model: None) -> None:
    common = ["rec", *annotated(tmp_path)]
    report = json.loads(run(*common, "--json").stdout)
    assert report["splits"]["val"]["query_free"]["p50"] == 75
    limited = json.loads(run(*common, "--json", "--limit", "1").stdout)
    assert limited["splits"]["val"]["expressions"] == 2
    assert "mean IoU" in run(*common).stdout


def test_tir_takes_captions_expressions_or_captions_of_some_photos(
    tmp_path: Path, fake_model: None
) -> None:
    common = annotated(tmp_path)
    assert json.loads(run("tir", *common, "--json").stdout)["counts"]["texts"] == 4
    size = {"width": 160, "height": 120}
    document = {
        "images": [{"id": name, "file_name": name, **size} for name in ("0.png", "1.png")],
        "annotations": [
            {"id": 1, "image_id": "0.png", "caption": "red beside blue"},
            {"id": 2, "image_id": "1.png", "caption": "green"},
            {"id": 3, "image_id": "1.png", "caption": "green and yellow"},
        ],
    }
    (tmp_path / "captions.json").write_text(json.dumps(document))
    captions = ["--captions", str(tmp_path / "captions.json")]
    report = json.loads(run("tir", *captions, "--images", str(tmp_path), "--json").stdout)
    assert (report["counts"]["photos"], report["counts"]["texts"]) == (2, 3)
    assert report["best_instance"]["r1"] == 100
    both = json.loads(run("tir", *common, *captions, "--limit", "1", "--json").stdout)
    assert (both["counts"]["photos"], both["counts"]["texts"]) == (1, 1)
    assert "by the vector of the photo" in run("tir", *common).stdout
    nothing = run("tir", "--images", str(tmp_path))
    assert isinstance(nothing.exception, ConfigError)
    assert "give --captions, --annotations or both" in str(nothing.exception)


def test_probes_print_json_and_table(tmp_path: Path, fake_model: None) -> None:
    common = ["probes", *annotated(tmp_path)]
    printed = run(*common, "--json")
    assert printed.exit_code == 0, printed.output
    assert json.loads(printed.stdout)["probes"] == {"color": 4, "side": 1}
    assert "passes 50 %" in run(*common).stdout


def test_resedis_reads_a_folder_and_prints_json_and_table(tmp_path: Path, fake_model: None) -> None:
    annotations = tmp_path / "annotations"
    annotations.mkdir()
    for number, color in enumerate(("red", "blue")):
        image = draw_scene((160, 120), [(color, (40, 20, 100, 80))])
        Image.fromarray(image).save(tmp_path / f"{number:012}.jpg")
        square = [[40, 20, 100, 20, 100, 80, 40, 80]]
        document = {"image_id": number, "target_annotation": {"0": square}, "category": "box"}
        text = json.dumps(document | {"expression": color})
        (annotations / f"{number}.json").write_text(text)
    common = ["resedis", "--annotations", str(annotations), "--images", str(tmp_path)]
    printed = run(*common, "--json")
    assert printed.exit_code == 0, printed.output
    report = json.loads(printed.stdout)
    assert report["retrieval"]["r1"] == report["box"]["joint1"] == 100
    assert report["decision"] is None
    save_calibration(tmp_path, fake_calibration())
    shown = run(*common, "--checkpoint", str(tmp_path)).stdout
    assert "false alarms per expression" in shown
    assert "right photo and box" in shown


def one_sorec_photo(folder: Path, *more: dict[str, Any]) -> list[str]:
    """Write annotations of a drawn photo, and maybe of others, which are missing."""
    shapes = [("red", (40, 20, 100, 80)), ("blue", (900, 20, 960, 80))]
    image = draw_scene((1700, 200), [*shapes, ("green", (1000, 20, 1600, 180))])
    Image.fromarray(image).save(folder / "10849.jpg", quality=95)
    entries = [
        {"image": "10849.jpg", "bbox": [40, 20, 60, 60], "ref": "red", "id": 1},
        {"image": "10849.jpg", "bbox": [900, 20, 60, 60], "ref": "green", "id": 2},
    ]
    (folder / "testA.json").write_text(json.dumps([*entries, *more]))
    return ["--annotations", str(folder / "testA.json"), "--images", str(folder)]


def test_sorec_reads_a_split_and_prints_json_and_table(tmp_path: Path, fake_model: None) -> None:
    missing = {"image": "10850.jpg", "bbox": [40, 20, 60, 60], "ref": "red", "id": 3}
    common = ["sorec", *one_sorec_photo(tmp_path, missing)]
    refused = run(*common)
    assert isinstance(refused.exception, DataError)
    assert "1 of 2 photos" in str(refused.exception)
    common.append("--skip-missing")
    report = json.loads(run(*common, "--json").stdout)
    assert report["counts"]["expressions"] == 2
    assert report["accuracy"]["acc50"] == 50
    assert report["top_k"]["top10_50"] == 100
    tiled = json.loads(run(*common, "--large-photos", "tiles", "--json").stdout)
    assert "tile_above_px" not in report["settings"]
    assert tiled["settings"]["tile_above_px"] == 1600
    assert tiled["settings"]["num_candidates"] == 4 * report["settings"]["num_candidates"]
    shown = run(*common, "--large-photos", "zoom").stdout
    assert "Acc75" in shown
    assert "above 1,600 px were also encoded in parts" in shown


def save_items(folder: Path, *, split: str) -> list[str]:
    """Write three photos under ReferIt's names, and their expressions as SimREC has them."""
    dataset = three_photos(folder)
    items = []
    for number, text in enumerate(dataset.expressions):
        assert text.instance_id
        photo = Path(text.image_id)
        if (folder / photo).exists():
            (folder / photo).rename(folder / f"{photo.stem}.jpg")
        x1, y1, x2, y2 = dataset.instances_by_id[text.instance_id].box_xyxy_px
        box = [x1, y1, x2 - x1, y2 - y1]
        items.append({"iid": int(photo.stem), "bbox": box, "refs": [text.text], "mask_id": number})
    (folder / "refclef.json").write_text(json.dumps({"train": items[:1], split: items}))
    return ["--annotations", str(folder / "refclef.json"), "--images", str(folder)]


def test_rec_reads_simrec_and_prints_published_figures_of_models_without_boxes(
    tmp_path: Path, fake_model: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reir.evaluate.published.REC_SPLITS", {(2, 4): "RefCOCO testB"})
    common = ["rec", *save_items(tmp_path, split="testB")]
    report = json.loads(run(*common, "--json").stdout)
    assert report["splits"].keys() == {"testB"}
    assert report["splits"]["testB"]["query_free"]["p50"] == 75
    assert report["published_weak"]["rows"]["RefCLIP"]["RefCOCO testB"] == 57.13
    shown = run(*common).stdout
    assert "RefCLIP, then TransVG" in shown
    refused = run("reir", *common[1:])
    assert isinstance(refused.exception, DataError)
    assert "`reir eval rec`" in str(refused.exception)


def test_rec_reads_a_list_of_photos_sentences_and_boxes(tmp_path: Path, fake_model: None) -> None:
    dataset = three_photos(tmp_path)
    lines = ["photo;sentence;x1;y1;x2;y2"]
    for text in dataset.expressions:
        assert text.instance_id
        box = dataset.instances_by_id[text.instance_id].box_xyxy_px
        lines.append(";".join(map(str, (text.image_id, text.text, *box))))
    lines.append("2.png;nobody drew a box for this one;;;;")
    (tmp_path / "pairs.csv").write_text("\n".join(lines))
    data = ["--annotations", str(tmp_path / "pairs.csv"), "--images", str(tmp_path)]
    figures = json.loads(run("rec", *data, "--json").stdout)["splits"]["pairs"]
    assert (figures["expressions"], figures["query_free"]["p50"]) == (4, 75)


@pytest.mark.parametrize("task", ["rec", "sorec"])
def test_a_localizer_is_evaluated_instead_of_an_encoder(
    tmp_path: Path, fake_model: None, monkeypatch: pytest.MonkeyPatch, task: str
) -> None:
    monkeypatch.setattr("reir.models.localizers.KINDS", {"fake": lambda _: FakeLocalizer()})
    data = one_sorec_photo(tmp_path) if task == "sorec" else annotated(tmp_path)
    common = [task, *data, "--localizer", "fake:x"]
    printed = run(*common, "--work", str(tmp_path / "work"), "--json")
    assert printed.exit_code == 0, printed.output
    report = json.loads(printed.stdout)
    right = report["accuracy"] if task == "sorec" else report["splits"]["val"]["by_expression"]
    assert right["acc50" if task == "sorec" else "p50"] == (50 if task == "sorec" else 75)
    assert report["digest"] == FakeLocalizer().digest
    shown = run(*common).stdout
    assert f"localizer {report['digest'][:12]}" in " ".join(shown.split())
    for option in (["--encoder", "clare-nano"], ["--num-workers", "2"]):
        refused = run(*common, *option)
        assert isinstance(refused.exception, ConfigError)
        assert f"{option[0]} is for encoders" in str(refused.exception)


def test_a_folder_with_splits(tmp_path: Path, fake_model: None) -> None:
    save_scenes(tmp_path, {"train": make_scenes(4, 1), "val": make_scenes(2, 2)})
    common = ["--annotations", str(tmp_path), "--images", str(tmp_path / "images"), "--json"]
    assert json.loads(run("reir", *common).stdout)["counts"]["photos"] == 2
    assert json.loads(run("reir", *common, "--split", "train").stdout)["counts"]["photos"] == 4
    names = json.loads(run("rec", *common).stdout)["splits"]
    assert {name.split()[0] for name in names} == {"val"}
    every = json.loads(run("rec", *common, "--split", "train", "--split", "val").stdout)["splits"]
    assert {name.split()[0] for name in every} == {"train", "val"}


def test_one_split_must_be_named_where_there_are_several(tmp_path: Path) -> None:
    save_scenes(tmp_path, {"testA": make_scenes(1, 1), "testB": make_scenes(1, 2)})
    result = run("reir", "--annotations", str(tmp_path), "--images", str(tmp_path / "images"))
    assert isinstance(result.exception, DataError)
    assert "has splits testA, testB; choose one with --split" in str(result.exception)


def test_work_is_kept_and_taken_up(tmp_path: Path, fake_model: None) -> None:
    common = ["reir", *annotated(tmp_path), "--work", str(tmp_path / "work"), "--json"]
    first = run(*common)
    assert len(list((tmp_path / "work").glob("*/00000.npz"))) == 1
    assert run(*common).stdout == first.stdout


def test_ctrl_c_says_what_is_kept(
    tmp_path: Path, fake_model: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("reir.evaluate.evaluate_reir", stop)
    common = ["reir", *annotated(tmp_path)]
    assert "with --work DIR, an interrupted run can be continued" in run(*common).stderr
    shown = " ".join(run(*common, "--work", str(tmp_path / "w")).stderr.split())
    assert "run the same command to continue" in shown


# --------------------------------------------------------------------------------------- workers


def offer_workers(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """Offer a runner that keeps its options in the returned list."""
    seen: list[dict[str, object]] = []

    def offer(load: Callable[[], InstanceEncoder], **options: object) -> object:
        def run_shards(shards: Iterable[Shard]) -> Iterator[tuple[int, EncodedShard]]:
            seen.append(options)
            # Sent to another process, as Ray does.
            encoder = pickle.loads(pickle.dumps(load))()
            for shard in shards:
                yield shard.number, encode_shard(encoder, shard)

        return run_shards

    class Entry:
        def load(self) -> object:
            return offer

    monkeypatch.setattr(evaluated_model, "entry_points", lambda **_: [Entry()])
    return seen


def test_workers_encode_parts_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = FakeEncoder(num_candidates=1)
    monkeypatch.setattr("reir.checkpoint.load_encoder", lambda _path: encoder)
    seen = offer_workers(monkeypatch)
    common = ["sorec", *one_sorec_photo(tmp_path), "--large-photos", "tiles", "--json"]
    two = json.loads(run(*common, "--num-workers", "2").stdout)
    assert len(seen) == 1
    assert two == json.loads(run(*common).stdout)
    whole = json.loads(run(*common, "--large-photos", "whole").stdout)
    # The photo as a whole has room for the largest shape only.
    assert two["counts"]["instances"] > whole["counts"]["instances"] == 1


def test_workers_come_from_the_app_that_offers_them(
    tmp_path: Path, fake_model: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = offer_workers(monkeypatch)
    common = ["reir", *annotated(tmp_path), "--json"]
    two = run(*common, "--num-workers", "2", "--gpu", "--threads", "3")
    assert two.exit_code == 0, two.output
    assert seen == [{"num_workers": 2, "use_gpu": True, "threads": 3}]
    here = run(*common, "--threads", "3")
    assert json.loads(two.stdout) == json.loads(here.stdout)


def test_workers_without_the_app(
    tmp_path: Path, fake_model: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluated_model, "entry_points", lambda **_: [])
    result = run("reir", *annotated(tmp_path), "--num-workers", "2")
    assert isinstance(result.exception, ConfigError)
    assert "pip install 'reir-platform[ingestion]'" in str(result.exception)


def test_gpu_is_of_workers(tmp_path: Path) -> None:
    result = run("rec", *annotated(tmp_path), "--gpu")
    assert isinstance(result.exception, ConfigError)
    assert "--gpu gives each Ray worker a GPU" in str(result.exception)


def test_the_declared_runner_is_there() -> None:
    pytest.importorskip("ray")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = project["entry-points"][evaluated_model.RUNNERS]
    entry = EntryPoint("ray", declared["ray"], evaluated_model.RUNNERS)
    assert callable(getattr(import_module(entry.module), entry.attr))
