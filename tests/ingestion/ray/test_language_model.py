"""Questions to a vision-language model as a real Ray Data job; only vLLM itself has a stand-in."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from PIL import Image
from ray import cloudpickle
from ray.data import ActorPoolStrategy, Dataset
from ray.llm._internal.batch.stages.base import StatefulStageUDF
from ray.llm._internal.batch.stages.vllm_engine_stage import vLLMEngineStageUDF, vLLMOutputData

from reir.errors import CheckpointError, ConfigError, WorkersUnavailable
from reir_ingestion.build_dataset.answers.batches import BatchModel
from reir_ingestion.build_dataset.answers.budget import Budget, Limits
from reir_ingestion.build_dataset.answers.cache import AnswerCache
from reir_ingestion.build_dataset.answers.question import (
    MAX_ANSWER_CHARS,
    Answer,
    Question,
    VisionLanguageModel,
    checked_answer,
)
from reir_ingestion.build_dataset.build import BuildOptions, BuildReport, build_dataset
from reir_ingestion.build_dataset.choice import BuilderFactory, Choice, JudgeName, WriterName
from reir_ingestion.build_dataset.judges.vision_language import VisionLanguageJudge
from reir_ingestion.build_dataset.outcomes import Builder
from reir_ingestion.build_dataset.photos import open_photos
from reir_ingestion.build_dataset.scenes import SceneReader
from reir_ingestion.build_dataset.writers.vision_language import VisionLanguageWriter
from reir_ingestion.ray import language_model
from reir_ingestion.ray.language_model import (
    MAX_TOKENS,
    QUESTIONS_PER_BLOCK,
    EngineOptions,
    Processor,
    RayDataEngine,
    build_vllm_processor,
    chat_format,
    vllm_processor,
)
from reir_testing import FakeEncoder
from reir_testing.data_engine.drawn_photos import draw_photos
from reir_testing.data_engine.fake_endpoint import good_text
from reir_testing.data_engine.tiny_chat_model import save_tiny_llava

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

FILES = ("reircoco_train.json", "reircoco_val.json", "refused.jsonl", "statistics.json")


@pytest.fixture(scope="module", autouse=True)
def ray_with_gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    """A Ray that believes in a GPU; the test file is in no package, so it travels whole."""
    cloudpickle.register_pickle_by_value(__import__(request.module.__name__))
    ray.init(address="local", num_cpus=6, num_gpus=1, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()
    cloudpickle.unregister_pickle_by_value(__import__(request.module.__name__))


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_llava(tmp_path_factory.mktemp("llava")))


def text_of(messages: list[dict[str, Any]]) -> str:
    """Return the JSON of a question, after a check that the rest of it has arrived."""
    system, user = messages
    assert system["role"] == "system"
    assert system["content"].startswith(("You write", "You check"))
    text, picture = user["content"]
    kind, data = picture["image_url"]["url"].split(",")
    assert kind == "data:image/jpeg;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).format == "JPEG"
    return str(text["text"])


def number_of(text: str) -> int:
    """Return the number of a drawn photo, which is in its caption."""
    (caption,) = json.loads(text)["captions"]
    return int(caption.removeprefix("A drawing with number ").removesuffix("."))


def output(text: str, error: str = "") -> dict[str, Any]:
    """Return the columns that Ray Data LLM adds to a row."""
    numbers = (0, 0) if error else (1000, 100)
    return {
        "generated_text": "" if error else text,
        "num_input_tokens": numbers[0],
        "num_generated_tokens": numbers[1],
        "__inference_error__": error,
    }


def answered_well(dataset: Dataset) -> Dataset:
    """Answer each question well."""

    def answer(row: dict[str, Any]) -> dict[str, Any]:
        assert row["sampling_params"]["temperature"] == 0.0
        schema = json.loads(row["sampling_params"]["structured_outputs"]["json"])
        text = text_of(row["messages"])
        kind = "JudgedAnswer" if "expressions" in json.loads(text) else "WrittenAnswer"
        assert schema["title"] == kind
        return row | output(good_text(json.loads(text)))

    return dataset.map(answer)


class OneByOne:
    """The same answers without batches."""

    name, settings = "ray-data:m", {"max_tokens": MAX_TOKENS}

    def ask(self, question: Question, _: str) -> Answer:
        text = good_text(json.loads(question.text))
        return checked_answer(text, tokens_in=1000, tokens_out=100)


def build(
    photos: Path,
    out: Path,
    model: Callable[[Budget], VisionLanguageModel],
    *,
    judged: bool = True,
) -> tuple[BuildReport, Budget]:
    work = out / "work"
    work.mkdir(parents=True, exist_ok=True)
    budget = Budget(Limits(), work)
    cache = AnswerCache(model(budget), budget, work)
    judges = [VisionLanguageJudge(cache)] if judged else []
    report = build_dataset(
        open_photos(str(photos)),
        out,
        SceneReader(FakeEncoder(), work / "scenes"),
        lambda _: Builder(VisionLanguageWriter(cache), judges, 3, [cache]),
        BuildOptions(threads=2),
    )
    return report, budget


def batches(processor: Processor) -> Callable[[Budget], BatchModel]:
    return lambda budget: BatchModel(RayDataEngine("m", processor), budget)


def forbidden(_: Dataset) -> Dataset:
    pytest.fail("a question was asked again")


def test_batches_give_the_dataset_that_single_questions_give(tmp_path: Path) -> None:
    num = QUESTIONS_PER_BLOCK + 3  # two blocks
    photos = draw_photos(tmp_path / "photos", num=num)
    expected, _ = build(photos, tmp_path / "single", lambda _: OneByOne())
    found, budget = build(photos, tmp_path / "batches", batches(answered_well))
    assert found.statistics == expected.statistics
    assert found.statistics.photos == {"written": num, "refused": 0, "failed": 0}
    for name in FILES:
        single = (tmp_path / "single" / name).read_bytes()
        assert (tmp_path / "batches" / name).read_bytes() == single, name
    assert (budget.num_requests, budget.tokens_in) == (2 * num, 2 * num * 1000)

    again, budget = build(photos, tmp_path / "batches", batches(forbidden))
    assert again.statistics == expected.statistics
    assert budget.num_requests == 2 * num


def test_a_row_that_fails_is_counted_with_its_reason(tmp_path: Path) -> None:
    def answer(row: dict[str, Any]) -> dict[str, Any]:
        text = text_of(row["messages"])
        texts = {0: "", 1: "x" * (MAX_ANSWER_CHARS + 1), 2: "no JSON", 4: "[]"}
        found = output(texts.get(number_of(text), good_text(json.loads(text))))
        if number_of(text) == 3:
            # Ray Data LLM returns all columns of a row with an error, and some of them changed.
            return {"key": row["key"], "extra": 1} | output("", "ValueError: too\x1b long\n  here")
        if number_of(text) == 4:
            found["num_generated_tokens"] = MAX_TOKENS
        return row | found

    photos = draw_photos(tmp_path / "photos", num=6)
    report, _ = build(photos, tmp_path / "out", batches(lambda dataset: dataset.map(answer)))
    found = [(each.status.value, each.reason) for each in report.outcomes]
    assert found[0] == ("refused", "empty: the answer has no text")
    assert found[1] == ("refused", "too large: the answer has more than 100000 characters")
    assert found[2][0] == "refused"
    assert found[2][1].startswith("wrong form: ")
    assert found[3] == ("failed", "no answer: ValueError: too long here")
    assert found[4] == ("refused", "cut off: the answer is longer than the limit of tokens")
    assert found[5] == ("written", "")

    # What was answered is not asked again, however bad the answer is.
    report, budget = build(photos, tmp_path / "out", batches(answered_well))
    assert [each.status.value for each in report.outcomes[:4]] == ["refused"] * 3 + ["written"]
    assert budget.num_requests == 6 + 1 + 2


def test_answers_that_arrived_before_a_failure_are_kept(tmp_path: Path) -> None:
    num = 3 * QUESTIONS_PER_BLOCK
    photos, out = draw_photos(tmp_path / "photos", num=num), tmp_path / "out"
    started = tmp_path / "started"

    def answer(batch: dict[str, Any]) -> dict[str, Any]:
        texts = [text_of(messages) for messages in batch["messages"]]
        if any(number_of(text) == num - 1 for text in texts):
            while not list((out / "work" / "answers").rglob("[!.]*.json")):
                pass
            started.touch()
            raise RuntimeError("the engine is dead")
        columns = [output(good_text(json.loads(text))) for text in texts]
        return batch | {name: [each[name] for each in columns] for name in columns[0]}

    def dying(dataset: Dataset) -> Dataset:
        return dataset.map_batches(answer, batch_size=QUESTIONS_PER_BLOCK)

    message = "the engines of m failed: .*the engine is dead. Answers that arrived are kept"
    with pytest.raises(WorkersUnavailable, match=message):
        build(photos, out, batches(dying))
    assert started.exists()
    kept = len(list((out / "work" / "answers").rglob("[!.]*.json")))
    assert 0 < kept < num
    report, budget = build(photos, out, batches(answered_well))
    assert report.statistics.photos["written"] == num
    assert budget.num_requests == 2 * num


class StandInForPictures(StatefulStageUDF):  # type: ignore[misc]  # Ray has no types
    """Ray Data's stage for pictures, but without vLLM's parser of messages."""

    def __init__(self, data_column: str, expected_input_keys: list[str], **settings: Any) -> None:
        super().__init__(data_column, expected_input_keys)
        assert settings["chat_template_content_format"] == "openai"

    async def udf(self, batch: list[dict[str, Any]]) -> AsyncIterator[dict[str, Any]]:
        for row in batch:
            text = text_of(row["messages"])
            system, _ = row["messages"]
            parts = [{"type": "text", "text": system["content"]}]
            yield {
                self.IDX_IN_BATCH_COLUMN: row[self.IDX_IN_BATCH_COLUMN],
                "messages": [
                    {"role": "system", "content": parts},
                    {
                        "role": "user",
                        "content": [{"type": "text", "text": text}, {"type": "image"}],
                    },
                ],
                "multimodal_data": {"image": [Image.new("RGB", (8, 8))]},
            }


class StandInForEngine(vLLMEngineStageUDF):  # type: ignore[misc]
    """Ray Data's stage for the engine, but without the engine."""

    def __init__(self, data_column: str, expected_input_keys: list[str], **settings: Any) -> None:
        StatefulStageUDF.__init__(self, data_column, expected_input_keys)
        assert settings["engine_kwargs"]["limit_mm_per_prompt"] == {"image": 1}
        assert settings["engine_kwargs"]["max_model_len"] == 8192
        self.should_continue_on_error = settings["should_continue_on_error"]
        self.engine_kwargs = {"disable_log_stats": True}
        self.llm = self

    async def generate_async(self, row: dict[str, Any]) -> tuple[Any, dict[str, Any], float]:
        assert row["multimodal_data"]["image"][0].size == (8, 8)
        assert row["sampling_params"]["max_tokens"] == MAX_TOKENS
        # The tiny model's template puts everything into one line.
        text = row["prompt"][row["prompt"].index("{") :].removesuffix("<image>")
        if number_of(text) == 1:
            raise ValueError("too long")
        answer = vLLMOutputData(
            prompt=row["prompt"],
            num_input_tokens=1000,
            generated_text=good_text(json.loads(text)),
            num_generated_tokens=100,
        )
        at = row[self.IDX_IN_BATCH_COLUMN]
        request = SimpleNamespace(request_id=at, idx_in_batch=at, params="")
        return request, answer.model_dump(), 0.0

    def shutdown(self) -> None:
        """There is no engine to stop."""


