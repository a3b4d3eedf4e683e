"""The server process: how it is started."""

from __future__ import annotations

import queue
from pathlib import Path

import pytest

from reir_serving.config import ServeConfig
from reir_serving.ray.supervisor import ENDED, ServerProcess, StatusMessage


def test_the_server_process_imports_nothing_from_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    imported = tmp_path / "imported"
    (tmp_path / "secrets.py").write_text(f"open({str(imported)!r}, 'w').close()\n")
    monkeypatch.chdir(tmp_path)
    statuses: queue.SimpleQueue[StatusMessage] = queue.SimpleQueue()
    # Without its folder, the process ends after its imports, and before Ray starts.
    with ServerProcess(ServeConfig(store="memory:"), tmp_path / "none", statuses.put):
        assert statuses.get(timeout=60).kind == ENDED
    assert not imported.exists()
