"""How `reir demo` ends: it offers sentences, and hands over to `reir serve` until Ctrl-C."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import yaml

from reir.demo.gallery import DemoSentence, score_demo
from reir.results import Hit, SearchResult
from reir_ingestion.demo import cli


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


BOX = (0.1, 0.1, 0.5, 0.5)


def answered(text: str, photos: list[str], *, found: bool = True) -> SearchResult:
    hits = tuple(
        Hit(
            instance_id=f"{name}#0",
            image_id=name,
            uri=f"file:///photos/{name}.jpg",
            box=BOX,
            score=0.5,
            objectness=0.5,
        )
        for name in photos
    )
    return SearchResult(
        expression=text, gallery="demo", version="v", hits=hits, timings_ms={}, found=found
    )


def test_the_score_counts_first_hits_first_five_hits_and_absent_things() -> None:
    sentences = [*(DemoSentence(f"the {n}", f"{n}.jpg", BOX) for n in "abcd"), DemoSentence("no")]
    results = [
        answered("the a", ["a", "b"]),
        answered("the b", ["x", "y", "z", "w", "b"]),
        answered("the c", ["x", "y", "z", "w", "v", "c"]),
        answered("the d", [], found=False),
        answered("no", ["a"], found=False),
    ]
    score = score_demo(sentences, results)
    assert (score.top1, score.top5, score.absent, score.false_absent) == (0.25, 0.5, 1.0, 0.25)
    first, second = cli.describe_score(score, sentences)
    assert "4 sentences" in first
    assert "right for 25% of them, one of the first five for 50%" in first
    assert "no photo shows: 100% of them" in second
    assert "25% of the others" in second


def test_a_hit_is_right_if_photo_and_box_are() -> None:
    (hit,) = answered("the a", ["a"]).hits
    assert DemoSentence("the a", "a.jpg", BOX).is_answer(hit)
    assert not DemoSentence("the a", "b.jpg", BOX).is_answer(hit)
    assert not DemoSentence("the a", "a.jpg", (0.4, 0.4, 0.9, 0.9)).is_answer(hit)
    assert not DemoSentence("the a").is_answer(hit)


def test_the_page_suggests_solved_sentences_and_one_without_an_answer() -> None:
    sentences = [DemoSentence(f"the {n}", f"{n}.jpg", BOX) for n in range(12)]
    results = [answered(e.text, [str(n) if n % 2 else "x"]) for n, e in enumerate(sentences)]
    absent = [DemoSentence("taken for present"), DemoSentence("recognized as absent")]
    more = [answered(e.text, ["x"], found=not n) for n, e in enumerate(absent)]
    offered = cli.choose_suggestions([*sentences, *absent], [*results, *more])
    assert offered == ["the 1", "the 3", "the 5", "the 7", "the 9", "recognized as absent"]
