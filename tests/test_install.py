"""README's pip lines in a clean environment: the CPU build of torch, the newest of the rest."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from reir_testing import draw_scene

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = """
import json, re, torch
from importlib.metadata import distributions
names = sorted(each.metadata["Name"].lower() for each in distributions())
of_cuda = [name for name in names if re.match("nvidia|cuda|triton", name)]
print(json.dumps([torch.__version__, torch.version.cuda, of_cuda]))
"""
HELPERS_INSTALLED = "import importlib.util; print(bool(importlib.util.find_spec('reir_testing')))"


def readme_lines() -> list[list[str]]:
    """The words of README's pip lines, in order."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return [shlex.split(line) for line in text.splitlines() if line.startswith("pip install ")]


def pinned_torch() -> str:
    """The version in constraints.txt."""
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    (version,) = re.findall(r"^torch==(\S+)$", text, re.MULTILINE)
    return str(version)


def test_the_pinned_torch_is_installed_before_the_package() -> None:
    torch, package = readme_lines()
    assert torch[2:] == ["-c", "constraints.txt", "torch"]
    assert package[2].startswith(".[")
    assert pinned_torch()


class CleanEnvironment:
    """A virtual environment without any package, and a home folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
        self._variables = {**os.environ, "REIR_HOME": str(folder / "home")}

    def run(self, program: str, *words: str, folder: Path | None = None) -> str:
        """Run one of its programs and return what it prints."""
        done = subprocess.run(
            [self.folder / "venv" / "bin" / program, *words],
            cwd=folder or self.folder,
            env=self._variables,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_plain_install_without_constraints_has_the_command_line(tmp_path: Path) -> None:
    clean = CleanEnvironment(tmp_path)
    clean.run("pip", "install", ".", folder=ROOT)
    assert "search" in clean.run("reir", "--help")
    assert clean.run("reir", "--version").startswith("reir")
    assert clean.run("python", "-c", HELPERS_INSTALLED).strip() == "False"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_clean_environment_gets_the_cpu_build_and_searches(tmp_path: Path) -> None:
    clean = CleanEnvironment(tmp_path)
    for line in readme_lines():
        clean.run(*line, folder=ROOT)
    version, cuda, of_cuda = json.loads(clean.run("python", "-c", PACKAGES))
    assert (version.partition("+")[0], cuda, of_cuda) == (pinned_torch(), None, [])

    scenes = {
        "red.png": [("red", (20, 20, 140, 150))],
        "blue.png": [("blue", (120, 40, 230, 170))],
    }
    (tmp_path / "photos").mkdir()
    for name, shapes in scenes.items():
        Image.fromarray(draw_scene((256, 192), shapes)).save(tmp_path / "photos" / name)
    where = ("--gallery", "boxes", "--store", str(tmp_path / "store"))
    clean.run("reir", "index", "photos", *where)
    answer = json.loads(clean.run("reir", "search", "the red box", *where, "--json"))
    assert {Path(hit["uri"]).name for hit in answer["hits"]} == set(scenes)
