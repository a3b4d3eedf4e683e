"""`benchmarks/_report.py`: what a report says, and what it must not."""

from __future__ import annotations

import importlib.util
import json
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module, writing to a temporary folder."""
    spec = importlib.util.spec_from_file_location("_report", BENCHMARKS / "_report.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    monkeypatch.setenv(module.ALLOW_DIRTY, "1")  # the tests may run with uncommitted changes
    return module


@pytest.fixture
def tree(report: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git repository with one script and one result, which the module takes for its own."""
    root = tmp_path / "tree"
    (root / "benchmarks" / "results").mkdir(parents=True)
    for name in ("benchmarks/x.py", "benchmarks/results/x.json"):
        (root / name).write_text("1\n")
    identity = ("-c", "user.name=x", "-c", "user.email=x@example.org")
    for command in (("init", "-q"), ("add", "."), (*identity, "commit", "-q", "-m", "x")):
        subprocess.run(["git", *command], cwd=root, check=True)
    monkeypatch.setattr(report, "ROOT", root)
    monkeypatch.delenv(report.ALLOW_DIRTY)
    return root


def test_report_says_what_made_the_figures(
    report: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [str(BENCHMARKS / "x.py"), "--n", "3"])
    path = report.write_report("x", {"x.seconds": 1.5}, accelerator="a GPU")
    written = json.loads(path.read_text())
    assert written["command"] == "python benchmarks/x.py --n 3"
    assert written["figures"] == {"x.seconds": 1.5}
    assert written["machine"]["cores"] >= 1
    assert written["machine"]["ram_gib"] > 0
    assert written["machine"]["accelerator"] == "a GPU"
    assert set(written) == {"command", "commit", "date", "machine", "figures"}


def test_report_names_neither_host_nor_paths(
    report: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    secret = tmp_path / "photos"
    monkeypatch.setattr(
        sys, "argv", [str(BENCHMARKS / "x.py"), "--images", str(secret), f"--out={secret}/o"]
    )
    text = report.write_report("x", {}).read_text()
    assert json.loads(text)["command"] == "python benchmarks/x.py --images photos --out=o"
    assert str(tmp_path) not in text
    assert str(BENCHMARKS.parent) not in text
    assert f'"{socket.gethostname()}"' not in text


def test_uncommitted_changes_are_refused_unless_allowed(
    report: ModuleType, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tree / "benchmarks" / "results" / "x.json").write_text("2\n")  # results are not source
    (tree / "notes.txt").write_text("not tracked\n")
    clean = json.loads(report.write_report("x", {"x.n": 1}).read_text())["commit"]
    assert len(clean) == 12
    (tree / "benchmarks" / "x.py").write_text("2\n")
    with pytest.raises(SystemExit, match=rf"x\.json not written: .* {clean}.*REIR_ALLOW_DIRTY=1"):
        report.write_report("x", {"x.n": 2})
    assert json.loads((report.RESULTS / "x.json").read_text())["figures"] == {"x.n": 1}
    monkeypatch.setenv("REIR_ALLOW_DIRTY", "1")
    kept = json.loads(report.write_report("x", {"x.n": 2}).read_text())
    assert (kept["commit"], kept["figures"]) == (f"{clean}+dirty", {"x.n": 2})


def test_figure_that_json_cannot_hold_is_refused(report: ModuleType) -> None:
    with pytest.raises(ValueError, match="JSON"):
        report.write_report("x", {"x.seconds": float("nan")})
    assert not (report.RESULTS / "x.json").exists()
