"""The training task of the weakly supervised model, on tiny photos."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from reir.config import load_config
from reir.errors import CheckpointError, ConfigError, ImageError
from reir.images.decode import read_image
from reir.losses import pairwise_iou
from reir.models.localizers import load_localizer_spec
from reir.models.weak_rec.anchors import LEAST_DEVIATION
from reir.models.weak_rec.checkpoint import load_weak_rec
from reir.models.weak_rec.vocabulary import UNK
from reir_testing.tiny import tiny_batch
from reir_testing.training.tiny_weak import (
    MODELS,
    NUM_TRAIN,
    NUM_VAL,
    WeakForm,
    init_of,
    tiny_weak_settings,
    tiny_weak_task,
    write_weak_files,
)
from reir_testing.weak.tiny import make_random, tiny_weak_rec
from reir_training.run.schedule import Epoch, check_stage
from reir_training.run.step_stream import load_in_process
from reir_training.weak.config import WeakTrainConfig
from reir_training.weak.data import KnownSentence, WeakBatch
from reir_training.weak.start import start_weak_rec
from reir_training.weak.task import PhotoFiles, WeakTask, localization_accuracy

EPOCH = Epoch(0, "grounding", 0, 2)
every_form = pytest.mark.parametrize("form", MODELS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weak") / "files"
    write_weak_files(folder)
    return folder


def make(folder: Path, form: WeakForm, **changes: Any) -> WeakTask:
    return tiny_weak_task(folder, tiny_weak_settings(folder, form) | changes)


@every_form
def test_a_step_changes_exactly_what_is_trained(folder: Path, form: WeakForm) -> None:
    task = make(folder, form)
    make_random(task.model)
    before = {name: p.detach().clone() for name, p in task.model.named_parameters()}
    (group,) = task.groups()
    assert group["lr"] == group["base_lr"] == task._config.optimization.learning_rate
    optimizer = torch.optim.AdamW(task.groups())
    task.objective.train()
    for batch in list(task.batches(EPOCH, 0))[:2]:
        loss, _ = task.objective(batch, "grounding")
        assert torch.isfinite(loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    trained = {name for name, p in task.model.named_parameters() if p.requires_grad}
    changed = {
        name for name, p in task.model.named_parameters() if not torch.equal(p, before[name])
    }
    assert changed == trained
    parts = {"weak-candidates": ("project_",), "weak-yolov3": ("source.fusion", "language", "att")}
    assert all(any(name.startswith(part) for name in changed) for part in parts[form])


@every_form
def test_every_start_has_the_same_weights(folder: Path, form: WeakForm) -> None:
    torch.manual_seed(5)
    first = make(folder, form).model.state_dict()
    torch.manual_seed(6)
    again = make(folder, form).model.state_dict()
    for name, value in first.items():
        assert torch.equal(again[name], value), name


@every_form
def test_batches_have_items_of_all_photos(folder: Path, form: WeakForm) -> None:
    task = make(folder, form)
    about = task.about()
    assert (about["photos"], about["held_out_photos"]) == (NUM_TRAIN, NUM_VAL)
    steps = task.steps("grounding")
    assert steps == -(-about["items"] // task.photos_per_step)
    batches = list(task.batches(EPOCH, 0))
    assert len(batches) == steps
    assert {int(p) for batch in batches for p in batch.photos} == set(range(NUM_TRAIN))
    resumed = list(task.batches(EPOCH, 1))
    assert len(resumed) == steps - 1
    assert torch.equal(resumed[0].sentences, batches[1].sentences)


def test_features_are_standardized_over_the_training_photos(folder: Path) -> None:
    model: Any = make(folder, "weak-candidates").model
    task = make(folder, "weak-candidates")
    found = model.source(task.inputs(range(NUM_TRAIN)))
    features = found.features[found.valid]
    varies = model.source.standardize.deviation > LEAST_DEVIATION
    assert varies.sum() > 1000
    torch.testing.assert_close(features.mean(0), torch.zeros(model.source.width), atol=1e-3, rtol=0)
    torch.testing.assert_close(features.std(0)[varies], torch.ones(int(varies.sum())))
    texts = model.language(model.language.load(task._photos.sentences))
    torch.testing.assert_close(texts.mean(0), torch.zeros(model.language.width), atol=1e-3, rtol=0)


def test_loading_ahead_needs_no_weights(folder: Path) -> None:
    """What is sent to the processes that load steps must not contain the model."""
    sizes: list[int] = []

    def spy(load: Callable[[int], Any], first: int, last: int) -> Iterator[Any]:
        sizes.append(len(pickle.dumps(load)))
        return load_in_process(load, first, last)

    config = WeakTrainConfig.model_validate(tiny_weak_settings(folder, "weak-yolov3"))
    task = WeakTask(config, init=None, cache=None, stream=spy)
    batch = next(iter(task.batches(EPOCH, 0)))
    assert isinstance(batch, WeakBatch)
    weights = sum(p.nbytes for p in task.model.parameters())
    assert len(sizes) == 1
    assert sizes[0] < 100_000 < weights


def test_a_photo_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "none.jpg").write_bytes(b"no photo")
    with pytest.raises(ImageError, match="not_an_image"):
        PhotoFiles([tmp_path / "none.jpg"])([0])


# ------------------------------------------------------------------------------------- validation


@every_form
def test_figures_are_those_of_the_checkpoint_as_a_localizer(
    folder: Path, tmp_path: Path, form: WeakForm
) -> None:
    task = make(folder, form)
    make_random(task.model)
    task.objective.train()
    figures = task.validate()
    assert task.model.training
    about = {
        "steps": 1,
        "hours": 0.1,
        "metrics": figures,
        "settings": task._config.model_dump(mode="json"),
    }
    task.save(tmp_path, {**task.about(), **about})
    localizer, hits = load_localizer_spec(f"weak:{tmp_path}"), list[bool]()
    known = task._photos.known()
    photos = {row: read_image(photo.path) for row, photo in enumerate(task._photos.files)}
    found = localizer.localize([photos[k.photo] for k in known], [k.text for k in known])
    for each, boxes in zip(known, found, strict=True):
        best = torch.from_numpy(boxes.boxes[:1])
        hits.append(bool(pairwise_iou(best, torch.from_numpy(each.box[None])) > 0.5))
    assert {name.split("_")[0] for name in figures} == {"p50"}
    # The localizer has frozen parts in half precision, so a box may just miss.
    assert figures["p50"] == pytest.approx(100 * np.mean(hits), abs=100 * 3 / len(hits))
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("# weak-rec")
    assert f"| p50 | {figures['p50']} |" in card
    loaded, live = load_weak_rec(tmp_path).state_dict(), task.model.state_dict()
    trained = {name for name, p in task.model.named_parameters() if p.requires_grad}
    for name in trained:
        assert torch.equal(loaded[name], live[name])


def known(box: tuple[float, ...], kind: str) -> KnownSentence:
    return KnownSentence(0, "the red dog", np.array(box, np.float32), kind)


def test_an_iou_of_one_half_is_a_miss() -> None:
    model = tiny_weak_rec(num_anchors=1)
    found = tiny_batch(1, 1)
    found = replace(found, boxes=torch.tensor([[[0.0, 0.0, 0.5, 0.5]]]))

    def accuracy(*sentences: KnownSentence) -> dict[str, float]:
        return localization_accuracy(
            model, sentences, lambda rows: {k: v[rows] for k, v in found.tensors().items()}
        )

    half, more = (0, 0, 0.5, 1.0), (0, 0, 0.5, 0.9)
    assert accuracy(known(half, "long")) == {"p50": 0, "p50_long": 0}
    assert accuracy(known(more, "long")) == {"p50": 100, "p50_long": 100}
    mixed = accuracy(known(half, "short"), known(more, "short"), known(more, "long"))
    assert mixed == {"p50": 66.67, "p50_short": 50, "p50_long": 100}
    assert accuracy() == {}


# --------------------------------------------------------------------------------------- settings


def start(folder: Path, form: WeakForm, init: Path | None, **changes: Any) -> object:
    settings = tiny_weak_settings(folder, form) | changes
    return start_weak_rec(WeakTrainConfig.model_validate(settings), init)


def test_missing_parts_are_named_with_what_to_do(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"anchors: candidates .* --init, or set `weights`"):
        start(folder, "weak-candidates", None)
    with pytest.raises(ConfigError, match="set `yolov3` to the file"):
        start(folder, "weak-yolov3", None, yolov3=None)
    with pytest.raises(ConfigError, match="set `word_vectors` to a text file"):
        start(folder, "weak-yolov3", None, word_vectors=None)
    gone = tmp_path / "gone"
    with pytest.raises(CheckpointError, match="gone"):
        start(folder, "weak-candidates", gone)
    with pytest.raises(CheckpointError, match="gone"):
        start(folder, "weak-candidates", None, weights=gone)
    with pytest.raises(CheckpointError, match=r"no weights of YOLOv3 at .*gone"):
        start(folder, "weak-yolov3", None, yolov3=gone)
    with pytest.raises(CheckpointError, match=r"cannot read word vectors from .*gone"):
        start(folder, "weak-yolov3", None, word_vectors=gone)


def test_the_published_form_needs_no_clare_nano(folder: Path) -> None:
    start(folder, "weak-yolov3", None)
    model: Any = start(folder, "weak-candidates", init_of(folder))
    assert model.source.width > 0


def test_words_of_all_splits_are_known(folder: Path) -> None:
    data = [{"format": "photos", "path": str(folder / "photos"), "test": NUM_TRAIN - 1}]
    model: Any = start(folder, "weak-yolov3", None, data=data)
    document = json.loads((folder / "photos" / "expressions.json").read_text())
    texts = [entry["expression"] for entry in document["expressions"]]
    assert UNK not in model.language.load(texts)
    assert UNK in model.language.load(["unheard"])


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"best_by": "br1_50"}, "p50, p50_long, p50_short"),
        ({"sentences_per_item": 0}, "sentences_per_item"),
        ({"loss": {"contrast": 0}}, "contrast"),
        ({"loss": {"suppresion": 0.1}}, "suppresion"),
        ({"model": {"anchors": "yolov3"}}, "set class_weight: 0"),
        ({"optimization": {"clia_epochs": 1}}, "clia_epochs"),
        ({"optimization": {"photos_per_batch": 1}}, "photos_per_batch"),
        ({"optimization": {"precision": "bf16"}}, "precision"),
        ({"data": []}, "data"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict[str, Any], named: str) -> None:
    data = [{"format": "sentences", "path": "photos"}]
    with pytest.raises(ConfigError, match=named):
        load_config(WeakTrainConfig, {"data": data} | changes)


def test_there_is_one_stage() -> None:
    check_stage("weak-rec", "all", None)
    check_stage("weak-rec", "grounding", Path("runs/nano/checkpoint"))
    with pytest.raises(ConfigError, match="single stage, grounding: remove --stage clia"):
        check_stage("weak-rec", "clia", None)


def test_a_list_without_boxes_trains_and_has_no_figures(folder: Path, tmp_path: Path) -> None:
    document = json.loads((folder / "photos" / "expressions.json").read_text())
    names = {
        image["id"]: image["file_name"]
        for image in json.loads((folder / "photos" / "instances.json").read_text())["images"]
    }
    rows = [
        f'{names[entry["image_id"]]},"{entry["expression"]}"' for entry in document["expressions"]
    ]
    (tmp_path / "sentences.csv").write_text("\n".join(["photo,sentence", *rows]))
    images = str(folder / "photos" / "images")
    data = [{"format": "sentences", "path": str(tmp_path), "images": images, "held_out": 2}]
    task = make(folder, "weak-yolov3", data=data)
    assert task.about()["items"] == task.about()["expressions"] > 0
    assert task.validate() == {}
    about = {"steps": 1, "hours": 0.1, "settings": task._config.model_dump(mode="json")}
    task.save(tmp_path / "checkpoint", {**task.about(), **about, "metrics": {}})
    assert "Held-out photos" not in (tmp_path / "checkpoint" / "README.md").read_text()
    loss, _ = task.objective(next(iter(task.batches(EPOCH, 0))), "grounding")
    assert torch.isfinite(loss)
