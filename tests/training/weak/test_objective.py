"""The losses of a step: their sum, what they depend on, and what they must not depend on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from reir.losses import anchor_contrast, equivariance, false_negative_suppression
from reir.models.weak_rec.model import WeakRec
from reir_testing.tiny import tiny_batch
from reir_testing.training.tiny_weak import (
    MODELS,
    WeakForm,
    tiny_weak_settings,
    tiny_weak_task,
    write_weak_files,
)
from reir_testing.weak.tiny import SENTENCES, make_random, tiny_weak_rec
from reir_training.run.schedule import Epoch
from reir_training.weak.config import WeakLossWeights
from reir_training.weak.data import WeakBatch
from reir_training.weak.objective import WeakObjective

ALL = WeakLossWeights(contrast=2.0, suppression=0.5, equivariance=0.25)


def model_of(**changes: Any) -> WeakRec:
    model = tiny_weak_rec(attention=True, **changes)
    make_random(model)
    return model


def batch_of(model: WeakRec, *, photos: tuple[int, ...] = (0, 1, 2, 3)) -> WeakBatch:
    """A batch of four items with three sentences; some photos have padding."""
    found = tiny_batch(4, 6)
    found.valid[1, 2:] = False
    loaded = model.language.load(SENTENCES)
    sentences = torch.stack([loaded, loaded[[1, 1, 3, 0]], loaded[[2, 3, 0, 1]]])
    return WeakBatch(found.tensors(), torch.tensor(photos), sentences)


def run(model: WeakRec, batch: WeakBatch, weights: WeakLossWeights = ALL) -> Any:
    return WeakObjective(model, weights, workers=None)(batch, "grounding")


def slow_terms(model: WeakRec, batch: WeakBatch, same: Tensor | None) -> dict[str, list[float]]:
    """Each loss of each sentence. The first sentence alone changes the anchors."""
    found = model.anchors(batch.inputs)
    anchors = model.encode_anchors(found, model.encode_sentences(batch.sentences[0]))
    terms: dict[str, list[float]] = {"contrast": [], "suppression": [], "equivariance": []}
    for loaded in batch.sentences:
        args = model.encode_sentences(loaded).vectors, anchors, found.valid
        terms["contrast"].append(anchor_contrast(*args, same).item())
        terms["suppression"].append(false_negative_suppression(*args).item())
        terms["equivariance"].append(equivariance(*args).item())
    return terms


def test_the_loss_is_the_weighted_sum_of_the_means_over_sentences() -> None:
    model = model_of()
    batch = batch_of(model)
    total, terms = run(model, batch)
    slow = slow_terms(model, batch, None)
    assert terms.keys() == slow.keys()
    for name, values in slow.items():
        assert len(set(values)) == 3
        assert terms[name] == pytest.approx(sum(values) / 3, rel=1e-5)
    weights = ALL.model_dump()
    assert total.item() == pytest.approx(sum(weights[n] * v for n, v in terms.items()), rel=1e-5)


def test_terms_without_weight_are_not_computed() -> None:
    model = model_of()
    batch = batch_of(model)
    total, terms = run(model, batch, WeakLossWeights())
    assert list(terms) == ["contrast"]
    assert total.item() == pytest.approx(terms["contrast"])
    assert list(run(model, batch, WeakLossWeights(equivariance=1))[1]) == [
        "contrast",
        "equivariance",
    ]


@pytest.mark.parametrize("paper_parity", [False, True])
def test_items_of_one_photo_are_negatives_in_the_released_code_only(paper_parity: bool) -> None:
    model = model_of(paper_parity=paper_parity)
    batch = batch_of(model, photos=(0, 1, 0, 3))
    same = batch.photos[:, None] == batch.photos
    apart, together = (sum(slow_terms(model, batch, each)["contrast"]) / 3 for each in (None, same))
    assert apart > together + 1e-3
    expected = apart if paper_parity else together
    assert run(model, batch)[1]["contrast"] == pytest.approx(expected, rel=1e-5)


def test_everything_that_is_trained_has_a_gradient() -> None:
    model = model_of().train()
    run(model, batch_of(model))[0].backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


# ---------------------------------------------------------------------------------- without boxes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weak") / "files"
    write_weak_files(folder)
    return folder


def with_wrong_boxes(photos: Path, kind: str) -> Path:
    """Copy a folder of photos, with other boxes in all of its annotations."""
    copy = photos.with_name(f"photos-{kind}")
    shutil.copytree(photos, copy, dirs_exist_ok=True)
    rng = np.random.default_rng(0)
    instances, expressions = (
        json.loads((copy / name).read_text()) for name in ("instances.json", "expressions.json")
    )
    boxes = {}
    for entry in instances["annotations"]:
        x, y, width, height = rng.uniform((0, 0, 5, 5), (40, 40, 50, 50)).tolist()
        entry["bbox"] = [1, 1, 2, 2] if kind == "all alike" else [x, y, width, height]
        boxes[entry["id"]] = entry["bbox"]
        entry.pop("segmentation", None)
    for entry in expressions["expressions"]:
        entry["bbox"] = boxes[entry["ann_id"]]
    (copy / "instances.json").write_text(json.dumps(instances))
    (copy / "expressions.json").write_text(json.dumps(expressions))
    return copy


def step_of(folder: Path, photos: Path, form: WeakForm) -> dict[str, Tensor]:
    """The losses of two steps and their gradients, by name, of a training on some photos."""
    settings = tiny_weak_settings(folder, form)
    settings["data"] = [{"format": "photos", "path": str(photos)}]
    # The same files, so that only annotations differ.
    settings["data"][0]["images"] = str(folder / "photos" / "images")
    task = tiny_weak_task(folder, settings)
    make_random(task.model)
    task.objective.train()
    found: dict[str, Tensor] = {}
    for number, batch in enumerate(list(task.batches(Epoch(0, "grounding", 0, 1), 0))[:2]):
        torch.manual_seed(number)
        loss, _ = task.objective(batch, "grounding")
        loss.backward()
        found[f"loss {number}"] = loss.detach()
    for name, parameter in task.objective.named_parameters():
        if parameter.grad is not None:
            found[name] = parameter.grad
    return found


@pytest.mark.parametrize("form", MODELS)
def test_wrong_boxes_give_the_same_losses_and_gradients_to_the_last_bit(
    folder: Path, form: WeakForm
) -> None:
    true = step_of(folder, folder / "photos", form)
    assert sum(name.startswith("loss") for name in true) == 2
    assert all(value.abs().max() > 0 for name, value in true.items() if name.startswith("loss"))
    for kind in ("random", "all alike"):
        wrong = step_of(folder, with_wrong_boxes(folder / "photos", kind), form)
        assert wrong.keys() == true.keys()
        for name, value in true.items():
            assert torch.equal(wrong[name], value), name


def test_other_sentences_give_other_losses(folder: Path) -> None:
    """The test above would be worthless if the annotations were not read."""
    copy = with_wrong_boxes(folder / "photos", "random")
    document = json.loads((copy / "expressions.json").read_text())
    texts = [entry["expression"] for entry in document["expressions"]]
    for entry, text in zip(document["expressions"], texts[::-1], strict=True):
        entry["expression"] = text
    (copy / "expressions.json").write_text(json.dumps(document))
    true, other = (step_of(folder, each, "weak-yolov3") for each in (folder / "photos", copy))
    assert not torch.equal(true["loss 0"], other["loss 0"])
