"""Fifty lists of photos and sentences that cannot be used, and what an error must name of each."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from reir.datasets import read_photo_sentences
from reir.errors import DataError

SIZE_PX = (64, 48)
"""Width and height of a.jpg and sub/b.jpg, the only photos that can be read."""
NO_PHOTO, EMPTY, CUT, FOLDER = "no_photo.jpg", "empty.jpg", "cut.jpg", "folder.jpg"
_HEADER = "photo,sentence\n"
_BOX_HEADER = "photo,sentence,x1,y1,x2,y2\n"


@dataclass(frozen=True)
class HostileList:
    """One list that cannot be used.

    Attributes:
        name: what is wrong with it.
        content: its bytes; None for a folder in its place.
        named: what the error must contain: usually the row and the value.
        suffix: end of the name of the file.
    """

    name: str
    content: bytes | None
    named: tuple[str, ...]
    suffix: str = ".csv"

    def write(self, folder: Path) -> Path:
        """Write the list into the folder of `save_photos`, and return its path."""
        path = folder / f"{self.name}{self.suffix}"
        if self.content is None:
            path.mkdir()
        else:
            path.write_bytes(self.content)
        return path


def save_photos(folder: Path) -> None:
    """Write two photos, and files that are no photos."""
    (folder / "sub").mkdir()
    (folder / FOLDER).mkdir()
    for name in ("a.jpg", "sub/b.jpg"):
        Image.new("RGB", SIZE_PX, "gray").save(folder / name)
    (folder / NO_PHOTO).write_bytes(b"this is no photo")
    (folder / EMPTY).touch()
    (folder / CUT).write_bytes((folder / "a.jpg").read_bytes()[:-20])


def problem(hostile: HostileList, folder: Path) -> str:
    """Read a hostile list, and return what is wrong with its error; empty if nothing is.

    Args:
        hostile: the list.
        folder: a folder that `save_photos` filled.
    """
    path = hostile.write(folder)
    try:
        read_photo_sentences(path, folder)
    except DataError as error:
        message = str(error)
        missing = [part for part in (str(path), *hostile.named) if part not in message]
        return f"the error does not name {missing}: {message}" if missing else ""
    return "it was read without an error"


def _no_lists() -> Iterator[HostileList]:
    yield HostileList("a-folder", None, ("is a folder",))
    for name, content, named in (
        ("empty", b"", ("is empty",)),
        ("blank-lines", b"\xef\xbb\xbf\r\n \r\n", ("is empty",)),
        ("header-only", _HEADER.encode(), ("no rows",)),
        ("excel-workbook", b"PK\x03\x04\x14\0\6\0[Content_Types].xml", ("Excel", "UTF-8")),
        ("utf-16", f"{_HEADER}a.jpg,the cup\n".encode("utf-16"), ("UTF-16", "UTF-8")),
        ("utf-16-without-a-mark", f"{_HEADER}a.jpg,x\n".encode("utf-16-le"), ("no text file",)),
        ("json-list", b'[{"photo": "a.jpg", "sentence": "the cup"}]', ("JSON list",)),
    ):
        yield HostileList(name, content, named)


def _headers() -> Iterator[HostileList]:
    for name, text, named in (
        ("no-photo-column", "image,sentence\na.jpg,x\n", ("'photo'", "'image', 'sentence'")),
        ("misspelled-column", "photo,sentense\na.jpg,x\n", ("did you mean 'sentense'?",)),
        ("no-header", "a.jpg,the red cup\na.jpg,the cup\n", ("'a.jpg', 'the red cup'",)),
        ("other-delimiter", "photo|sentence\na.jpg|x\n", ("'photo|sentence'",)),
        ("column-twice", "Photo,sentence,photo\na.jpg,x,a.jpg\n", ("'photo' is there 2 times",)),
        ("box-without-y2", "photo,sentence,x1,y1,x2\na.jpg,x,1,2,3\n", ("missing: y2",)),
        ("box-in-one-column", 'photo,sentence,box\na.jpg,x,"1,2,3,4"\n', ("'box'", "x1, y1")),
        ("header-quote-not-closed", '"photo,sentence\na.jpg,x\n', ("quotes",)),
    ):
        yield HostileList(name, text.encode(), ("row 1: ", *named))


def _rows() -> Iterator[HostileList]:
    """Yield CSV files with a valid row 2, and then a wrong one, which is row 3."""
    good = f"{_HEADER}a.jpg,the red cup\n"
    rows: dict[str, tuple[str, tuple[str, ...]]] = {
        "comma-without-quotes": ("a.jpg,the cup, on the left", ("got 3: ", "quotes")),
        "value-missing": ("a.jpg", ("got 1: 'a.jpg'",)),
        "quote-not-closed": ('a.jpg,"the cup\na.jpg,the mug', ("quotes", "unexpected end")),
        "text-after-quote": ('a.jpg,"the" cup\na.jpg,the mug', ("quotes", "not checked")),
        "sentence-empty": ("a.jpg,", ("the sentence is empty",)),
        "sentence-blank": ('a.jpg," \t "', ("the sentence is empty",)),
        "sentence-invisible": ("a.jpg,\u200b\u200d", ("is empty", "\\u200b")),
        "sentence-too-long": (f"a.jpg,{'cup ' * 200}", ("'cup cup", "799", "512")),
        "sentence-of-a-million-characters": (f"a.jpg,{'c' * 1_000_000}", ("131072",)),
        "sentence-with-zero-byte": ("a.jpg,the \0 cup", ("'the \\x00 cup'",)),
        "photo-blank": (" ,the cup", ("the photo is blank",)),
        "photo-absent": ("missing.jpg,the cup", ("'missing.jpg' is not in",)),
        "photo-of-the-wrong-case": ("A.JPG,the cup", ("'A.JPG' is not in",)),
        "photo-in-the-folder-above": ("../a.jpg,the cup", ("'../a.jpg' is not below",)),
        "photo-leaves-and-returns": ("sub/../a.jpg,the cup", ("'sub/../a.jpg' is not below",)),
        "photo-absolute": ("/etc/hostname,the cup", ("'/etc/hostname' is not below",)),
        "photo-is-a-folder": (f"{FOLDER},the cup", (f"'{FOLDER}' cannot be read",)),
        "photo-is-none": (f"{NO_PHOTO},the cup", (f"'{NO_PHOTO}' cannot be read",)),
        "photo-file-empty": (f"{EMPTY},the cup", (f"'{EMPTY}' cannot be read", "0 bytes")),
        "photo-cut": (f"{CUT},the cup", (f"'{CUT}' cannot be read", "no end")),
        "photo-name-too-long": (f"{'a' * 300}.jpg,the cup", ("'aaa", "cannot be read")),
    }
    for name, (row, named) in rows.items():
        yield HostileList(name, f"{good}{row}\n".encode(), ("row 3: ", *named))
    latin = f"{good}a.jpg,the caf\u00e9\n".encode("latin-1")
    yield HostileList("sentence-in-latin-1", latin, ("row 3: ", "'the caf\u00e9'", "UTF-8"))
    blank_rows = f"{good}\n,\na.jpg,x\nb.jpg,the cup\n".encode()
    yield HostileList("blank-rows-count", blank_rows, ("row 6: ", "'b.jpg'"))
    many = good + "".join(f"{at}.jpg,the cup\n" for at in range(12))
    named = ("has 12 problems", "row 3: ", "'0.jpg'", "row 12: ", "'9.jpg'", "and 2 more")
    yield HostileList("twelve-photos-absent", many.encode(), named)


def _boxes() -> Iterator[HostileList]:
    """Yield CSV files with a valid box in row 2, and then a wrong one."""
    good = f"{_BOX_HEADER}a.jpg,the cup,1,2,30,40\n"
    rows: dict[str, tuple[str, tuple[str, ...]]] = {
        "box-half-blank": ("1,2,,40", ("x2 is blank",)),
        "box-in-words": ("1,two,30,40", ("y1 must be a number", "'two'")),
        "box-not-a-number": ("1,2,nan,40", ("x2 must be a number", "'nan'")),
        "box-without-area": ("30,2,30,40", ("(30, 2, 30, 40) has no area",)),
        "box-outside-its-photo": ("1,2,66,40", ("(1, 2, 66, 40)", "64 x 48 px")),
    }
    for name, (box, named) in rows.items():
        yield HostileList(name, f"{good}a.jpg,the mug,{box}\n".encode(), ("row 3: ", *named))


def _json_lines() -> Iterator[HostileList]:
    """Yield JSON lines with a valid line, a blank one, and then a wrong one, which is line 3."""
    good = json.dumps({"photo": "a.jpg", "sentence": "the cup"})

    def line(**changes: Any) -> str:
        return json.dumps({"photo": "a.jpg", "sentence": "the cup"} | changes)

    lines: dict[str, tuple[str, tuple[str, ...]]] = {
        "line-cut": (good[:-3], ("not valid JSON",)),
        "sentence-is-a-number": (line(sentence=5), ("the sentence must be text, got 5",)),
        "key-missing": ('{"photo": "a.jpg", "text": "the cup"}', ("'sentence'", "'text'")),
        "key-twice": ('{"photo": "b.jpg", ' + good[1:], ("'photo' is there 2 times",)),
        "corner-of-a-box-is-true": (line(x1=True, y1=1, x2=9, y2=9), ("x1 must be", "True")),
    }
    for name, (wrong, named) in lines.items():
        content = f"{good}\n\n{wrong}\n".encode()
        yield HostileList(name, content, ("line 3: ", *named), ".jsonl")


HOSTILE_LISTS = (*_no_lists(), *_headers(), *_rows(), *_boxes(), *_json_lines())
"""All lists; each has another name."""