@pytest.mark.slow
def test_the_real_processor_takes_our_rows_and_settings(llava: str, tmp_path: Path) -> None:
    options = EngineOptions(engines=2, arguments={"max_model_len": 8192})
    processor: Any = build_vllm_processor(llava, options, chat_format(llava))
    stages = ["PrepareMultimodalStage", "ChatTemplateStage", "vLLMEngineStage"]
    assert processor.list_stage_names() == stages
    assert processor.config.concurrency == 2
    engine = processor.get_stage_by_name("vLLMEngineStage")
    assert engine.map_batches_kwargs["num_gpus"] == 1
    # Ray Data annotates the class as an instance, so an assignment would be refused.
    processor.get_stage_by_name("PrepareMultimodalStage").__dict__["fn"] = StandInForPictures
    engine.__dict__["fn"] = StandInForEngine
    photos = draw_photos(tmp_path / "photos", num=3)
    report, budget = build(photos, tmp_path / "out", batches(processor), judged=False)
    found = [(each.status.value, each.reason) for each in report.outcomes]
    failed = ("failed", "no answer: ValueError: too long")
    assert found == [("written", ""), failed, ("written", "")]
    assert (budget.num_requests, budget.tokens_in) == (3, 2000)


class Unloadable:
    """An engine that cannot load its model."""

    def __init__(self) -> None:
        raise OSError("no file named config.json")

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return batch


