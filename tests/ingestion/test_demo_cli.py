"""How `reir demo` ends: it offers sentences, and hands over to `reir serve` until Ctrl-C."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any, Self

import pytest
import yaml

from reir.records import Hit, SearchResult
from reir_ingestion import demo_cli
from reir_ingestion.demo_gallery import DemoExpression


class Server:
    """Stands in for the child process; the first wait may end by Ctrl-C."""

    interrupted = False
    command: tuple[str, ...] = ()

    def __init__(self, command: list[str]) -> None:
        type(self).command = tuple(command)
        self.waits = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.waits == 1 + self.interrupted, "the server was left alone"

    def wait(self) -> int:
        self.waits += 1
        if self.interrupted and self.waits == 1:
            raise KeyboardInterrupt
        return 3


@pytest.mark.parametrize("interrupted", [False, True])
def test_the_page_is_served_by_the_serve_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupted: bool
) -> None:
    monkeypatch.setenv("REIR_HOME", str(tmp_path))
    monkeypatch.setattr(subprocess, "Popen", Server)
    monkeypatch.setattr(Server, "interrupted", interrupted)
    settings: dict[str, Any] = {"galleries": ["demo"], "port": 8123, "examples": ["a: b #c"]}
    assert demo_cli._serve(settings) == 3
    *_, serve, option, file = Server.command
    assert (serve, option) == ("serve", "--config")
    assert yaml.safe_load(Path(file).read_text()) == settings


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


def test_the_page_offers_what_is_answered_right_and_one_thing_that_is_not_there() -> None:
    asked = [DemoExpression(f"the {n}", f"{n}.jpg", (64, 48, 320, 240)) for n in range(12)]
    results = [answered(e.text, e.file_name if n % 2 else "x.jpg") for n, e in enumerate(asked)]
    right = [demo_cli.is_right(r, e) for r, e in zip(results, asked, strict=True)]
    assert right == [bool(n % 2) for n in range(12)]
    offered = demo_cli.offered(asked, right)
    assert offered == ["the 1", "the 3", "the 5", "the 7", "the 9", demo_cli.ABSENT]
