"""Feedback becomes sentences with boxes, and every verdict is accounted for."""

from __future__ import annotations

import io
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import reir
from reir.cli import main
from reir.errors import DataError
from reir.images.decode import canonical_uri, image_id
from reir.operations.feedback import Feedback
from reir.operations.feedback.records import user_of
from reir.store import InstanceStore
from reir.store.memory import MemoryStore
from reir_testing.fake_models import save_photos
from reir_testing.fakes import FakeEncoder
from reir_testing.feedback.simulated_users import record_feedback
from reir_training.finetune.feedback_pairs import feedback_pairs

GALLERY = "colors"
NOW = datetime(2026, 11, 25, tzinfo=UTC)
BOX, NEAR, ELSEWHERE = (0.1, 0.1, 0.4, 0.8), (0.1, 0.1, 0.42, 0.8), (0.5, 0.1, 0.9, 0.8)


@pytest.fixture
def store(tmp_path: Path) -> InstanceStore:
    store = MemoryStore()
    photos = save_photos(tmp_path / "photos")
    reir.index(photos, gallery=GALLERY, store=store, encoder=FakeEncoder(), progress=False)
    return store


def said(photo: Path, user: str, expression: str, **more: Any) -> Feedback:
    uri = canonical_uri(photo)
    values = {"verdict": "box", "uri": uri, "image_id": image_id(uri), "box": BOX, **more}
    return Feedback(expression=expression, user=user and user_of(user), **values)


def test_answers_of_the_live_version_are_learned_from(store: InstanceStore, tmp_path: Path) -> None:
    red, blue, gone = (tmp_path / "photos" / f"{name}.png" for name in ("red", "blue", "gone"))
    feedback = [
        said(red, "u", "the\tzorp"),
        said(red, "v", "The Zorp"),
        said(red, "v", "the zorp", box=NEAR),  # replaces the one before
        said(blue, "", "the glim", verdict="right", instance_id="x#0"),
        said(gone, "u", "the dax"),
        said(blue, "u", "a plonk"),
        said(blue, "v", "a plonk", box=ELSEWHERE),
        said(blue, "v", "a wug", verdict="wrong"),
        said(blue, "v", "a mome", verdict="absent", uri="", image_id="", box=None),
    ]
    in_order = [replace(each, time=NOW + timedelta(minutes=n)) for n, each in enumerate(feedback)]
    record_feedback(tmp_path / "log", GALLERY, in_order)
    pairs = feedback_pairs(store, GALLERY, tmp_path / "log")
    assert pairs.uris == {
        image_id(canonical_uri(each)): canonical_uri(each) for each in (red, blue)
    }
    found = {
        each.text: (
            each.image_id,
            pairs.dataset.instances_by_id[each.instance_id or ""].box_xyxy_px,
        )
        for each in pairs.dataset.expressions
    }
    assert found == {
        "the zorp": (image_id(canonical_uri(red)), (9.0, 6.0, 37.8, 48.0)),
        "the glim": (image_id(canonical_uri(blue)), (9.0, 6.0, 36.0, 48.0)),
    }
    assert {i.file_name for i in pairs.dataset.images} == pairs.uris.keys()
    summary = pairs.feedback
    assert summary is not None
    assert summary.left_out == {
        "replaced": 1,
        "outvoted": 2,
        "wrong": 1,
        "absent": 1,
        "photo gone": 1,
    }
    assert summary.num_used == 3
    assert summary.num_used + sum(summary.left_out.values()) == summary.num_feedback
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(summary.table())
    shown = console.export_text()
    assert "3 of 9 verdicts are learned from." in shown
    assert "Left out: 1 (the photo is no longer in the gallery)." in shown
    assert user_of("u")[:8] in shown
    assert user_of("u")[:9] not in shown
    assert "without a key" in shown


def test_feedback_that_teaches_nothing_is_refused(store: InstanceStore, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with pytest.raises(DataError, match="has no feedback about gallery 'colors'"):
        feedback_pairs(store, GALLERY, log)
    record_feedback(log, GALLERY, [said(tmp_path / "gone.png", "u", "the dax")])
    with pytest.raises(DataError, match=r"none of the 1 verdicts .* learned from: 1 photo gone"):
        feedback_pairs(store, GALLERY, log)


@pytest.mark.parametrize(
    ("options", "given"), [([], "none"), (["--sentences", "a.csv", "--from", "feedback"], "both")]
)
def test_sentences_come_from_one_place(
    options: list[str], given: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(["finetune", GALLERY, *options]) == 2
    assert f"give one of --sentences and --from, got {given}" in capsys.readouterr().err
