"""The units of docs/operations/systemd are valid, and their commands exist with these options."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from reir.cli import main
from reir_testing.repository import ROOT

UNITS = sorted((ROOT / "docs" / "operations" / "systemd").glob("*.service"))
INSTALLED = "/opt/reir/bin/"


def test_there_is_a_unit_for_each_process_that_runs_for_long() -> None:
    assert [each.stem for each in UNITS] == ["reir-monitor", "reir-schedule", "reir-serve"]


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_the_command_of_a_unit_exists(unit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = re.findall(r"^ExecStart=(.*)$", unit.read_text(), re.MULTILINE)
    program, *words = shlex.split(line)
    assert program == f"{INSTALLED}reir"
    options = [word for word in words if word.startswith("--")]
    assert (
        main.run([*(word for word in words if word not in options and "/" not in word), "-h"]) == 0
    )
    help_text = capsys.readouterr().out
    assert all(option in help_text for option in options)


@pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="needs systemd-analyze: apt install systemd"
)
def test_systemd_accepts_the_units(tmp_path: Path) -> None:
    programs = f"{Path(sys.executable).parent}/"
    for unit in UNITS:
        (tmp_path / unit.name).write_text(unit.read_text().replace(INSTALLED, programs))
    files = [tmp_path / unit.name for unit in UNITS]
    done = subprocess.run(
        ["systemd-analyze", "verify", *files], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
