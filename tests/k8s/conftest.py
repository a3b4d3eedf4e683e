"""What tests of the monitoring and the manifests need."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from reir_k8s.manifests import OVERLAYS, Manifest, render
from reir_testing.prometheus_server import ProgramMissing, require_program


@pytest.fixture
def promtool() -> Callable[..., None]:
    """Run promtool with these arguments, and fail with its output if it fails."""
    try:
        program = require_program("promtool")
    except ProgramMissing as missing:
        pytest.skip(str(missing))

    def run(*arguments: str | Path) -> None:
        done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    return run


@pytest.fixture(params=OVERLAYS)
def manifests(request: pytest.FixtureRequest) -> Sequence[Manifest]:
    """The manifests of each overlay in turn."""
    return render(request.param)
