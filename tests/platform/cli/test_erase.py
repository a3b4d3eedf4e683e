"""`reir erase` as typed, on real embedded stores."""

from __future__ import annotations

import json
import os
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from reir.cli import main
from reir.images.decode import image_id
from reir.operations.erase.receipts import write_receipt
from reir.store import open_store
from reir_testing.operations.erased_gallery import GALLERY, fill, photo, uri


class Terminal:
    """Runs `reir erase` in this process and keeps what it prints."""

    def __init__(self, capture: pytest.CaptureFixture[str], store: Path) -> None:
        self.capture, self.store = capture, str(store)
        self.error = ""

    def run(self, *words: str | Path, expect: int = 0) -> str:
        """Return standard output."""
        code = main.run(["erase", *map(str, words), "--store", self.store])
        output, self.error = self.capture.readouterr()
        assert code == expect, f"{output}\n{self.error}"
        return output


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REIR_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def terminal(home: Path, capsys: pytest.CaptureFixture[str]) -> Terminal:
    with closing(open_store(str(home / "store"))) as store:
        fill(store, "v1", "v2")
    return Terminal(capsys, home / "store")


def test_a_photo_is_erased_and_the_receipt_verified(terminal: Terminal, home: Path) -> None:
    log = home / "schedule-runs" / "nightly" / "1.log"
    log.parent.mkdir(parents=True)
    log.write_text("cannot read /data/me/party.jpg\nall other photos\n")
    text = terminal.run(GALLERY, "--photo", "/data/me/party.jpg", "--yes")
    receipt = home / "receipts" / "photos-00000000.json"
    assert text.splitlines() == [
        "version v1: 1 photo with 1 instance",
        "version v2: 1 photo with 1 instance",
        "besides: 1 log line",
        f"Receipt: {receipt}",
        f"To check it:  reir erase --verify {receipt}",
        "Backups written before still contain what was erased; `reir backup photos --list` shows "
        "the last ones.",
    ]
    assert log.read_text().split() == ["all", "other", "photos"]
    assert terminal.run("--verify", receipt).startswith("Nothing is left of what receipt 0 of gal")
    with closing(open_store(terminal.store)) as store:
        store.upsert_images(GALLERY, "v1", [photo("party.jpg")])
    found = terminal.run("--verify", receipt, expect=1).splitlines()
    assert found[0].startswith(f"version v1 has photo {image_id(uri('party.jpg'))}")
    assert found[1] == f"  -> erase it again: `reir erase {GALLERY} --photo IMAGE_ID`"
    found = json.loads(terminal.run("--verify", receipt, "--json", expect=1))
    assert (found["is_clean"], len(found["findings"])) == (False, 1)


def test_json(terminal: Terminal, tmp_path: Path) -> None:
    path = tmp_path / "receipt.json"
    where = f'uri == "{uri("mug.jpg")}"'
    found = json.loads(
        terminal.run(GALLERY, "--where", where, "--receipt", path, "--yes", "--json")
    )
    assert (found["receipt"], found["scope"], found["photos"]) == (
        str(path),
        "where",
        {"v1": 1, "v2": 1},
    )
    assert json.loads(path.read_text())["hash"] == found["hash"]
    assert "mug" not in path.read_text()


def test_a_receipt_never_replaces_a_file(terminal: Terminal, home: Path) -> None:
    """The numbers count per store, so another store may have written one of the same name."""
    earlier = home / "receipts" / "photos-00000000.json"
    earlier.parent.mkdir()
    earlier.write_text("of another store")
    words = (GALLERY, "--photo", "/data/me/mug.jpg", "--yes")
    terminal.run(*words, "--receipt", earlier, expect=main.INVALID_USE)
    assert f"the receipt cannot be written to {earlier} (the file exists)" in terminal.error
    with closing(open_store(terminal.store)) as store:
        assert store.num_stored(GALLERY, "v1") == 4
    made = earlier.with_name("photos-00000000-2.json")
    assert f"Receipt: {made}" in terminal.run(*words)
    assert earlier.read_text() == "of another store"
    assert sorted(earlier.parent.iterdir()) == [made, earlier]
    assert terminal.run("--verify", made).startswith("Nothing is left of what receipt 0")


