"""A local model of `transformers`: a random LLaVA answers, though with nonsense."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest

from reir.errors import CheckpointError
from reir_ingestion.build_dataset.answers.budget import Budget, Limits
from reir_ingestion.build_dataset.answers.local_model import LocalModel
from reir_ingestion.build_dataset.answers.picture import as_json, described, numbered_picture
from reir_ingestion.build_dataset.answers.question import Question
from reir_ingestion.build_dataset.build import BuildOptions, build_dataset, work_folder
from reir_ingestion.build_dataset.choice import BuilderFactory, Choice, JudgeName, WriterName
from reir_ingestion.build_dataset.photos import open_photos
from reir_ingestion.build_dataset.scenes import SceneReader
from reir_ingestion.build_dataset.tasks import WritingTask
from reir_testing import FakeEncoder
from reir_testing.data_engine.drawn_photos import draw_photos
from reir_testing.data_engine.tiny_chat_model import save_tiny_llava


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def brief(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model, which ends its answer with any of many tokens."""
    copy = tmp_path_factory.mktemp("brief")
    shutil.copytree(folder, copy, dirs_exist_ok=True)
    settings = json.loads((copy / "generation_config.json").read_text())
    settings["eos_token_id"] = list(range(180, 260))
    (copy / "generation_config.json").write_text(json.dumps(settings))
    return copy


def two_questions(tmp_path: Path) -> list[Question]:
    photos = open_photos(str(draw_photos(tmp_path / "photos"))).photos
    questions = []
    for scene in SceneReader(FakeEncoder(), tmp_path / "work").read(photos)[:2]:
        task = WritingTask(scene=scene)
        question = Question(
            instructions="Describe.",
            text=as_json(described(task)),
            picture=numbered_picture(task),
            schema={},
        )
        questions.append(question)
    return questions


def test_the_model_answers_the_question(brief: Path, tmp_path: Path) -> None:
    model, questions = LocalModel(str(brief), max_tokens=12), two_questions(tmp_path)
    first, second = (model.ask(each, "") for each in questions)
    assert 0 < first.tokens_out < 12
    assert first.refused == ""
    assert first.tokens_in > len(questions[0].text)
    assert model.ask(questions[0], "") == first
    assert first.text != second.text


def test_an_answer_at_the_limit_is_cut_off(folder: Path, tmp_path: Path) -> None:
    answer = LocalModel(str(folder), max_tokens=12).ask(two_questions(tmp_path)[0], "")
    assert answer.tokens_out == 12
    assert answer.refused.startswith("cut off: ")


def test_a_build_accounts_for_nonsense(
    brief: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, photos = tmp_path / "out", draw_photos(tmp_path / "photos", num=2)
    work = work_folder(out)
    choice = Choice(
        writer=WriterName.TRANSFORMERS, judges=(JudgeName.TRANSFORMERS,), model=str(brief)
    )
    monkeypatch.setattr(
        "reir_ingestion.build_dataset.choice.LocalModel", partial(LocalModel, max_tokens=16)
    )
    factory = BuilderFactory(choice, FakeEncoder(), Budget(Limits(), work), work)
    reader = SceneReader(FakeEncoder(), work / "scenes")
    report = build_dataset(open_photos(str(photos)), out, reader, factory, BuildOptions())
    assert report.statistics.photos == {"written": 0, "refused": 2, "failed": 0}
    assert all(
        reason.startswith(("wrong form", "empty")) for reason in report.statistics.photo_reasons
    )


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="image-text-to-text"):
        LocalModel(str(tmp_path))
