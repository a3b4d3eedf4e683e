"""A whole fine-tune with a tiny model: its parts, its results, and what a rerun repeats."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console

import reir
from reir.checkpoint import (
    load_color_reader,
    load_encoder,
    load_model,
    save_checkpoint,
    save_color_head,
    weights_digest,
)
from reir.datasets import read_reircoco, write_photo_sentences
from reir.errors import ConfigError, DataError
from reir.images.boxes import elementwise_iou
from reir.images.decode import canonical_uri
from reir.models.nano.color_reader import color_head_for
from reir.operations.canary import read_canaries
from reir.operations.feedback.records import user_of
from reir.query.presence import FILE as CALIBRATION
from reir.store import InstanceStore, VersionSpec
from reir.store.memory import MemoryStore
from reir_testing.feedback.simulated_users import (
    record_feedback,
    simulate_feedback,
    users_with_hostile,
)
from reir_testing.scenes import to_dataset
from reir_testing.tiny import tiny_model, tiny_tokenizer
from reir_testing.toys.scenes import make_toy_scenes, render_toys
from reir_testing.training.in_process import train_in_process
from reir_training.config import DataSource
from reir_training.finetune import run as finetune_run
from reir_training.finetune.blend import ShareChoice
from reir_training.finetune.feedback_pairs import feedback_pairs
from reir_training.finetune.final import BlendedModels
from reir_training.finetune.pairs import read_pairs
from reir_training.finetune.recipe import tune_settings
from reir_training.finetune.remembered import RememberedSet
from reir_training.finetune.report import MIN_HELD_OUT, FinetuneReport
from reir_training.finetune.run import Finetune, FinetuneOptions, Progress
from reir_training.finetune.start import start_model_of
from reir_training.pseudo_labels.agreement import AgreementFilter

GALLERY = "toys"
NUM_PHOTOS = 14


class Trainer:
    """Trains in this process, and notes what was trained; `stops_at` names a preset to stop at."""

    def __init__(self, stops_at: str = "") -> None:
        self.trained: list[str] = []
        self.stops_at = stops_at

    def __call__(self, preset: str, config: Any, **arguments: Any) -> Path:
        if preset == self.stops_at:
            raise KeyboardInterrupt
        self.trained.append(preset)
        return train_in_process(preset, config, **arguments)


@contextmanager
def quiet(_: str) -> Iterator[Progress]:
    yield lambda _done, _total: None


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> tuple[InstanceStore, Path]:
    """A gallery of toys, indexed with a tiny checkpoint, and a folder with a list of sentences."""
    folder = tmp_path_factory.mktemp("toys")
    model = tiny_model(num_candidates=12)
    save_checkpoint(folder / "start", model, tiny_tokenizer(), {})
    save_color_head(folder / "start", color_head_for(model, {"width": 32}), {})
    # Only whether it exists counts: the new checkpoint is to have one as well.
    (folder / "start" / CALIBRATION).write_text("{}")
    scenes = make_toy_scenes(NUM_PHOTOS, 3, 160)
    (folder / "photos").mkdir()
    for scene in scenes:
        Image.fromarray(render_toys(scene)).save(folder / "photos" / scene.file_name)
    dataset = to_dataset(scenes, per_instance=1)
    write_photo_sentences(dataset, folder / "boxes.jsonl")
    bare = dataset.with_expressions(replace(e, instance_id=None) for e in dataset.expressions)
    write_photo_sentences(bare, folder / "pairs.jsonl")
    store = MemoryStore()
    reir.index(
        folder / "photos",
        gallery=GALLERY,
        store=store,
        checkpoint=folder / "start",
        progress=False,
    )
    return store, folder


def finetune(
    store: tuple[InstanceStore, Path], output: Path, sentences: str, trainer: Trainer
) -> Finetune:
    opened, folder = store
    scenes = make_toy_scenes(3, 9, 160)
    (output / "old").mkdir(parents=True, exist_ok=True)
    for scene in scenes:
        Image.fromarray(render_toys(scene)).save(output / "old" / scene.file_name)
    return Finetune(
        gallery=GALLERY,
        start=start_model_of(opened, GALLERY),
        pairs=read_pairs(opened, GALLERY, folder / sentences),
        output=output / "out",
        options=FinetuneOptions(epochs=1),
        remembered=RememberedSet("three scenes", to_dataset(scenes), output / "old"),
        show=quiet,
        trainer=trainer,
    )


def test_sentences_alone_give_a_checkpoint_canaries_and_a_report(
    store: tuple[InstanceStore, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A model as tiny as this one finds anything in the mirrored photo, so all boxes are kept.
    monkeypatch.setattr(finetune_run, "AgreementFilter", partial(AgreementFilter, min_iou=0.0))
    # A first run is interrupted; the second one repeats only what was not finished.
    interrupted, trainer = Trainer(stops_at="clare-nano"), Trainer()
    with pytest.raises(KeyboardInterrupt):
        finetune(store, tmp_path, "pairs.jsonl", interrupted).run()
    assert interrupted.trained == ["weak-rec"]
    run = finetune(store, tmp_path, "pairs.jsonl", trainer)
    report = run.run()
    assert trainer.trained == ["clare-nano"]
    check_results(run, report)
    check_weights(run, store[1] / "start", report)
    check_all_and_none_of_the_new_weights(run, store[1] / "start", tmp_path)

    # A third run has nothing to do, and another request is refused.
    assert finetune(store, tmp_path, "pairs.jsonl", trainer).run().to_dict() == report.to_dict()
    assert trainer.trained == ["clare-nano"]
    with pytest.raises(ConfigError, match=r"another fine-tune \(epochs differ\)"):
        replace(run, options=FinetuneOptions(epochs=2)).run()
    others = replace(run.remembered, dataset=to_dataset(make_toy_scenes(3, 8, 160)))
    with pytest.raises(ConfigError, match=r"another fine-tune \(remembered differ\)"):
        replace(run, remembered=others).run()


def check_results(run: Finetune, report: FinetuneReport) -> None:
    """Check report, labels and canaries."""
    values = report.to_dict()
    assert json.loads((run.output / "report.json").read_text()) == values
    counts = values["counts"]
    assert counts["photos"] == NUM_PHOTOS
    assert counts["with_box"] == 0
    assert counts["held_out_photos"] == 3
    assert values["held_out"]["sentences"] == counts["held_out_sentences"] > 0
    assert "br1" not in values["held_out"]["after"]
    assert "br1" in values["remembered"]["after"]
    assert values["labels"]["sentences"] == counts["sentences"] - counts["held_out_sentences"]
    assert set(values["minutes"]) == {
        *("before", "weak", "labels", "tuned", "blend", "after", "all")
    }

    # No held-out photo was trained on, and every one of them became canaries.
    held_out = set(run.held_out.images_by_id)
    labeled = read_reircoco(run.output / "labels.json")
    assert not held_out & labeled.images_by_id.keys()
    assert all(each.score is not None for each in labeled.instances)
    canaries = read_canaries(run.output / "canaries.jsonl")
    assert {canary.uri for canary in canaries} == {run.pairs.uris[each] for each in held_out}
    assert len(canaries) == counts["canaries"] == counts["held_out_sentences"]

    # That there are too few photos to calibrate on does not end the fine-tune.
    assert not values["blend"]["calibrated"]
    assert "at least 21 photos with instances, got 2" in values["blend"]["not_calibrated"]
    assert not (run.checkpoint / CALIBRATION).exists()


def check_weights(run: Finetune, start: Path, report: FinetuneReport) -> None:
    """The new checkpoint lies between old and tuned weights; its frozen parts are the old ones."""
    values = report.to_dict()
    share = values["blend"]["share"]
    assert values["blend"]["digest"] == weights_digest(run.checkpoint)
    old, tuned, new = (
        load_model(folder)[0].state_dict()
        for folder in (start, run.output / "tuned" / "checkpoint", run.checkpoint)
    )
    name = "visual.members.0.to_vector.weight"
    assert not torch.equal(tuned[name], old[name])
    # Checkpoints are in half precision, which rounds by more than most weights change here.
    expected = torch.lerp(old[name], tuned[name], share).half().float()
    torch.testing.assert_close(new[name], expected, rtol=1e-3, atol=1e-6)
    assert (new["crop_network.stem.conv.weight"] == old["crop_network.stem.conv.weight"]).all()
    assert load_encoder(run.checkpoint).dim == load_encoder(start).dim
    assert load_color_reader(run.checkpoint)  # or an error, if its inputs had changed
    assert torch.equal(new["bank.vectors"][: len(old["bank.vectors"])], old["bank.vectors"])
    assert len(new["bank.vectors"]) > len(old["bank.vectors"])
    assert f"--checkpoint {run.checkpoint}" in values["command"]
    assert "## Fine-tune" in (run.checkpoint / "README.md").read_text()


def check_all_and_none_of_the_new_weights(run: Finetune, start: Path, tmp_path: Path) -> None:
    """Check that a blend does not depend on the blends that were made before it."""
    data = DataSource(
        format="reircoco", path=run.output, images="photos", annotations="labels.json", held_out=2
    )
    models = BlendedModels(start, run.output / "tuned", tune_settings(data, 1, epochs=1))
    name = "visual.members.0.to_vector.weight"
    for share, expected in ((1.0, run.output / "tuned" / "checkpoint"), (0.0, start)):
        models.save(tmp_path / "blend", ShareChoice(share, {}))
        new, known = (load_model(each)[0].state_dict() for each in (tmp_path / "blend", expected))
        assert torch.equal(new[name], known[name])


@pytest.mark.slow
def test_drawn_boxes_need_no_weak_model(store: tuple[InstanceStore, Path], tmp_path: Path) -> None:
    trainer = Trainer()
    run = finetune(store, tmp_path, "boxes.jsonl", trainer)
    values = run.run().to_dict()
    assert trainer.trained == ["clare-nano"]
    assert "weak" not in values["minutes"]
    assert values["labels"]["drawn"] == values["labels"]["kept"] > 0
    assert values["counts"]["with_box"] == values["counts"]["sentences"]
    assert {"br1", "br5", "br10"} <= values["held_out"]["after"].keys()
    labeled = read_reircoco(run.output / "labels.json")
    assert all(each.score is None for each in labeled.instances)
    assert all(canary.box for canary in read_canaries(run.output / "canaries.jsonl"))


@pytest.mark.slow
def test_feedback_is_learned_from_without_the_hostile_user(
    store: tuple[InstanceStore, Path], tmp_path: Path
) -> None:
    opened, folder = store
    dataset = to_dataset(make_toy_scenes(NUM_PHOTOS, 3, 160), per_instance=1)
    uris = {i.image_id: canonical_uri(folder / "photos" / i.file_name) for i in dataset.images}
    users = users_with_hostile(5, error=0)
    num = 5 * (len(dataset.expressions) * 4 // 5)
    record_feedback(tmp_path / "log", GALLERY, simulate_feedback(dataset, uris, users, num, 0))
    trainer = Trainer()
    run = replace(
        finetune(store, tmp_path, "boxes.jsonl", trainer),
        pairs=feedback_pairs(opened, GALLERY, tmp_path / "log"),
    )
    report = run.run()
    assert trainer.trained == ["clare-nano"]
    values = report.to_dict()
    assert json.loads((run.output / "report.json").read_text()) == values
    found = values["feedback"]
    assert found["feedback"] == num
    assert found["left_out"]["outlier"] == num // 5
    assert found["used"] + sum(found["left_out"].values()) == num
    decisions = {user["user"]: user["decision"] for user in found["users"]}
    assert decisions == {
        user_of(each.name)[:8]: "outlier" if each.name == "hostile" else "kept" for each in users
    }
    assert values["counts"]["with_box"] == values["counts"]["sentences"]
    assert {"br1", "photo_p1"} <= values["held_out"]["gain"].keys()
    assert {"br1", "photo_p1"} <= values["remembered"]["gain"].keys()
    assert all(canary.box for canary in read_canaries(run.output / "canaries.jsonl"))
    # Whatever was learned is right.
    true = {
        each.text: dataset.instances_by_id[each.instance_id or ""] for each in dataset.expressions
    }
    learned = run.pairs.dataset
    for text in learned.expressions:
        box = learned.instances_by_id[text.instance_id or ""].box_xyxy_px
        assert float(elementwise_iou([box], [true[text.text].box_xyxy_px])[0]) > 0.7
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(report.table())
    assert f"Left out: {num // 5} (of users whom the others contradict" in console.export_text()


def test_too_few_held_out_photos_are_told_before_the_training(
    store: tuple[InstanceStore, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = finetune(store, tmp_path, "pairs.jsonl", Trainer())
    assert "the number of held-out photos is 3, and at least 10 are needed to tell" in caplog.text
    caplog.clear()
    replace(run, options=FinetuneOptions(held_out=MIN_HELD_OUT / NUM_PHOTOS))
    assert caplog.text == ""


def test_too_few_photos_are_refused(store: tuple[InstanceStore, Path], tmp_path: Path) -> None:
    run = finetune(store, tmp_path, "pairs.jsonl", Trainer())
    few = run.pairs.dataset.of_images({i.image_id for i in run.pairs.dataset.images[:4]})
    with pytest.raises(DataError, match=r"at least 4 photos are needed to train on.*got 3"):
        replace(run, pairs=replace(run.pairs, dataset=few))


def test_only_a_clare_nano_can_be_tuned(store: tuple[InstanceStore, Path], tmp_path: Path) -> None:
    opened, folder = store
    spec = VersionSpec(dim=4, digest="d", encoder="owlv2:some/name")
    opened.create_version("frozen", "v1", spec)
    opened.promote("frozen", "v1")
    with pytest.raises(ConfigError, match=r"indexed with owlv2:some/name, but only clare-nano can"):
        start_model_of(opened, "frozen")
    model = load_model(folder / "start")[0]
    save_checkpoint(tmp_path / "start", model, tiny_tokenizer(), {})
    reir.index(
        folder / "photos",
        gallery="moved",
        store=opened,
        checkpoint=tmp_path / "start",
        progress=False,
    )
    assert start_model_of(opened, "moved").folder == tmp_path / "start"
    save_checkpoint(tmp_path / "start", tiny_model(seed=1), tiny_tokenizer(), {})
    with pytest.raises(ConfigError, match=r"was indexed with weights .* index it again first"):
        start_model_of(opened, "moved")