def test_nothing_is_erased_on_a_full_disk(
    terminal: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("os.fsync", full)
    path = tmp_path / "new" / "receipt.json"
    words = (GALLERY, "--photo", "/data/me/mug.jpg", "--yes", "--receipt", path)
    terminal.run(*words, expect=main.INVALID_USE)
    assert f"cannot be written to {path} (No space left on device), so nothing" in terminal.error
    assert list(path.parent.iterdir()) == []
    with closing(open_store(terminal.store)) as store:
        assert store.num_stored(GALLERY, "v1") == 4


def test_a_receipt_that_cannot_be_written_any_more_is_written_by_the_next_run(
    terminal: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "receipts"

    def lose_folder(step: str) -> None:
        if step.startswith("rewriting"):
            folder.rmdir()
            folder.write_text("")

    path = folder / "one.json"
    words = (GALLERY, "--photo", "/data/me/mug.jpg", "--yes", "--receipt", path)
    with monkeypatch.context() as patch:
        patch.setattr("reir.cli.erase._show_step", lose_folder)
        terminal.run(*words, expect=main.FAILED)
    assert f"the receipt cannot be written to {path} (" in terminal.error
    assert "run the same command again" in terminal.error
    folder.unlink()
    assert "version v1: 1 photo with 2 instances" in terminal.run(*words)
    assert terminal.run("--verify", path).startswith("Nothing is left of what receipt 1")


def test_an_interrupted_command_can_be_typed_again(
    terminal: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interruption came after its receipt was written, so the file exists."""
    path, words = interrupt_after_the_receipt(terminal, tmp_path, monkeypatch)
    again = path.with_name("one-2.json")
    assert f"Receipt: {again}" in terminal.run(*words)
    for receipt in (path, again):
        assert terminal.run("--verify", receipt).startswith("Nothing is left of what receipt")
    # Nothing is interrupted any more.
    terminal.run(*words, expect=main.INVALID_USE)
    assert f"cannot be written to {path} (the file exists), so nothing was erased" in terminal.error


def test_an_interrupted_erasure_is_not_said_to_have_erased_nothing(
    terminal: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, words = interrupt_after_the_receipt(terminal, tmp_path, monkeypatch)
    (tmp_path / "file").write_text("")
    below = tmp_path / "file" / "one.json"
    terminal.run(*words[:-1], below, expect=main.INVALID_USE)
    assert f"the receipt cannot be written to {below} (" in terminal.error
    assert "so the erasure that was interrupted was not finished" in terminal.error
    assert "nothing was erased" not in terminal.error


def interrupt_after_the_receipt(
    terminal: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, tuple[str | Path, ...]]:
    """Erase, but press Ctrl-C when the receipt has just been written.

    Returns:
        The receipt, and the words of the command.
    """
    path = tmp_path / "one.json"
    words = (GALLERY, "--photo", "/data/me/mug.jpg", "--yes", "--receipt", path)

    def write_and_interrupt(*of_receipt: Any) -> None:
        write_receipt(*of_receipt)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("reir.operations.erase.receipts.write_receipt", write_and_interrupt)
        terminal.run(*words, expect=main.INTERRUPTED)
    return path, words


@pytest.mark.parametrize("place", ["file/receipt.json", "folder"])
def test_nothing_is_erased_if_the_receipt_cannot_be_written(
    terminal: Terminal, tmp_path: Path, place: str
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    words = (GALLERY, "--photo", "/data/me/mug.jpg", "--yes", "--receipt", tmp_path / place)
    assert terminal.run(*words, expect=main.INVALID_USE) == ""
    assert f"the receipt cannot be written to {tmp_path / place}" in terminal.error
    assert "name another file with --receipt" in terminal.error
    with closing(open_store(terminal.store)) as store:
        assert store.num_stored(GALLERY, "v1") == 4


def test_without_an_erasure_there_is_no_file(terminal: Terminal, tmp_path: Path) -> None:
    path = tmp_path / "new" / "new.json"
    words = (GALLERY, "--tenant", "none", "--yes", "--receipt", path)
    terminal.run(*words, expect=main.FAILED)
    assert list(path.parent.iterdir()) == []


def test_nothing_is_erased_without_consent(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def refuse(question: str, **_: object) -> None:
        asked.append(question)
        raise KeyboardInterrupt

    monkeypatch.setattr("typer.confirm", refuse)
    terminal.run(GALLERY, "--photo", "/data/me/mug.jpg", expect=main.INTERRUPTED)
    assert asked == ["Erase 1 photo of gallery photos for good?"]
    terminal.run(GALLERY, "--photo", "/data/me/mug.jpg", "--json", expect=main.INVALID_USE)
    assert "cannot ask for confirmation; add --yes" in terminal.error
    with closing(open_store(terminal.store)) as store:
        assert store.num_stored(GALLERY, "v1") == 4


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (("--photo", "x"), main.INVALID_USE, "name the gallery: `reir erase GALLERY"),
        ((GALLERY,), main.INVALID_USE, "exactly one of them is needed, got 0"),
        ((GALLERY, "--photo", "x", "--tenant", "a"), main.INVALID_USE, "is needed, got 2"),
        (("photo", "--photo", "x"), main.FAILED, "did you mean 'photos'?"),
        ((GALLERY, "--tenant", "a", "--yes"), main.FAILED, "fits --tenant 'a'"),
        ((GALLERY, "--where", "attr.", "--yes"), main.INVALID_USE, "cannot parse 'attr.'"),
        (("--verify", "no.json"), main.FAILED, "no.json is not a receipt of `reir erase`"),
    ],
)
def test_mistakes_are_explained(
    terminal: Terminal, words: tuple[str, ...], status: int, message: str
) -> None:
    assert terminal.run(*words, expect=status) == ""
    assert message in terminal.error
