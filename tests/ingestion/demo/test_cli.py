"""How `reir demo` ends: it offers sentences, and hands over to `reir serve` until Ctrl-C."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import yaml

from reir.results import Hit, SearchResult
from reir_ingestion.demo import cli
from reir_ingestion.demo.gallery import DemoExpression


def test_the_demo_process_becomes_the_serve_command(tmp_path: Path) -> None:
    settings = {"galleries": ["nowhere"], "store": str(tmp_path / "store"), "examples": ["a: b #c"]}
    code = f"from reir_ingestion.demo.cli import _become_server; _become_server({settings!r})"
    environment = {**os.environ, "REIR_HOME": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, text=True
    ) as process:
        while b"--config" not in (line := Path(f"/proc/{process.pid}/cmdline").read_bytes()):
            assert process.poll() is None, "it ended before it became the server"
            time.sleep(0.01)
        assert line.split(b"\0")[-4:-2] == [b"serve", b"--config"]
        assert process.stderr is not None
        assert "nowhere" in process.stderr.read()
    assert process.returncode != 0
    assert yaml.safe_load((tmp_path / "demo" / "serve.yaml").read_text()) == settings


def answered(text: str, file_name: str) -> SearchResult:
    hit = Hit(
        instance_id="a#0",
        image_id="a",
        uri=f"file:///photos/{file_name}",
        box=(0.1, 0.1, 0.5, 0.5),
        score=0.5,
        objectness=0.5,
    )
    return SearchResult(expression=text, gallery="demo", version="v", hits=(hit,), timings_ms={})


def test_the_page_suggests_solved_sentences_and_one_without_an_answer() -> None:
    asked = [DemoExpression(f"the {n}", f"{n}.jpg", (64, 48, 320, 240)) for n in range(12)]
    results = [answered(e.text, e.file_name if n % 2 else "x.jpg") for n, e in enumerate(asked)]
    right = [cli.is_correct(r, e) for r, e in zip(results, asked, strict=True)]
    assert right == [bool(n % 2) for n in range(12)]
    offered = cli.choose_suggestions(asked, right)
    assert offered == ["the 1", "the 3", "the 5", "the 7", "the 9", cli.ABSENT]