def test_an_engine_that_cannot_start_is_reported(tmp_path: Path) -> None:
    def unloadable(dataset: Dataset) -> Dataset:
        return dataset.map_batches(Unloadable, compute=ActorPoolStrategy(size=1))

    message = "the engines of m failed: OSError: no file named config.json. Answers"
    with pytest.raises(WorkersUnavailable, match=message):
        build(draw_photos(tmp_path / "photos"), tmp_path / "out", batches(unloadable))


TEMPLATES = {
    "parts": (
        "{% for m in messages %}{% for p in m['content'] %}{{ p['text'] }}{% endfor %}{% endfor %}",
        {"chat_template_content_format": "openai", "apply_sys_msg_formatting": False},
    ),
    "system as string": (
        "{{ messages[0]['content'] + ' ' }}{% for p in messages[1]['content'] %}{{ p['text'] }}"
        "{% endfor %}",
        {"chat_template_content_format": "openai", "apply_sys_msg_formatting": True},
    ),
    "string": (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% endfor %}",
        {"chat_template_content_format": "string", "apply_sys_msg_formatting": False},
    ),
}


@pytest.mark.parametrize(("template", "expected"), TEMPLATES.values(), ids=TEMPLATES)
def test_messages_take_the_form_that_the_chat_template_wants(
    llava: str, tmp_path: Path, template: str, expected: dict[str, Any]
) -> None:
    for path in Path(llava).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "chat_template.jinja").write_text(template)
    assert chat_format(str(tmp_path)) == expected


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no processor of transformers"):
        chat_format(str(tmp_path))


