"""Makes the writer and the judges that the user names."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from reir.errors import ConfigError
from reir.models.interfaces import InstanceEncoder
from reir.models.nano.color_reader import ColorReader
from reir_ingestion.build_dataset.answers.batches import BatchModel
from reir_ingestion.build_dataset.answers.budget import Budget
from reir_ingestion.build_dataset.answers.cache import AnswerCache
from reir_ingestion.build_dataset.answers.endpoint import EndpointModel, EndpointSettings
from reir_ingestion.build_dataset.answers.local_model import LocalModel
from reir_ingestion.build_dataset.answers.question import VisionLanguageModel
from reir_ingestion.build_dataset.judges.rules import RulesJudge
from reir_ingestion.build_dataset.judges.vision_language import VisionLanguageJudge
from reir_ingestion.build_dataset.outcomes import Builder
from reir_ingestion.build_dataset.scenes import Scene
from reir_ingestion.build_dataset.tasks import ExpressionJudge
from reir_ingestion.build_dataset.writers.template import TemplateWriter
from reir_ingestion.build_dataset.writers.vision_language import VisionLanguageWriter
from reir_ingestion.runner_choice import EXTRA


class WriterName(StrEnum):
    """Who writes the expressions."""

    TEMPLATE = "template"
    ENDPOINT = "endpoint"
    TRANSFORMERS = "transformers"
    RAY_DATA = "ray-data"


class JudgeName(StrEnum):
    """Who judges them."""

    RULES = "rules"
    ENDPOINT = "endpoint"
    TRANSFORMERS = "transformers"
    RAY_DATA = "ray-data"


class Scope(StrEnum):
    """Within what an expression must describe only one instance."""

    PHOTO = "photo"
    GALLERY = "gallery"


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What the user chose.

    Attributes:
        writer: who writes.
        judges: who judges; all must accept an expression.
        model: model of the writer: name at the endpoint, or hub name or directory.
        judge_model: model of the judge; empty for that of the writer.
        endpoint: base URL; empty if no endpoint is used.
        timeout_s: maximum time of one request.
        engines: maximum number of vLLM engines on the Ray cluster.
        engine_arguments: their arguments, such as `tensor_parallel_size`.
        scope: within what an expression must describe only one instance.
        per_instance: maximum number of expressions of an instance.
        ask_again: ask again where a kept answer could not be used.
    """

    writer: WriterName = WriterName.TEMPLATE
    judges: tuple[JudgeName, ...] = (JudgeName.RULES,)
    model: str = ""
    judge_model: str = ""
    endpoint: str = ""
    timeout_s: float = 120.0
    engines: int = 1
    engine_arguments: Mapping[str, Any] = field(default_factory=dict)
    scope: Scope = Scope.GALLERY
    per_instance: int = 3
    ask_again: bool = False

    def __post_init__(self) -> None:
        """Check that each model has a name.

        Raises:
            ConfigError: one has none.
        """
        asked = [(self.writer.value, self.model)]
        asked += [(judge.value, self.model_of_judges) for judge in self.judges]
        for name, model in asked:
            if name in (WriterName.TRANSFORMERS, WriterName.RAY_DATA) and not model:
                raise ConfigError(f"{name} needs the hub name or folder of a model; set --model")

    @property
    def model_of_judges(self) -> str:
        """The model of the judges."""
        return self.judge_model or self.model

    @property
    def uses_ray(self) -> bool:
        """Whether a model runs on a Ray cluster."""
        return self.writer == WriterName.RAY_DATA or JudgeName.RAY_DATA in self.judges


@contextmanager
def connected(choice: Choice) -> Iterator[None]:
    """Stay connected to Ray within this block, if a model runs there.

    Raises:
        ConfigError: Ray is not installed.
        WorkersUnavailable: Ray could not start, or the cluster does not answer.
    """
    if not choice.uses_ray:
        yield
        return
    if importlib.util.find_spec("ray") is None:
        raise ConfigError(f"{WriterName.RAY_DATA} needs Ray, which is not installed: {EXTRA}")
    from reir_ingestion.ray.cluster import start_or_join_ray
    from reir_ingestion.ray.language_model import CPUS_NEEDED

    with start_or_join_ray(CPUS_NEEDED):
        yield


@dataclass(frozen=True)
class BuilderFactory:
    """Makes the builder for the scenes of a run.

    Attributes:
        choice: what the user chose.
        encoder: the encoder of the scenes.
        budget: of all requests.
        work: the work folder.
        colors: compares colors with the pixels; None to compare only vectors.
    """

    choice: Choice
    encoder: InstanceEncoder
    budget: Budget
    work: Path
    colors: ColorReader | None = None
    _loaded: dict[tuple[str, str], AnswerCache] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        """Load the models, so that a wrong name is noticed before photos are read.

        Raises:
            ConfigError: the endpoint or the model is missing or wrong.
            CheckpointError: the model cannot be loaded.
        """
        if self.choice.writer != WriterName.TEMPLATE:
            self._model(self.choice.writer, self.choice.model)
        for judge in self.choice.judges:
            if judge != JudgeName.RULES:
                self._model(judge, self.choice.model_of_judges)

    def __call__(self, scenes: Sequence[Scene]) -> Builder:
        """Return the builder for these scenes."""
        categories = sorted({each.category for scene in scenes for each in scene.instances})
        choice = self.choice
        return Builder(
            writer=(
                TemplateWriter()
                if choice.writer == WriterName.TEMPLATE
                else VisionLanguageWriter(self._model(choice.writer, choice.model))
            ),
            judges=[self._judge(name, categories) for name in choice.judges],
            per_instance=choice.per_instance,
            answers=list(self._loaded.values()),
        )

    def _judge(self, name: JudgeName, categories: Sequence[str]) -> ExpressionJudge:
        in_gallery = self.choice.scope == Scope.GALLERY
        if name == JudgeName.RULES:
            encode = self.encoder.encode_expressions
            return RulesJudge(encode, categories, in_gallery=in_gallery, colors=self.colors)
        return VisionLanguageJudge(
            self._model(name, self.choice.model_of_judges), in_gallery=in_gallery
        )

    def _model(self, kind: str, model: str) -> AnswerCache:
        """Return a model with its cache; the same one for the writer and the judge if possible."""
        if (kind, model) not in self._loaded:
            self._loaded[kind, model] = AnswerCache(
                self._load(kind, model), self.budget, self.work, ask_again=self.choice.ask_again
            )
        return self._loaded[kind, model]

    def _load(self, kind: str, model: str) -> VisionLanguageModel:
        if kind == WriterName.ENDPOINT:
            return self._endpoint(model)
        # The members of `WriterName` and `JudgeName` for the same kind of model have equal values,
        # so either can be compared and used as a key.
        return LocalModel(model) if kind == WriterName.TRANSFORMERS else self._on_ray(model)

    def _on_ray(self, model: str) -> BatchModel:
        from reir_ingestion.ray.language_model import EngineOptions, RayDataEngine, vllm_processor

        options = EngineOptions(engines=self.choice.engines, arguments=self.choice.engine_arguments)
        return BatchModel(RayDataEngine(model, vllm_processor(model, options)), self.budget)

    def _endpoint(self, model: str) -> EndpointModel:
        settings = EndpointSettings(
            url=self.choice.endpoint,
            model=model,
            key=EndpointSettings.key_of_environment(),
            timeout_s=self.choice.timeout_s,
        )
        return EndpointModel(settings, self.budget)
