"""`reir finetune`: what it refuses before anything is trained, and what it passes on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

import reir
from reir.checkpoint import save_checkpoint
from reir.errors import ConfigError, DataError
from reir.store import InstanceStore
from reir.store.memory import MemoryStore
from reir_testing.fake_models import COLORS, save_photos
from reir_testing.fakes import FakeEncoder
from reir_testing.tiny import tiny_model, tiny_tokenizer
from reir_training.cli import finetune
from reir_training.finetune.measure import Ranks
from reir_training.finetune.report import Comparison, FinetuneReport
from reir_training.finetune.run import Finetune


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two galleries of the same photos: one of a tiny clare-nano, one of another model."""
    photos, start = save_photos(tmp_path / "photos"), tmp_path / "start"
    save_checkpoint(start, tiny_model(), tiny_tokenizer(), {})
    store = MemoryStore()
    for gallery, model in (("nano", {"checkpoint": start}), ("other", {"encoder": FakeEncoder()})):
        reir.index(photos, gallery=gallery, store=store, progress=False, **model)

    @contextmanager
    def connect(_: str | None) -> Iterator[InstanceStore]:
        yield store

    monkeypatch.setattr("reir.cli.common.connect", connect)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(gallery: str, *rows: str, options: tuple[str, ...] = ()) -> str:
    Path("pairs.csv").write_text("\n".join(("photo,sentence", *rows)) + "\n")
    app = typer.Typer()
    finetune.register(app)
    app.callback()(lambda: None)  # so that the name of the only command is expected
    words = ["finetune", gallery, "--sentences", "pairs.csv", *options]
    return CliRunner().invoke(app, words, catch_exceptions=False).stdout


def test_what_cannot_work_is_refused_before_anything_is_written(folder: Path) -> None:
    good = [f"{color}.png,the zorp" for color in COLORS]
    with pytest.raises(DataError, match=r"row 3: the photo 'gone\.png' is not in gallery 'nano'"):
        run("nano", good[0], "gone.png,the glim")
    with pytest.raises(
        ConfigError, match=r"'other' was indexed with weights .* index it again first"
    ):
        run("other", *good)
    with pytest.raises(ConfigError, match="--remember and --remember-images belong together"):
        run("nano", *good, options=("--remember", "old.json"))
    with pytest.raises(ConfigError, match=r"--search-log has an effect only with --from feedback"):
        run("nano", *good, options=("--search-log", "searches"))
    with pytest.raises(ConfigError, match=r"--max-user-share has an effect only with --from"):
        run("nano", *good, options=("--max-user-share", "0.25"))
    with pytest.raises(DataError, match=r"at least 4 photos are needed to train on.*got 1"):
        run("nano", *good[:2])
    assert not (folder / "runs").exists()


def test_options_reach_the_run_and_the_report_is_printed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[Finetune] = []

    def pretend(self: Finetune) -> FinetuneReport:
        runs.append(self)
        return report(self, better=True)

    monkeypatch.setattr(Finetune, "run", pretend)
    rows = [f"{color}.png,the zorp" for color in COLORS]
    options = ("--epochs", "3", "--held-out", "0.4", "--max-share", "0.7", "--skip-unknown")
    shown = run("nano", *rows, "gone.png,the dax", options=options)
    (one,) = runs
    assert one.options.epochs == 3
    assert one.options.max_share == 0.7
    assert len(one.held_out.images) == 3
    assert one.output == Path("runs/finetune/nano")
    assert one.start.folder == folder / "start"
    assert one.remembered.name == "the built-in gallery"
    assert len(one.pairs.skipped) == 1
    assert "It helped" in shown
    assert "reir reindex nano --checkpoint runs/finetune/nano/checkpoint" in shown
    assert "--limit min_canaries=2" in shown
    assert "--store" not in shown
    as_json = ("--json", "--output", "out", "--store", "there")
    values: dict[str, Any] = json.loads(run("nano", *rows, options=as_json))
    assert values["recommended"] is True
    assert values["command"].endswith("--store there")
    assert values["checkpoint"] == "out/checkpoint"


def ranks(*of_photos: int) -> Ranks:
    count = len(of_photos)
    found = np.array(of_photos)
    return Ranks(np.arange(count), found, found, np.zeros(count, dtype=bool))


def report(one: Finetune, *, better: bool) -> FinetuneReport:
    """A report of sentences whose right photos were in ranks 8 and 9, and are first now."""
    before, after = ranks(*[8, 9] * 5), ranks(*[0, 0] * 5)
    old = ranks(0, 0, 3)
    return FinetuneReport(
        gallery=one.gallery,
        checkpoint=one.checkpoint,
        canaries=one.output / "canaries.jsonl",
        masks=False,
        counts={"photos": 5, "sentences": 5, "held_out_photos": 2, "canaries": 2},
        labels={"sentences": 3, "kept": 3, "drawn": 0, "refused": {}},
        blend={"share": 0.5},
        held_out=Comparison("held out", *((before, after) if better else (after, before))),
        remembered=Comparison("about old photos", old, old),
        minutes={"before": 0.5, "after": 0.25},
        store=one.store,
    )
