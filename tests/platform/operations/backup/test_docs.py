"""The example of docs/backup.md, run as it is written, reads a backup with pyarrow alone."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from reir.operations.backup import pairs
from reir.operations.backup.format import IMAGE_VECTOR, LEDGER_COLUMNS
from reir.operations.backup.manifest import Manifest
from reir.operations.backup.reports import BackupReport
from reir.store.memory import MemoryStore

PAGE = Path(__file__).parents[4] / "docs" / "backup.md"
BackUp = Callable[..., BackupReport]


@pytest.fixture
def folder(
    full_store: MemoryStore, tmp_path: Path, back_up: BackUp, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A folder with a backup of several files."""
    monkeypatch.setattr(pairs, "FILE_BYTES", 1)
    monkeypatch.setattr("reir.operations.backup.sweeps._BATCH_PHOTOS", 10)
    back_up(full_store, tmp_path / "backup")
    return tmp_path


def block(language: str) -> str:
    found = re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(found) == 1
    return str(found[0])


def test_the_example_reads_a_backup(folder: Path, full_store: MemoryStore) -> None:
    # Without site packages of the platform: an import of reir would fail.
    script = f"import sys; sys.modules['reir'] = None\n{block('python')}"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    uris = {row.uri for row in full_store.iter_images("photos", "v1")}
    assert {line.split()[0] for line in lines} <= uris
    assert [line.split()[1] for line in lines] == ["0", "1", "2"]


@pytest.mark.skipif(shutil.which("jq") is None, reason="needs jq (apt-get install jq)")
def test_the_checksums_can_be_checked_without_the_platform(folder: Path) -> None:
    command = ["bash", "-c", f"set -o pipefail; {block('bash')}"]
    subprocess.run(command, cwd=folder, check=True)
    damaged = folder / "backup" / "instances-00001.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert "instances-00001.parquet: FAILED" in done.stdout


def test_the_page_names_every_column_and_key(folder: Path) -> None:
    named = set(re.findall(r"`(\w+)`", PAGE.read_text(encoding="utf-8")))
    instances = pq.read_schema(folder / "backup" / "instances-00000.parquet").names
    assert {*LEDGER_COLUMNS, IMAGE_VECTOR, *instances, *Manifest.model_fields} - named == set()
