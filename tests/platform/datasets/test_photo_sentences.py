"""`reir.datasets.photo_sentences`: CSV and JSON lines as users have them, and hostile ones."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from PIL import Image

from reir.datasets import (
    ReferringImage,
    read_annotations,
    read_as,
    read_photo_sentences,
    write_photo_sentences,
)
from reir.datasets.photo_sentences import read_sentence_list
from reir.errors import DataError, UnknownPhoto
from reir_testing.weak.hostile_sentences import (
    HOSTILE_LISTS,
    SIZE_PX,
    HostileList,
    problem,
    save_photos,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_photos(tmp_path)
    return tmp_path


def texts(folder: Path, content: str, name: str = "pairs.csv") -> list[tuple[str, str, str]]:
    """Write a list, and return (id, photo, sentence) of each of its expressions."""
    path = folder / name
    path.write_text(content, encoding="utf-8", newline="")
    dataset = read_photo_sentences(path, folder)
    return [(each.expression_id, each.image_id, each.text) for each in dataset.expressions]


def test_a_list_without_boxes_has_no_instances(folder: Path) -> None:
    path = folder / "pairs.csv"
    path.write_text("photo,sentence\nsub/b.jpg,the cup\na.jpg,the mug\n./a.jpg,the plate\n")
    dataset = read_photo_sentences(path, folder)
    assert dataset.instances == ()
    assert dataset.splits == {}
    assert {each.instance_id for each in dataset.expressions} == {None}
    assert [(i.image_id, i.file_name, i.width_px, i.height_px) for i in dataset.images] == [
        ("sub/b.jpg", "sub/b.jpg", *SIZE_PX),
        ("a.jpg", "a.jpg", *SIZE_PX),
    ]
    assert [(each.expression_id, each.image_id) for each in dataset.expressions] == [
        ("2", "sub/b.jpg"),
        ("3", "a.jpg"),
        ("4", "a.jpg"),
    ]


def test_rows_about_the_same_box_describe_one_instance(folder: Path) -> None:
    path = folder / "pairs.csv"
    path.write_text(
        "photo,sentence,x1,y1,x2,y2\n"
        "a.jpg,the cup,1,2,30.5,40\n"
        "a.jpg,the mug,1,2,30.5,40\n"
        "sub/b.jpg,the cup,1,2,30.5,40\n"
        "a.jpg,something else,,,,\n"
        "a.jpg,rounded,-1,0,65,49\n"
    )
    dataset = read_photo_sentences(path, folder)
    assert [(i.instance_id, i.image_id, i.box_xyxy_px) for i in dataset.instances] == [
        ("2", "a.jpg", (1, 2, 30.5, 40)),
        ("4", "sub/b.jpg", (1, 2, 30.5, 40)),
        ("6", "a.jpg", (-1, 0, 65, 49)),
    ]
    assert [each.instance_id for each in dataset.expressions] == ["2", "2", "4", None, "6"]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_what_spreadsheets_write(delimiter: str, mark: str, line_end: str, folder: Path) -> None:
    rows = [
        [" Sentence", "comment", "PHOTO", ""],
        ["the cup, red; the one\twith tea", "", "a.jpg", ""],
        ["", "", "", ""],
        ['the "big"\nmug', "in two lines", " sub/b.jpg ", ""],
        ["das Café", "", "a.jpg", ""],
    ]
    path = folder / "pairs.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        file.write(mark)
        csv.writer(file, delimiter=delimiter, lineterminator=line_end).writerows(rows)
    found = [
        (e.expression_id, e.image_id, e.text)
        for e in read_photo_sentences(path, folder).expressions
    ]
    assert found == [
        ("2", "a.jpg", "the cup, red; the one\twith tea"),
        ("4", "sub/b.jpg", 'the "big"\nmug'),
        ("5", "a.jpg", "das Café"),
    ]


def test_json_lines(folder: Path) -> None:
    lines = [
        json.dumps(
            {"photo": "a.jpg", "sentence": "the caf\u00e9\u2028on the left"}, ensure_ascii=False
        ),
        "",
        json.dumps({"Sentence": "the mug", "photo": "a.jpg", "by": {"who": ["me"]}, "note": None}),
        json.dumps({"photo": "a.jpg", "sentence": "it", "x1": 1, "y1": 2, "x2": "3.5", "y2": 4}),
    ]
    found = texts(folder, "\ufeff" + "\r\n".join(lines), "pairs.jsonl")
    assert found == [
        ("1", "a.jpg", "the caf\u00e9\u2028on the left"),
        ("3", "a.jpg", "the mug"),
        ("4", "a.jpg", "it"),
    ]
    (instance,) = read_photo_sentences(folder / "pairs.jsonl", folder).instances
    assert instance.box_xyxy_px == (1, 2, 3.5, 4)


def test_a_header_may_follow_blank_rows(folder: Path) -> None:
    assert texts(folder, "\n,\nphoto,sentence\na.jpg,the cup\n") == [("4", "a.jpg", "the cup")]


def test_each_photo_is_opened_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    def spy(path: Path) -> bytes:
        opened.append(path.name)
        return path.read_bytes()

    monkeypatch.setattr("reir.datasets.photo_sentences.read_bytes", spy)
    texts(folder, "photo,sentence\n" + "a.jpg,the cup\nsub/b.jpg,the mug\n" * 5)
    assert opened == ["a.jpg", "b.jpg"]


def test_a_photo_has_the_size_of_its_upright_file(folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    Image.new("RGB", SIZE_PX).save(folder / "a.jpg", exif=exif)
    path = folder / "pairs.csv"
    path.write_text("photo,sentence\na.jpg,the cup\n")
    (photo,) = read_photo_sentences(path, folder).images
    assert (photo.width_px, photo.height_px) == SIZE_PX[::-1]


def test_all_problems_of_a_list_are_in_one_error(folder: Path) -> None:
    path = folder / "pairs.csv"
    path.write_text(
        "photo,sentence,x1,y1,x2,y2\n"
        "a.jpg,the cup,1,2,30,40\n"
        "b.jpg,,1,2,30,x\n"
        "a.jpg,the cup\n"
        "b.jpg,the mug,,,,\n"
    )
    with pytest.raises(DataError) as caught:
        read_photo_sentences(path, folder)
    assert str(caught.value).splitlines() == [
        f"{path} has 5 problems, so nothing of it is used:",
        f"  row 3: the photo 'b.jpg' is not in {folder}",
        "  row 3: the sentence is empty (''); describe one object, e.g. 'the red mug'",
        "  row 3: y2 must be a number of pixels such as 12.5, got 'x'",
        "  row 4: expected 6 values, as many as the header has, got 2: 'a.jpg,the cup'; write "
        "quotes around a sentence that contains ','",
        f"  row 5: the photo 'b.jpg' is not in {folder}",
    ]


def test_the_folder_of_photos_must_exist(folder: Path) -> None:
    path = folder / "pairs.csv"
    path.write_text("photo,sentence\na.jpg,the cup\n")
    with pytest.raises(DataError, match=r"photos is not a folder; give the folder with the photos"):
        read_photo_sentences(path, folder / "photos")
    with pytest.raises(DataError, match=r"cannot read .*other\.csv: No such file"):
        read_photo_sentences(folder / "other.csv", folder)


def test_the_format_has_a_name_and_is_detected(folder: Path) -> None:
    path = folder / "pairs.CSV"
    path.write_text("photo,sentence\na.jpg,the cup\n")
    assert read_as("sentences", path, images_dir=folder).expressions[0].text == "the cup"
    assert read_annotations(path, images_dir=folder).expressions[0].text == "the cup"
    with pytest.raises(DataError, match=r"looks like a list of photos and sentences, .*eval rec`"):
        read_annotations(path)


def test_there_are_50_hostile_lists() -> None:
    assert len({hostile.name for hostile in HOSTILE_LISTS}) == len(HOSTILE_LISTS) == 50
    assert len({hostile.content for hostile in HOSTILE_LISTS}) == 50


@pytest.mark.parametrize("hostile", HOSTILE_LISTS, ids=lambda hostile: hostile.name)
@pytest.mark.timeout(20)
def test_an_error_about_a_hostile_list_names_row_and_value(
    hostile: HostileList, folder: Path
) -> None:
    assert problem(hostile, folder) == ""


def test_a_byte_order_mark_does_not_hide_a_json_list(folder: Path) -> None:
    path = folder / "pairs.jsonl"
    path.write_bytes(b'\xef\xbb\xbf [{"photo": "a.jpg", "sentence": "the cup"}]')
    with pytest.raises(DataError, match="a JSON list; write JSON lines instead"):
        read_photo_sentences(path, folder)


def test_a_written_list_reads_back_the_same(folder: Path) -> None:
    path = folder / "pairs.csv"
    path.write_text(
        "photo,sentence,x1,y1,x2,y2\n"
        'a.jpg,"the ""red"" cup, left",1,2,30.5,40\n'
        "sub/b.jpg,die Tasse f\u00fcr T\u00fcr 3,,,,\n",
        encoding="utf-8",
    )
    dataset = read_photo_sentences(path, folder)
    write_photo_sentences(dataset, folder / "again.jsonl")
    again = read_photo_sentences(folder / "again.jsonl", folder)
    assert again.images == dataset.images
    assert [e.text for e in again.expressions] == [e.text for e in dataset.expressions]
    assert [i.box_xyxy_px for i in again.instances] == [i.box_xyxy_px for i in dataset.instances]
    assert [e.instance_id is None for e in again.expressions] == [False, True]


class OnePhoto:
    """Knows the photo "known" only."""

    def of(self, name: str) -> ReferringImage:
        if name == "twice":
            raise DataError("the photo 'twice' is there twice")
        if name != "known":
            raise UnknownPhoto(f"the photo {name!r} is new")
        return ReferringImage(image_id="1", file_name="1", width_px=10, height_px=10)


def test_photos_may_be_anywhere_and_unknown_ones_may_be_skipped(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text("photo,sentence\nknown,the cup\nother,the mug\nknown,the plate\n")
    with pytest.raises(DataError, match=r"has 1 problem(.|\n)*row 3: the photo 'other' is new"):
        read_sentence_list(path, OnePhoto())
    skipped: list[str] = []
    dataset = read_sentence_list(path, OnePhoto(), skipped=skipped)
    assert [(e.image_id, e.text) for e in dataset.expressions] == [
        ("1", "the cup"),
        ("1", "the plate"),
    ]
    assert skipped == ["row 3: the photo 'other' is new"]
    # Other problems are errors still, even in a row that would be skipped.
    path.write_text("photo,sentence\nknown,the cup\nother, \ntwice,a\n")
    with pytest.raises(DataError, match="has 2 problems") as refused:
        read_sentence_list(path, OnePhoto(), skipped=skipped)
    assert "row 3: the sentence" in str(refused.value)
    assert "row 4: the photo 'twice' is there twice" in str(refused.value)