def test_missing_vllm_is_reported_before_photos_are_read(tmp_path: Path) -> None:
    choice = Choice(writer=WriterName.RAY_DATA, model="m")
    with pytest.raises(ConfigError, match=r"missing on 1 of 1, .*pip install 'ray\[llm\]'"):
        BuilderFactory(choice, FakeEncoder(), Budget(Limits(), tmp_path), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_writer_and_the_judge_share_the_engines(
    llava: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(language_model, "_require_vllm", lambda: None)
    choice = Choice(
        writer=WriterName.RAY_DATA,
        judges=(JudgeName.RULES, JudgeName.RAY_DATA),
        model=llava,
        engines=3,
        engine_arguments={"max_model_len": 8192},
    )
    asked: list[tuple[str, EngineOptions, dict[str, Any]]] = []
    monkeypatch.setattr(language_model, "build_vllm_processor", lambda *given: asked.append(given))
    factory = BuilderFactory(choice, FakeEncoder(), Budget(Limits(), tmp_path), tmp_path)
    builder = factory([])
    assert [each.name for each in builder.answers] == [f"ray-data:{llava}"]
    assert (builder.writer.name, builder.judges[1].name) == (f"ray-data:{llava}",) * 2
    ((source, options, form),) = asked
    assert (source, form) == (llava, chat_format(llava))
    assert options == EngineOptions(engines=3, arguments={"max_model_len": 8192})


def test_too_few_gpus_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language_model, "_require_vllm", lambda: None)
    two = EngineOptions(arguments={"tensor_parallel_size": 2})
    with pytest.raises(ConfigError, match="an engine needs 2 GPUs, and there are 1 on this mach"):
        vllm_processor("m", two)


def test_a_number_of_gpus_must_be_a_number() -> None:
    with pytest.raises(ConfigError, match="tensor_parallel_size=two: expected the number of GPUs"):
        EngineOptions(arguments={"tensor_parallel_size": "two"})
