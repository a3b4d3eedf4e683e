"""`reir backup` and `reir restore` as typed, on real embedded stores."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from reir.cli import main
from reir.operations.backup.verify import Verdict
from reir.records import ImageRecord, IndexedImage
from reir.store import open_store
from reir_testing.rewriting import SPEC, content_of, image_of

PHOTOS = "photos-00000.parquet"


class Terminal:
    """Runs commands in this process and keeps what they print."""

    def __init__(self, capture: pytest.CaptureFixture[str], store: Path) -> None:
        self.capture = capture
        self.store = store
        self.error = ""

    def run(self, *arguments: str | Path, expect: int = 0, store: Path | None = None) -> str:
        """Run `reir ...` on a store; return standard output."""
        code = main.run([*map(str, arguments), "--store", str(store or self.store)])
        output, self.error = self.capture.readouterr()
        assert code == expect, f"{output}\n{self.error}"
        return output

    def json(self, *arguments: str | Path, **options: Any) -> Any:
        return json.loads(self.run(*arguments, "--json", **options))

    def refused(self, *arguments: str | Path, expect: int, **options: Any) -> str:
        """Run a command that must fail with one line and no traceback; return that line."""
        assert self.run(*arguments, expect=expect, **options) == ""
        assert self.error.startswith("error: ")
        assert self.error.count("\n") == 1
        return self.error.strip()


@pytest.fixture(scope="module")
def store_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with gallery `photos` of 12 photos, one of which failed."""
    folder = tmp_path_factory.mktemp("store")
    bad = ImageRecord(image_id="bad", uri="file:///bad", status="failed", reason="empty")
    with closing(open_store(str(folder))) as store:
        for gallery in ("photos", "idle"):
            store.create_version(gallery, "v1", SPEC)
        images = [image_of(number, content_of(number, 1)) for number in range(11)]
        store.upsert_images("photos", "v1", [*images, IndexedImage(bad, None)])
        store.promote("photos", "v1")
    return folder


@pytest.fixture
def terminal(store_folder: Path, capsys: pytest.CaptureFixture[str]) -> Terminal:
    return Terminal(capsys, store_folder)


def test_a_gallery_moves_to_another_store(terminal: Terminal, tmp_path: Path) -> None:
    folder, other = tmp_path / "b", tmp_path / "other"
    text = terminal.run("backup", "photos", folder)
    assert text.startswith(f"Backed up version v1 of gallery photos to {folder}: 12 photos (1 fail")
    text = terminal.run("restore", folder, store=other)
    assert text.startswith(f"Restored {folder} as version v1 of gallery photos: 12 photos with ")
    assert "It is live: searches of gallery photos use it." in text
    assert "reir promote" not in text
    (row,) = terminal.json("galleries", store=other)
    assert (row["gallery"], row["live"], row["photos"]) == ("photos", "v1", 12)
    text = terminal.run("restore", folder, "--version", "again", store=other)
    assert text.splitlines()[-1] == ("It is not live; to make it live:  reir promote photos again")
    assert terminal.json("versions", "photos", store=other)[1]["live"] is False
    text = terminal.run("restore", folder, "--gallery", "third", "--no-promote", store=other)
    assert "It is not live" in text


def test_json(terminal: Terminal, tmp_path: Path) -> None:
    found = terminal.json("backup", "photos", tmp_path / "b-{date}")
    folder = Path(found["dest"])
    assert folder.parent == tmp_path
    assert (found["photos"], found["failed"], found["version"]) == (12, 1, "v1")
    assert found["bytes"] == sum(path.stat().st_size for path in folder.glob("*.parquet"))
    assert found["recorded"] is True
    (listed,) = terminal.json("backup", "photos", "--list")
    assert listed["dest"] == str(folder)
    assert listed["seconds"] == pytest.approx(found["seconds"], abs=0.01)
    restored = terminal.json("restore", folder, "--promote", store=tmp_path / "other")
    assert (restored["problems"], restored["recall"], restored["live"]) == ([], 1.0, True)


def test_the_list_of_backups(terminal: Terminal, tmp_path: Path) -> None:
    assert terminal.run("backup", "idle", "--list") == ""
    assert terminal.error.strip() == "No backup of gallery idle is recorded in this store."
    terminal.run("backup", "photos", tmp_path / "b")
    header, row = terminal.run("backup", "photos", "--list").splitlines()
    assert header.split() == [
        "version", "ended", "folder", "photos", "instances", "size", "seconds"
    ]  # fmt: skip
    assert row.split()[0] == "v1"
    assert str(tmp_path / "b") in row


