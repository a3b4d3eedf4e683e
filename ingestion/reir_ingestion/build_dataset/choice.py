"""Makes the writer and the judges that the user names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from reir.errors import ConfigError
from reir.models.interfaces import InstanceEncoder
from reir_ingestion.build_dataset.answers.budget import Budget
from reir_ingestion.build_dataset.answers.cache import AnswerCache
from reir_ingestion.build_dataset.answers.endpoint import EndpointModel, EndpointSettings
from reir_ingestion.build_dataset.answers.local_model import LocalModel
from reir_ingestion.build_dataset.judges.rules import RulesJudge
from reir_ingestion.build_dataset.judges.vision_language import VisionLanguageJudge
from reir_ingestion.build_dataset.outcomes import Builder
from reir_ingestion.build_dataset.scenes import Scene
from reir_ingestion.build_dataset.tasks import ExpressionJudge
from reir_ingestion.build_dataset.writers.template import TemplateWriter
from reir_ingestion.build_dataset.writers.vision_language import VisionLanguageWriter


class WriterName(StrEnum):
    """Who writes the expressions."""

    TEMPLATE = "template"
    ENDPOINT = "endpoint"
    TRANSFORMERS = "transformers"


class JudgeName(StrEnum):
    """Who judges them."""

    RULES = "rules"
    ENDPOINT = "endpoint"
    TRANSFORMERS = "transformers"


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
    scope: Scope = Scope.GALLERY
    per_instance: int = 3
    ask_again: bool = False


@dataclass(frozen=True)
class BuilderFactory:
    """Makes the builder for the scenes of a run.

    Attributes:
        choice: what the user chose.
        encoder: the encoder of the scenes.
        budget: of all requests.
        work: the work folder.
    """

    choice: Choice
    encoder: InstanceEncoder
    budget: Budget
    work: Path
    _loaded: dict[tuple[str, str], AnswerCache] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        """Load the models, so that a wrong name is noticed before photos are read.

        Raises:
            ConfigError: the endpoint or the model is missing or wrong.
            CheckpointError: the local model cannot be loaded.
        """
        if self.choice.writer != WriterName.TEMPLATE:
            self._model(self.choice.writer, self.choice.model)
        for judge in self.choice.judges:
            if judge != JudgeName.RULES:
                self._model(judge, self._judge_model)

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
        )

    @property
    def _judge_model(self) -> str:
        return self.choice.judge_model or self.choice.model

    def _judge(self, name: JudgeName, categories: Sequence[str]) -> ExpressionJudge:
        in_gallery = self.choice.scope == Scope.GALLERY
        if name == JudgeName.RULES:
            encode = self.encoder.encode_expressions
            return RulesJudge(encode, categories, in_gallery=in_gallery)
        return VisionLanguageJudge(self._model(name, self._judge_model), in_gallery=in_gallery)

    def _model(self, kind: str, model: str) -> AnswerCache:
        """Return a model with its cache; the same one for the writer and the judge if possible."""
        if (kind, model) not in self._loaded:
            load: Callable[[str], EndpointModel | LocalModel]
            load = self._endpoint if kind == WriterName.ENDPOINT else _local
            self._loaded[kind, model] = AnswerCache(
                load(model), self.budget, self.work, ask_again=self.choice.ask_again
            )
        return self._loaded[kind, model]

    def _endpoint(self, model: str) -> EndpointModel:
        settings = EndpointSettings(
            url=self.choice.endpoint,
            model=model,
            key=EndpointSettings.key_of_environment(),
            timeout_s=self.choice.timeout_s,
        )
        return EndpointModel(settings, self.budget)


def _local(model: str) -> LocalModel:
    if not model:
        raise ConfigError("a local model needs a hub name or directory; set --model")
    return LocalModel(model)
