"""The examples of docs/api.md, run as they are written against a server of drawn photos."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from reir_serving.ray.environment import VARIABLES

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "api.md"
BLOCK = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)
WRITTEN = "localhost:8000"


@pytest.fixture
def place(
    serve: Any,
    backend: Any,
    calibrated: object,
    pair: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> str:
    """Address of a server, in a folder with the photos that the page names."""
    for name in ("mug.jpg", "desk.jpg"):
        (tmp_path / name).write_bytes(pair)
    monkeypatch.chdir(tmp_path)
    return str(serve(backend, search_log=tmp_path / "searches")).removeprefix("http://")


def blocks(language: str, word: str) -> list[str]:
    text = PAGE.read_text(encoding="utf-8")
    return [body for kind, body in BLOCK.findall(text) if kind == language and word in body]


def test_the_python_of_the_page_runs(place: str) -> None:
    names: dict[str, Any] = {}
    found = blocks("python", "")
    assert len(found) == 4
    for body in found:
        exec(body.replace(WRITTEN, place), names)
    assert names["result"].hits


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_curl_of_the_page_runs(place: str, backend: Any) -> None:
    (record, *_) = backend.store.iter_images("photos", "v1")
    texts = [body for body in blocks("", "curl") if "keys" not in body]
    commands = [
        line
        for body in texts
        for line in re.sub(r"\\\n\s*", "", body).splitlines()
        if line.startswith("curl")
    ]
    assert len(commands) == 13
    for command in commands:
        real = command.replace(WRITTEN, place).replace("IMAGE_ID", record.image_id)
        real = real.replace("0123456789abcdef0123#4", f"{record.image_id}#0")
        real = real.replace("0123456789abcdef0123", record.image_id)
        done = subprocess.run(
            ["bash", "-c", f"{real} --fail-with-body"], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}: {done.stdout} {done.stderr}"
        for line in done.stdout.splitlines():
            json.loads(line)
    assert Path("desk-boxes.jpg").read_bytes().startswith(b"\xff\xd8")


def test_the_variables_for_kuberay_are_those_of_the_command() -> None:
    text = (DOCS / "serve.md").read_text(encoding="utf-8")
    (body,) = [body for _, body in BLOCK.findall(text) if body.startswith("env:")]
    listed = {each["name"]: each["value"] for each in yaml.safe_load(body)["env"]}
    ours = {name: value for name, value in VARIABLES.items() if name.startswith("RAY_SERVE_")}
    assert ours.items() <= listed.items()
