"""ReSeDis from photos to figures, with answers worked out by hand and by slow loops."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from transformers import AutoModel

from reir.datasets import Expression, ReferringDataset
from reir.errors import ConfigError, DataError
from reir.evaluate import Encoding, ResedisReport, evaluate_resedis
from reir.evaluate.resedis import score_thresholds
from reir.images import rle
from reir.images.boxes import elementwise_iou
from reir.models.pretrained import load_pretrained
from reir.models.proposals import Candidates
from reir.models.siglip_crops import Detector, SiglipCropsEncoder
from reir.query.photo_curve import DEFAULT_MIN_PRESENCE
from reir.query.presence import (
    PHOTO_FEATURES,
    Background,
    Calibration,
    Logistic,
    count_words,
)
from reir.records import Instances, MaskRle, RgbImage
from reir_testing import FakeEncoder
from reir_testing.evaluation.calibrations import fake_calibration
from reir_testing.photo_sets import SIZE_PX, draw_photo_set, random_scenes, three_photos
from reir_testing.pretrained import save_tiny_siglip


class MaskedFakeEncoder(FakeEncoder):
    """A fake encoder whose masks fill the boxes, at half the size of the photo."""

    masks = True

    def encode_images(self, images: Sequence[RgbImage]) -> list[Instances]:
        """Return the instances of each image, with masks."""
        return [
            replace(found, masks=tuple(filled(box, image.shape) for box in found.boxes))
            for image, found in zip(images, super().encode_images(images), strict=True)
        ]


def filled(box: np.ndarray, shape: tuple[int, ...]) -> MaskRle:
    height, width = shape[0] // 2, shape[1] // 2
    x1, y1, x2, y2 = np.round(box * np.array([width, height] * 2)).astype(int)
    pixels = np.zeros((height, width), dtype=bool)
    pixels[y1:y2, x1:x2] = True
    return rle.encode(pixels)


def with_masks(data: ReferringDataset, widths: dict[str, float]) -> ReferringDataset:
    """Give instances a mask that covers this share of the width of their box."""
    instances = []
    for instance in data.instances:
        mask = None
        if instance.instance_id in widths:
            x1, y1, x2, y2 = map(int, instance.box_xyxy_px)
            pixels = np.zeros(SIZE_PX[::-1], dtype=bool)
            pixels[y1:y2, x1 : x1 + round((x2 - x1) * widths[instance.instance_id])] = True
            mask = rle.encode(pixels)
        instances.append(replace(instance, mask=mask))
    return replace(data, instances=tuple(instances))


def as_queries(data: ReferringDataset) -> ReferringDataset:
    """Make equal sentences one query."""
    return data.with_expressions(replace(text, query_id=text.text) for text in data.expressions)


def printed(report: ResedisReport) -> str:
    console = Console(width=100, file=io.StringIO())
    with console.capture() as capture:
        console.print(report.table())
    return " ".join(capture.get().split())


def test_a_wrong_answer_costs_recall_and_the_joint_score(tmp_path: Path) -> None:
    data = three_photos(tmp_path)
    report = evaluate_resedis(FakeEncoder(), data, tmp_path, calibration=fake_calibration())
    values = json.loads(json.dumps(report.to_dict()))
    # The encoder takes "orange" literally, so it does not find the yellow shape.
    assert values["retrieval"]["r1"] == 75
    assert (values["box"]["joint1"], values["box"]["p50"]) == (75, 75)
    assert values["box"]["ap"] >= 75
    assert values["decision"]["precision"] == 100
    assert values["decision"]["recall"] == 75
    assert values["decision"]["false_alarms_per_100"] == 0
    assert values["decision"]["recall_at_precision_90"] >= 75
    assert values["matching"]["box"]["recall"] == 75
    assert values["counts"]["targets"] == values["counts"]["expressions"] == 4
    assert values["left_out"] == {
        "mask figures": "this encoder gives no masks",
        "published figures": "these are not ReSeDis' photos",
    }
    text = printed(report)
    assert "4 expressions with 4 targets" in text
    assert "false alarms per 100 photos 0.00" in text


def test_without_a_calibration_nothing_is_decided(tmp_path: Path) -> None:
    report = evaluate_resedis(FakeEncoder(), three_photos(tmp_path), tmp_path)
    values = report.to_dict()
    assert values["decision"] is None
    assert values["matching"] is None
    assert "No decision figures: this encoder has no calibration" in printed(report)


def slow_figures(data: ReferringDataset, folder: Path, judge: Calibration) -> dict[str, float]:
    """Figures of boxes, one query and one photo at a time, worst order of ties."""
    encoder = FakeEncoder()
    found = {}
    for photo in data.images:
        pixels = np.array(Image.open(folder / photo.file_name))
        found[photo.image_id] = encoder.encode_images([pixels])[0]
    figures = {name: 0.0 for name in ("r1", "r5", "joint1", "joint5", "p50", "true", "false")}
    queries = [list(texts) for _, texts in groupby(data.expressions, lambda text: text.query)]
    num_true = 0
    for texts in queries:
        vector = encoder.encode_expressions([texts[0].text])[0]
        background = judge.background.score(vector)
        true = {text.image_id for text in texts}
        num_true += len(true)
        ranked, fitting = [], {}
        for image, instances in found.items():
            scores = np.round(instances.vectors @ vector, 5)
            best = scores.max(initial=-np.inf)
            present = len(scores) and judge.of_photo(best, background, 3) >= DEFAULT_MIN_PRESENCE
            figures["true" if image in true else "false"] += bool(present)
            fitting[image] = len(scores) > 0 and all(
                fits(box, texts, image, data) for box in instances.boxes[scores == best]
            )
            ranked.append((-best, image in true, fitting[image], image))
        order = [image for *_, image in sorted(ranked) if len(found[image])]
        for k in (1, 5):
            first = [image for image in order[:k] if image in true]
            figures[f"r{k}"] += bool(first)
            figures[f"joint{k}"] += any(fitting[image] for image in first)
        figures["p50"] += sum(fitting[image] for image in true) / len(true)
    num = len(queries)
    averages = {name: 100 * figures[name] / num for name in ("r1", "r5", "joint1", "joint5", "p50")}
    return averages | {
        "recall": 100 * figures["true"] / num_true,
        "false_alarms": figures["false"] / num,
        "false_alarms_per_100": 100 * figures["false"] / (num * len(data.images) - num_true),
    }


def fits(box: np.ndarray, texts: Sequence[Expression], image: str, data: ReferringDataset) -> bool:
    box_px = box * np.array([*SIZE_PX, *SIZE_PX])
    own = [data.instances_by_id[str(text.instance_id)] for text in texts if text.image_id == image]
    return any(elementwise_iou(box_px, instance.box_xyxy_px) >= 0.5 for instance in own)


@pytest.mark.parametrize("seed", range(4))
def test_figures_equal_slow_loops(tmp_path: Path, seed: int) -> None:
    data = as_queries(draw_photo_set(tmp_path, random_scenes(seed, 12)))
    data = data.with_expressions(sorted(data.expressions, key=lambda text: text.query))
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(30, 3, FakeEncoder.dim))
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    judge = fake_calibration(Background(vectors.astype(np.float32)))
    values = evaluate_resedis(FakeEncoder(), data, tmp_path, calibration=judge).to_dict()
    wanted = slow_figures(data, tmp_path, judge)
    assert values["counts"]["expressions"] < len(data.expressions)  # some have several photos
    assert {**values["retrieval"], **values["box"], **values["decision"]} == pytest.approx(
        {**values["retrieval"], **values["box"], **values["decision"], **wanted}, abs=1e-3
    )


def test_masks_are_measured_where_every_target_has_one(tmp_path: Path) -> None:
    # A mask of .9 of the box's width fits the found one, a mask of .3 does not.
    data = with_masks(three_photos(tmp_path), {"0/0": 0.9, "0/1": 0.3})
    report = evaluate_resedis(MaskedFakeEncoder(), data, tmp_path, calibration=fake_calibration())
    values = report.to_dict()
    assert (values["box"]["joint1"], values["mask"]["joint1"]) == (75, 50)
    assert (values["mask"]["p50"], values["matching"]["mask"]["recall"]) == (50, 50)
    assert 0 < values["mask"]["ap"] < values["mask"]["ap50"] <= 75
    assert "right photo and mask" in printed(report)
    bare = evaluate_resedis(MaskedFakeEncoder(), three_photos(tmp_path), tmp_path).to_dict()
    assert bare["left_out"]["mask figures"] == "no expression has targets with masks"


def test_expressions_without_instance_only_count_for_decisions(tmp_path: Path) -> None:
    data = three_photos(tmp_path)
    absent = [
        Expression(expression_id=text, image_id="2.png", instance_id=None, text=text)
        for text in ("green", "purple")
    ]
    more = data.with_expressions([*data.expressions, *absent])
    judge = fake_calibration()
    one, other = (
        evaluate_resedis(FakeEncoder(), each, tmp_path, calibration=judge).to_dict()
        for each in (data, more)
    )
    assert (one["retrieval"], one["box"]) == (other["retrieval"], other["box"])
    # Photo 1 has something green, which this sentence is said not to describe.
    assert other["decision"]["false_alarms"] == pytest.approx(1 / 6, abs=1e-4)
    assert other["counts"]["without_target"] == 2
    with pytest.raises(DataError, match="none of 2 expressions describes an instance"):
        evaluate_resedis(FakeEncoder(), data.with_expressions(absent), tmp_path)


def test_a_photo_that_does_not_decode_is_not_found(tmp_path: Path) -> None:
    data = three_photos(tmp_path)
    (tmp_path / "0.png").write_bytes(b"no photo")
    values = evaluate_resedis(
        FakeEncoder(), data, tmp_path, calibration=fake_calibration()
    ).to_dict()
    assert values["retrieval"]["r10"] == 50
    assert values["counts"]["unreadable"] == 1


def test_thresholds_decide_as_the_presence_in_a_photo_does() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(50, 2, 8)).astype(np.float32)
    judge = fake_calibration(Background(vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)))
    queries = vectors[:20, 0] / np.linalg.norm(vectors[:20, 0], axis=-1, keepdims=True)
    weights = {"score": 10.0, "background": -2.0, "words": 0.5}
    by_words = Logistic(
        features=PHOTO_FEATURES, weights=tuple(weights.get(n, 0.0) for n in PHOTO_FEATURES), bias=-8
    )
    judge = replace(judge, photo=by_words)
    texts = [" ".join(["word"] * (1 + number % 7)) for number in range(20)]
    thresholds = score_thresholds(judge, texts, queries, 0.5)
    for text, vector, threshold in zip(texts, queries, thresholds, strict=True):
        background = judge.background.score(vector)
        for score in rng.uniform(-1, 1, 50):
            present = judge.of_photo(score, background, count_words(text)) >= 0.5
            assert (score >= threshold) == present
    assert np.isinf(score_thresholds(judge, texts, queries, 1.0)).all()


def test_an_oracle_searches_the_true_boxes(tmp_path: Path) -> None:
    data = draw_photo_set(
        tmp_path,
        [
            [("red", (10, 10, 60, 60), "red"), ("blue", (90, 10, 150, 60), "blue")],
            [("green", (30, 30, 90, 110), "green")],
            [],
        ],
    )
    # Two sentences about one box are one candidate.
    twice = replace(data.instances[0], instance_id="again")
    data = replace(data, instances=(*data.instances, twice))
    parts = load_pretrained(str(save_tiny_siglip(tmp_path / "siglip")), AutoModel, ("siglip",))
    # A detector that finds nothing: only the oracle has candidates.
    nothing = Detector(lambda images, _: [_no_candidates() for _ in images], "d" * 64)
    encoder = SiglipCropsEncoder(parts, nothing, relation_share=0.2)
    work = tmp_path / "work"
    bare, oracle, again = (
        evaluate_resedis(encoder, data, tmp_path, how=Encoding(work=work, oracle=oracle)).to_dict()
        for oracle in (False, True, True)
    )
    assert (bare["counts"]["instances"], bare["retrieval"]["r10"]) == (0, 0)
    assert oracle["counts"]["instances"] == 3
    # Both photos with candidates are among the first ten.
    assert (oracle["retrieval"]["r10"], oracle["settings"]["oracle"]) == (100, True)
    assert again == oracle
    report = evaluate_resedis(encoder, data, tmp_path, how=Encoding(oracle=True))
    assert "Oracle: the candidates are the true boxes" in printed(report)
    with pytest.raises(ConfigError, match="FakeEncoder cannot encode true boxes as an oracle"):
        evaluate_resedis(FakeEncoder(), data, tmp_path, how=Encoding(oracle=True))


def _no_candidates() -> Candidates:
    return Candidates(torch.zeros(0, 4), torch.zeros(0, 80), torch.zeros(0, 64))
