"""How many processors a process may use."""

from __future__ import annotations

from pathlib import Path

import pytest

from reir import cores


@pytest.mark.parametrize(("quota", "most"), [("50000 100000", 1), ("max 100000", 10_000)])
def test_the_containers_quota_limits_the_cores(
    quota: str, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpu.max").write_text(quota)
    monkeypatch.setattr(cores, "CPU_QUOTA", tmp_path / "cpu.max")
    assert 1 <= cores.num_cores() <= most
