"""Evaluation of a localizer, with answers worked out by hand."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from reir.datasets import ReferringDataset
from reir.errors import DataError
from reir.evaluate import (
    Encoding,
    evaluate_rec,
    evaluate_rec_localizer,
    evaluate_sorec,
    evaluate_sorec_localizer,
)
from reir.evaluate import localized_expressions as module
from reir.evaluate import published as tables
from reir.evaluate.localized_expressions import localize_expressions
from reir.evaluate.shards import read_photo
from reir.models.interfaces import FoundBoxes
from reir.records import RgbImage
from reir_testing import ChoosingFakeEncoder, FakeEncoder, FakeLocalizer
from reir_testing.photo_sets import draw_photo_set, random_scenes, three_photos


class Counting(FakeLocalizer):
    """Counts its calls, and the expressions of each."""

    def __init__(self) -> None:
        self.num_expressions: list[int] = []

    def localize(self, images: Sequence[RgbImage], expressions: Sequence[str]) -> list[FoundBoxes]:
        self.num_expressions.append(len(expressions))
        assert len({id(image) for image in images}) == 1
        return super().localize(images, expressions)


def many(folder: Path) -> ReferringDataset:
    return draw_photo_set(folder, random_scenes(3, 12))


def test_rec_equals_an_encoder_whose_expressions_choose(tmp_path: Path) -> None:
    data = many(tmp_path)
    (found,) = evaluate_rec_localizer(FakeLocalizer(), data, tmp_path).splits
    (expected,) = evaluate_rec(ChoosingFakeEncoder(), data, tmp_path).splits
    assert found.by_expression == expected.by_expression
    assert found.query_free is None
    assert found.by_expression is not None
    assert 0 < found.by_expression["p50"].mean < 100


def test_sorec_equals_an_encoder_that_keeps_every_instance(tmp_path: Path) -> None:
    data = many(tmp_path)
    found = evaluate_sorec_localizer(FakeLocalizer(), data, tmp_path)
    expected = evaluate_sorec(FakeEncoder(), data, tmp_path)
    # Among equal scores, the best one may be another one.
    for name in (each for each in found.top_k if each.startswith("top10")):
        assert found.top_k[name] == expected.top_k[name]
    (rec,) = evaluate_rec_localizer(FakeLocalizer(), data, tmp_path).splits
    assert rec.by_expression is not None
    assert found.accuracy["acc50"] == rec.by_expression["p50"]
    assert "instances" not in found.info.counts


def test_each_photo_is_read_once_for_all_of_its_expressions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: Counter[Path] = Counter()

    def counted(path: Path) -> RgbImage:
        reads[path] += 1
        return read_photo(path)

    monkeypatch.setattr(module, "read_photo", counted)
    localizer, seen = Counting(), list[tuple[int, int]]()
    how = Encoding(progress=lambda done, total: seen.append((done, total)))
    report = evaluate_rec_localizer(localizer, three_photos(tmp_path), tmp_path, how=how)
    assert localizer.num_expressions == [2, 2]
    assert set(reads.values()) == {1}
    assert seen == [(1, 2), (2, 2)]
    assert report.info.counts["photos"] == 2  # the third has no expression


def test_an_interrupted_run_continues(tmp_path: Path) -> None:
    data = many(tmp_path)
    first = Counting()
    whole = evaluate_sorec_localizer(first, data, tmp_path)
    how = Encoding(work=tmp_path / "work")
    evaluate_sorec_localizer(FakeLocalizer(), data, tmp_path, how=how)
    (folder,) = (tmp_path / "work").iterdir()
    files = sorted(folder.glob("*.npz"))
    files[1].unlink()
    files[2].write_bytes(b"damaged")
    again = Counting()
    assert evaluate_sorec_localizer(again, data, tmp_path, how=how) == whole
    assert len(first.num_expressions) == len(files) > 5
    assert len(again.num_expressions) == 2
    # Another model must not take over its files.
    other = FakeLocalizer()
    other.digest = "0" * 64
    evaluate_sorec_localizer(other, data, tmp_path, how=how)
    assert len(list((tmp_path / "work").iterdir())) == 2


def test_broken_and_missing_photos(tmp_path: Path) -> None:
    data = three_photos(tmp_path)
    (tmp_path / "0.png").write_bytes(b"no photo")
    wrong = replace(data.images[1], width_px=320)
    data = replace(data, images=(data.images[0], wrong, data.images[2]))
    found = localize_expressions(FakeLocalizer(), data, tmp_path, data.expressions, num_boxes=3)
    assert (found.num_photos, found.num_unreadable, found.num_misshapen) == (2, 1, 1)
    assert np.isnan(found.boxes_px[:2]).all()
    # In pixels of the annotated width of 320, not of the file's 160.
    assert found.boxes_px[2, 0].tolist() == pytest.approx([120, 20, 180, 100])
    assert np.isnan(found.boxes_px[2, 2]).all()
    report = evaluate_rec_localizer(FakeLocalizer(), data, tmp_path)
    assert report.splits[0].by_expression is not None
    assert "1 photos could not be decoded; nothing is found in them." in report.info.notes()
    (tmp_path / "0.png").unlink()
    with pytest.raises(DataError, match="1 of 2 photos"):
        evaluate_rec_localizer(FakeLocalizer(), data, tmp_path)
    with pytest.raises(DataError, match="describes an instance"):
        evaluate_sorec_localizer(FakeLocalizer(), replace(data, expressions=()), tmp_path)


def test_tables_name_the_localizer_and_show_published_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = three_photos(tmp_path)
    monkeypatch.setattr(tables, "SOREC_SPLITS", {4: "val"})
    monkeypatch.setattr(tables, "REC_SPLITS", {(2, 4): "RefCOCO val"})
    sorec = evaluate_sorec_localizer(FakeLocalizer(), data, tmp_path)
    rec = evaluate_rec_localizer(FakeLocalizer(), data, tmp_path)
    for report, row in ((sorec, "this localizer"), (rec, "by expression")):
        console = Console(width=100, file=io.StringIO())
        console.print(report.table())
        shown = " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
        assert f"localizer {FakeLocalizer.digest[:12]}" in shown
        assert row in shown
        assert "Comparison with published figures" in shown
        assert "PIZA-Adapter+" in shown or "SimVG, ViT-B 87.07" in shown
        assert "Query-free" not in shown
        assert "encoded as a whole" not in shown
