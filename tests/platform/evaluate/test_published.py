"""PublishedRow figures: shown for the same split alone, and told apart from ours."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from reir.datasets import read_refer_json
from reir.evaluate import evaluate_rec, evaluate_reir, evaluate_tir, texts_of
from reir.evaluate import published as tables
from reir_testing import ChoosingFakeEncoder, FakeEncoder, data_dir
from reir_testing.photo_sets import three_photos

DATA = data_dir()


def test_only_the_same_split_has_published_figures() -> None:
    table = tables.reir_table(4994, 4994)
    assert table is not None
    assert tables.reir_table(4994, 14000) is None
    assert tables.tir_table(4994, 4994) is not None
    assert tables.tir_table(5000, 25000) is None
    assert tables.rec_split(1500, 10834) == "RefCOCO val"
    assert tables.rec_split(1500, 10833) == ""
    assert tables.rec_table([""]) is None
    assert tables.weak_rec_table(["RefCOCOg val-u", ""]) is None
    assert tables.rec_split(4650, 9536) == "RefCOCOg val-g"
    # Distributions of ReferIt differ in a few photos, and in which expressions they keep.
    for size in ((9999, 60_103), (9996, 65_000)):
        assert tables.rec_split(*size) == "ReferIt test"
    assert tables.rec_split(9000, 54_127) == ""
    resedis = tables.resedis_table(7088)
    assert resedis is not None
    assert [row.figures["r1"] for row in resedis.rows] == [21.22, 23.33]
    assert tables.resedis_table(7087) is None
    assert tables.sorec_table(10815) is not None
    assert tables.sorec_table(10814) is None


def test_figures_of_the_paper_stand_in_their_columns() -> None:
    large = tables.REIR.rows[-1]
    assert large.system == "CLARE-ViT-L"
    assert (large.figures["br1_50"], large.figures["br10_50"]) == (29.53, 56.98)
    assert (large.figures["br1_70"], large.figures["br10_90"]) == (28.03, 40.35)
    rec = tables.rec_table(["RefCOCOg test-u", "RefCOCO+ testA"])
    assert rec is not None
    assert rec.columns == ("RefCOCO+ testA", "RefCOCOg test-u")
    by_system = {row.system: row.figures for row in rec.rows}
    assert by_system["CLARE, ViT-L"]["RefCOCOg test-u"] == 86.70
    assert by_system["CLARE, ViT-B"]["RefCOCO+ testA"] == 81.60
    assert "RefCOCO val" not in by_system["DGA, VGG16"]  # a blank of the source
    weak = tables.weak_rec_table(
        ["ReferIt test", "RefCOCOg val-g", "RefCOCO testB", "RefCOCOg val-u"]
    )
    assert weak is not None
    assert weak.columns == ("RefCOCO testB", "RefCOCOg val-g", "ReferIt test")
    assert [row.figures["RefCOCO testB"] for row in weak.rows] == [
        57.13,
        57.36,
        61.22,
        63.93,
        71.27,
    ]
    assert weak.rows[0].figures["RefCOCOg val-g"] == 47.87
    assert "ReferIt test" not in weak.rows[-1].figures


@pytest.mark.parametrize(
    ("num_expressions", "num_systems", "figures"),
    [
        (10712, 9, {"macc": 39.0}),
        (10815, 16, {"macc": 45.1, "acc50": 66.2, "acc75": 51.7}),
        (17104, 16, {"macc": 31.7, "acc50": 52.2, "acc75": 33.6}),
    ],
)
def test_each_split_of_sorec_has_its_own_columns(
    num_expressions: int, num_systems: int, figures: dict[str, float]
) -> None:
    table = tables.sorec_table(num_expressions)
    assert table is not None
    assert len(table.rows) == num_systems
    assert table.rows[-1].system == "PIZA-Adapter+, Train-L"
    assert table.rows[-1].figures == figures


@pytest.mark.data
@pytest.mark.skipif(DATA is None, reason="needs the shared annotations: set REIR_DATA")
@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("refcoco_val", "RefCOCO val"),
        ("refcoco_testA", "RefCOCO testA"),
        ("refcoco_testB", "RefCOCO testB"),
        ("refcoco+_val", "RefCOCO+ val"),
        ("refcoco+_testA", "RefCOCO+ testA"),
        ("refcoco+_testB", "RefCOCO+ testB"),
        ("refcocog_val", "RefCOCOg val-u"),
        ("refcocog_test", "RefCOCOg test-u"),
    ],
)
def test_real_splits_are_recognized_by_their_size(file: str, name: str) -> None:
    assert DATA is not None
    dataset = read_refer_json(DATA / "refs_only" / "refcoco" / f"{file}.json")
    assert tables.rec_split(len(dataset.images), len(dataset.with_targets().expressions)) == name


def shown(report: object) -> str:
    console = Console(width=100, file=io.StringIO())
    with console.capture() as capture:
        console.print(report)
    text = capture.get()
    assert max(map(len, text.splitlines())) <= 100
    assert "…" not in text
    return text


def test_published_rows_stand_beside_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, encoder = three_photos(tmp_path), ChoosingFakeEncoder()
    monkeypatch.setattr(tables, "REIRCOCO_VAL", (3, 4))
    report = evaluate_reir(encoder, data, tmp_path)
    text = shown(report.table())
    assert "CLARE-ViT-L" in text
    assert "arXiv 2506.18246" in text
    assert text.index("CLARE-ViT-L") < text.index("query-free, B") < text.index("leaky, A")
    row = next(line.split() for line in text.splitlines() if "query-free, A" in line)
    assert row[2:5] == ["75.00", "75.00", "75.00"]
    assert report.to_dict()["published"]["rows"]["CLARE-ViT-B"]["br1_50"] == 28.47
    assert "published figures" not in report.info.left_out
    tir = shown(evaluate_tir(encoder, data, texts_of(data), tmp_path).table())
    assert "ObjEmbed-4B" in tir
    assert tir.index("ObjEmbed-4B") < tir.rindex("by the best instance")


def test_all_published_rec_splits_fit_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = three_photos(tmp_path)
    monkeypatch.setattr(tables, "REC_SPLITS", {(2, 4): "RefCOCO+ testA"})
    report = evaluate_rec(FakeEncoder(), data, tmp_path)
    text = shown(report.table())
    assert "81.60" in text
    assert "75.00" in next(
        line for line in text.splitlines() if "query-free" in line and "75" in line
    )
    # The same split has figures of models that learned with boxes, and of others without.
    assert text.index("CLARE, ViT-L") < text.index("Comparison with models trained")
    assert text.index("Comparison with models trained") < text.index("RefCLIP, then MAttNet")
    assert "44.80" in text
    assert report.to_dict()["published_weak"]["rows"]["RefCLIP"]["RefCOCO+ testA"] == 40.45
    for whole in (tables.REC, tables.WEAK_REC):
        assert len(whole.columns) == 8


def test_a_split_may_have_figures_of_models_without_boxes_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "REC_SPLITS", {(2, 4): "RefCOCOg val-g"})
    report = evaluate_rec(FakeEncoder(), three_photos(tmp_path), tmp_path)
    assert report.published is None
    assert "published figures" not in report.info.left_out
    text = shown(report.table())
    assert "47.87" in text
    assert "CLARE" not in text
