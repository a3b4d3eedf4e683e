"""Batches of questions without Ray: what is asked, kept, limited and asked again."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Generator
from pathlib import Path

import pytest

from reir.errors import WorkersUnavailable
from reir_ingestion.build_dataset.answers.batches import NOT_ANSWERED, BatchModel
from reir_ingestion.build_dataset.answers.budget import Budget, Limits
from reir_ingestion.build_dataset.answers.cache import AnswerCache
from reir_ingestion.build_dataset.answers.failures import (
    AnswerPending,
    AnswerRefused,
    ModelUnavailable,
)
from reir_ingestion.build_dataset.answers.question import Answer, Question, checked_answer
from reir_ingestion.build_dataset.build import BuildOptions, BuildReport, build_dataset
from reir_ingestion.build_dataset.judges.vision_language import VisionLanguageJudge
from reir_ingestion.build_dataset.outcomes import Builder
from reir_ingestion.build_dataset.photos import open_photos
from reir_ingestion.build_dataset.scenes import SceneReader
from reir_ingestion.build_dataset.writers.vision_language import VisionLanguageWriter
from reir_testing import FakeEncoder
from reir_testing.data_engine.drawn_photos import draw_photos
from reir_testing.data_engine.fake_endpoint import good_text


def well(question: Question) -> Answer:
    return checked_answer(good_text(json.loads(question.text)), tokens_in=1000, tokens_out=100)


class FakeEngine:
    """Answers with a function, and records what it was asked in each run."""

    name, settings = "fake", {"max_tokens": 1}

    def __init__(self, answer: Callable[[Question], Answer | str | None] = well) -> None:
        self._answer, self._added = answer, dict[str, Question]()
        self.runs: list[list[str]] = []

    def add(self, key: str, question: Question) -> None:
        assert key not in self._added
        self._added[key] = question

    def run(self) -> Generator[tuple[str, Answer | str]]:
        asked, self._added = self._added, {}
        self.runs.append([])
        for key, question in asked.items():
            self.runs[-1].append(key)
            answer = self._answer(question)
            if answer is not None:
                yield key, answer


def question(text: str = "{}") -> Question:
    return Question(instructions="i", text=text, picture=b"p", schema={})


def caches(
    work: Path, engine: FakeEngine, limits: Limits | None = None, *, ask_again: bool = False
) -> tuple[AnswerCache, Budget]:
    work.mkdir(parents=True, exist_ok=True)
    budget = Budget(limits or Limits(), work)
    return AnswerCache(BatchModel(engine, budget), budget, work, ask_again=ask_again), budget


def build(
    photos: Path,
    out: Path,
    engine: FakeEngine,
    limits: Limits | None = None,
    *,
    ask_again: bool = False,
) -> tuple[BuildReport, Budget, list[tuple[str, int, int]]]:
    cache, budget = caches(out / "work", engine, limits, ask_again=ask_again)
    told: list[tuple[str, int, int]] = []
    report = build_dataset(
        open_photos(str(photos)),
        out,
        SceneReader(FakeEncoder(), out / "work" / "scenes"),
        lambda _: Builder(VisionLanguageWriter(cache), [VisionLanguageJudge(cache)], 3, [cache]),
        BuildOptions(threads=4, progress=lambda *values: told.append(values)),
    )
    return report, budget, told


def test_the_writer_and_the_judge_get_one_batch_each(tmp_path: Path) -> None:
    photos, engine = draw_photos(tmp_path / "photos"), FakeEngine()
    report, _, told = build(photos, tmp_path / "out", engine)
    assert report.statistics.photos == {"written": 4, "refused": 0, "failed": 0}
    assert [len(run) for run in engine.runs] == [4, 4]
    assert [each for each in told if each[0] != "reading photos"] == [
        *(("answering questions, round 1", done, 4) for done in (1, 2, 3, 4)),
        *(("answering questions, round 2", done, 4) for done in (1, 2, 3, 4)),
        *(("writing expressions", done, 4) for done in (1, 2, 3, 4)),
    ]


def test_equal_questions_are_asked_once(tmp_path: Path) -> None:
    engine = FakeEngine(lambda _: checked_answer("yes", tokens_in=1, tokens_out=1))
    cache, budget = caches(tmp_path, engine)
    for _ in range(2):
        with pytest.raises(AnswerPending):
            cache.ask(question())
    assert cache.num_waiting == 1
    assert len(list(cache.answer_waiting())) == 1
    assert cache.ask(question()) == "yes"
    assert (cache.num_waiting, budget.num_requests) == (0, 1)


def test_a_question_without_an_answer_fails_in_this_run_only(tmp_path: Path) -> None:
    answers = {"a": "too long", "b": None}
    cache, _ = caches(tmp_path, FakeEngine(lambda asked: answers[asked.text]))
    for text in answers:
        with pytest.raises(AnswerPending):
            cache.ask(question(text))
    assert list(cache.answer_waiting()) == []
    for text, why in (("a", "too long"), ("b", NOT_ANSWERED)):
        with pytest.raises(ModelUnavailable, match=why):
            cache.ask(question(text))
    assert cache.num_waiting == 0
    again, budget = caches(tmp_path, FakeEngine())
    assert budget.num_requests == 1  # the one that came back
    with pytest.raises(AnswerPending):
        again.ask(question("a"))


def test_asking_again_asks_once_in_each_run(tmp_path: Path) -> None:
    for ask_again, num_waiting in ((True, 1), (False, 0), (True, 1)):
        empty = FakeEngine(lambda _: checked_answer("", tokens_in=1, tokens_out=1))
        cache, _ = caches(tmp_path, empty, ask_again=ask_again)
        with pytest.raises(AnswerPending if num_waiting else AnswerRefused):
            cache.ask(question())
        assert cache.num_waiting == num_waiting
        list(cache.answer_waiting())
        with pytest.raises(AnswerRefused, match="empty"):
            cache.ask(question())


def test_each_question_takes_one_request_of_the_budget(tmp_path: Path) -> None:
    photos, out = draw_photos(tmp_path / "photos"), tmp_path / "out"
    report, budget, _ = build(photos, out, FakeEngine(), Limits(max_requests=6))
    assert budget.num_requests == 6
    assert report.statistics.photos == {"written": 2, "refused": 0, "failed": 2}
    reasons = {each.reason for each in report.outcomes} - {""}
    assert reasons == {"the budget of 6 requests is used up"}
    report, budget, _ = build(photos, out, FakeEngine(), Limits(max_requests=8))
    assert report.statistics.photos["written"] == 4
    assert budget.num_requests == 8


def test_a_batch_ends_when_the_cost_is_reached(tmp_path: Path) -> None:
    photos, out = draw_photos(tmp_path / "photos"), tmp_path / "out"
    limits = Limits(max_cost=2.5, price_in=1.0)  # each question costs 1
    engine = FakeEngine()
    report, budget, _ = build(photos, out, engine, limits)
    assert [len(run) for run in engine.runs] == [3]
    assert (budget.num_requests, budget.cost) == (3, 3.0)
    assert report.statistics.photos["failed"] == 4
    assert {each.reason for each in report.outcomes} == {"the budget of 2.5 is used up"}
    report, budget, _ = build(photos, out, FakeEngine())
    assert report.statistics.photos["written"] == 4
    assert budget.num_requests == 8


def test_an_interrupted_batch_keeps_what_arrived_and_counts_only_that(tmp_path: Path) -> None:
    photos, out = draw_photos(tmp_path / "photos"), tmp_path / "out"
    asked = []

    def interrupted(each: Question) -> Answer:
        asked.append(each)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return well(each)

    with pytest.raises(KeyboardInterrupt):
        build(photos, out, FakeEngine(interrupted))
    engine = FakeEngine()
    report, budget, _ = build(photos, out, engine)
    # First what the writer has not answered, beside the judge's questions about the other photos.
    assert [len(run) for run in engine.runs] == [4, 2]
    assert report.statistics.photos["written"] == 4
    assert budget.num_requests == 8
    rerun = FakeEngine()
    build(photos, out, rerun)
    assert rerun.runs == []


def test_a_batch_that_fails_as_a_whole_ends_the_build(tmp_path: Path) -> None:
    def failing(_: Question) -> Answer:
        raise WorkersUnavailable("the engines failed")

    with pytest.raises(WorkersUnavailable, match="the engines failed"):
        build(draw_photos(tmp_path / "photos"), tmp_path / "out", FakeEngine(failing))
    assert not (tmp_path / "out" / "photos.jsonl").exists()


def test_templates_do_not_import_ray(tmp_path: Path) -> None:
    photos = draw_photos(tmp_path / "photos", num=1)
    code = (
        "import sys, atexit\n"
        "atexit.register(lambda: print('ray' in sys.modules))\n"
        "from reir_testing.data_engine.command import main\n"
        "main()"
    )
    command = [sys.executable, "-c", code, str(photos), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False"