def test_mistakes_are_explained_in_one_line(terminal: Terminal, tmp_path: Path) -> None:
    assert "got neither" in terminal.refused("backup", "photos", expect=2)
    assert "got both" in terminal.refused("backup", "photos", tmp_path, "--list", expect=2)
    assert "did you mean 'photos'?" in terminal.refused("backup", "photo", "--list", expect=1)
    assert "no live version" in terminal.refused("backup", "idle", tmp_path / "b", expect=1)
    line = terminal.refused("backup", "photos", tmp_path / "b", "--version", "v2", expect=1)
    assert "has no version 'v2'" in line
    (tmp_path / "notes.txt").touch()
    assert "contains notes.txt" in terminal.refused("backup", "photos", tmp_path, expect=2)
    line = terminal.refused("restore", tmp_path, expect=1)
    assert "it has no manifest.json" in line
    assert "ftp://host" in terminal.refused("restore", "ftp://me:secret@host/x", expect=2)
    assert "secret" not in terminal.error


def test_a_damaged_file_is_named(terminal: Terminal, tmp_path: Path) -> None:
    terminal.run("backup", "photos", tmp_path / "b")
    (tmp_path / "b" / PHOTOS).write_bytes(b"PAR1")
    line = terminal.refused("restore", tmp_path / "b", expect=1, store=tmp_path / "other")
    assert f"{PHOTOS} is damaged: it has 4 bytes instead of" in line
    assert terminal.json("galleries", store=tmp_path / "other") == []


def test_a_version_that_differs_is_reported(
    terminal: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal.run("backup", "photos", tmp_path / "b")
    monkeypatch.setattr(
        "reir.operations.backup.verify.difference_of", lambda *_: "it has 3 photos, not 4"
    )
    other = tmp_path / "other"
    assert terminal.run("restore", tmp_path / "b", expect=1, store=other) == ""
    assert "but it differs from the backup:\n  it has 3 photos, not 4" in terminal.error
    assert "reir rm photos --version v1" in terminal.error
    assert terminal.json("versions", "photos", store=other)[0]["live"] is False
    # The second command continues the restore of the first one, which has created the version.
    found = terminal.json("restore", tmp_path / "b", expect=1, store=other)
    assert (found["problems"], found["existed"]) == (["it has 3 photos, not 4"], False)


@pytest.mark.parametrize("is_live", [True, False])
def test_a_version_that_existed_before_is_not_to_be_deleted(
    terminal: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_live: bool
) -> None:
    """It has the content of the backup, but searches of it do not find enough."""
    terminal.run("backup", "photos", tmp_path / "b")
    other = tmp_path / "other"
    terminal.run("restore", tmp_path / "b", "--no-promote", store=other)
    if is_live:
        terminal.run("promote", "photos", "v1", store=other)
    problem = "searches returned 90.0% of the nearest instances of the backup"
    monkeypatch.setattr(
        "reir.operations.backup.restore.verify", lambda *_: Verdict((problem,), 50, 0.9)
    )
    terminal.run("restore", tmp_path / "b", expect=1, store=other)
    assert f"it differs from the backup:\n  {problem}\n" in terminal.error
    state = "live" if is_live else "not live"
    said = f"It existed before this restore, and is {state}; to get the state of the backup"
    assert said in " ".join(terminal.error.split())
    assert "--version NAME" in terminal.error
    for wrong in ("reir rm", "not made live", "changed"):
        assert wrong not in terminal.error
    found = terminal.json("restore", tmp_path / "b", expect=1, store=other)
    assert (found["existed"], found["live"]) == (True, is_live)


def test_a_missing_package_is_named(tmp_path: Path) -> None:
    # In a process of its own: modules that are imported anew here would be others than those that
    # later tests have imported.
    code = (
        "import sys; sys.modules['pyarrow.parquet'] = None; from reir.cli.main import main; main()"
    )
    command = [sys.executable, "-c", code, "backup", "photos", str(tmp_path / "b")]
    done = subprocess.run(
        [*command, "--store", str(tmp_path / "store")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.rstrip().endswith("pip install pyarrow")
