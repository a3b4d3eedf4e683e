"""What the report of a fine-tune says and recommends."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from reir_training.finetune.measure import Ranks
from reir_training.finetune.report import MIN_HELD_OUT, NO_BOXES, Comparison, FinetuneReport


def ranks(of_photos: list[int], *, has_box: bool = False) -> Ranks:
    found, count = np.array(of_photos), len(of_photos)
    return Ranks(np.arange(count), found, found + 1, np.full(count, has_box))


def report(before: list[int], after: list[int], **changes: Any) -> FinetuneReport:
    has_box = changes.pop("has_box", False)
    values: dict[str, Any] = {
        "gallery": "my photos",
        "checkpoint": Path("out/checkpoint"),
        "canaries": Path("out/canaries.jsonl"),
        "masks": False,
        "counts": {
            "photos": 50,
            "sentences": 90,
            "held_out_photos": len(before),
            "held_out_sentences": len(before),
            "canaries": len(before),
        },
        "labels": {"sentences": 70, "kept": 60, "drawn": 5, "refused": {}},
        "blend": {"share": 0.4},
        "held_out": Comparison(
            "held out", ranks(before, has_box=has_box), ranks(after, has_box=has_box)
        ),
        "remembered": Comparison("about old photos", ranks([0, 4]), ranks([0, 0])),
        "minutes": {"before": 1.5, "tuned": 2.25},
    }
    return FinetuneReport(**values | changes)


def shown(one: FinetuneReport) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(one.table())
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("before", "after", "verdict", "words"),
    [
        ([3] * 30, [0] * 25 + [3] * 5, "helped", "It helped"),
        ([0] * 25 + [3] * 5, [3] * 30, "harmed", "It did harm"),
        ([0] * 15 + [3] * 15, [3] + [0] * 15 + [3] * 14, "unclear", "It is not clear"),
    ],
)
def test_the_verdict_depends_on_the_interval_of_the_gain(
    before: list[int], after: list[int], verdict: str, words: str
) -> None:
    one = report(before, after)
    assert one.verdict == verdict
    assert one.to_dict()["recommended"] == (verdict == "helped")
    assert words in shown(one)
    assert ("is not recommended" in shown(one)) == (verdict != "helped")


@pytest.mark.parametrize("verdict", ["helped", "harmed"])
def test_few_held_out_photos_prove_nothing(verdict: str) -> None:
    def of(num: int) -> FinetuneReport:
        worse, better = [3] * num, [0] * num
        return report(worse, better) if verdict == "helped" else report(better, worse)

    enough, few = of(MIN_HELD_OUT), of(MIN_HELD_OUT - 1)
    assert enough.verdict == verdict
    assert few.verdict == "unclear"
    assert few.to_dict()["recommended"] is False
    assert f"measured held-out photos is {MIN_HELD_OUT - 1}, and" in shown(few)
    assert few.to_dict()["explanation"] in " ".join(shown(few).split())
    # Many sentences about few photos are no better.
    ranks_of = {"before": [3] * 30, "after": [0] * 30}
    about_two = {
        name: Ranks(np.arange(30) % 2, np.array(of_photos), np.array(of_photos), np.zeros(30, bool))
        for name, of_photos in ranks_of.items()
    }
    assert report([], [], held_out=Comparison("held out", **about_two)).verdict == "unclear"


def test_the_report_says_why_presence_is_not_calibrated() -> None:
    why = "calibration needs at least 21 photos"
    bare = report([3] * 20, [0] * 20, blend={"share": 0.4, "not_calibrated": why})
    assert f"Presence is not calibrated: {why}" in shown(bare)
    assert "calibrated" not in shown(report([3] * 20, [0] * 20))


def test_figures_are_percentages_with_gains_in_points() -> None:
    values = report([3] * 20, [0] * 10 + [3] * 10).to_dict()
    assert values["held_out"]["before"] == {"photo_p1": 0.0, "photo_p5": 100.0, "photo_p10": 100.0}
    assert values["held_out"]["after"]["photo_p1"] == 50.0
    gain = values["held_out"]["gain"]["photo_p1"]
    assert gain["mean"] == 50.0
    assert 0 < gain["low"] < 50 < gain["high"] < 100
    assert values["remembered"]["gain"]["photo_p1"]["mean"] == 50.0
    assert values["minutes"] == {"before": 1.5, "tuned": 2.25, "all": 3.75}


def test_without_boxes_the_report_says_what_is_not_known() -> None:
    bare, boxed = report([3] * 20, [0] * 20), report([3] * 20, [0] * 20, has_box=True)
    assert NO_BOXES in shown(bare)
    assert NO_BOXES not in shown(boxed)
    assert "BR@1" not in shown(bare)
    assert boxed.to_dict()["held_out"]["after"]["br1"] == 0.0  # a box in the wrong place is first
    assert boxed.to_dict()["held_out"]["after"]["br5"] == 100.0
    assert "Boxes for training: 5 drawn, 55 found, 10 sentences left out." in shown(bare)
    drawn = report([3] * 20, [0] * 20, labels={"sentences": 9, "kept": 9, "drawn": 9})
    assert "Boxes for training: 9 drawn, 0 found, 0 sentences left out." in shown(drawn)


def test_the_command_fits_the_gallery() -> None:
    many = report([3] * 30, [0] * 30)
    assert many.command == (
        "reir reindex 'my photos' --checkpoint out/checkpoint --canary out/canaries.jsonl"
    )
    few = report([3] * 5, [0] * 5, masks=True)
    assert few.command == (
        "reir reindex 'my photos' --encoder clare-masks:out/checkpoint --canary "
        "out/canaries.jsonl --limit min_canaries=5"
    )
    # What counts is the number of canaries: repeated sentences are one.
    repeated = report([3] * 30, [0] * 30, counts={**many.counts, "canaries": 19})
    assert repeated.command == f"{many.command} --limit min_canaries=19"
    elsewhere = report([3] * 30, [0] * 30, store="my store")
    assert elsewhere.command == f"{many.command} --store 'my store'"
    assert elsewhere.to_dict()["command"] == elsewhere.command
