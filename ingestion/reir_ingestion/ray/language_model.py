"""Answers questions about pictures with vLLM engines on a cluster, by Ray Data LLM.

    questions            blocks in Ray's object store, which moves to disk what memory cannot hold
    request              a task makes the messages and the sampling parameters of each question
    pictures, template   actors that need no GPU; vLLM decodes the picture, and the chat template
                         of the model makes the prompt
    engine               actors with one or more GPUs each
    answer               a task keeps only what the driver needs

A question that an engine cannot answer is a row with an error, and the others go on.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import ray
from ray.data import DataContext, Dataset
from ray.exceptions import RayError, RayTaskError

from reir.errors import CheckpointError, ConfigError, WorkersUnavailable
from reir.text import without_controls
from reir_ingestion.build_dataset.answers.question import (
    MAX_ANSWER_CHARS,
    Answer,
    Question,
    checked_answer,
)
from reir_ingestion.ray.cluster import is_local, quiet_logs, translate_ray_errors

logger = logging.getLogger(__name__)

MAX_TOKENS = 4096
"""Length limit of an answer."""
QUESTIONS_PER_BLOCK = 32
"""An engine gets one block at a time, and the driver its answers. Eight blocks are in progress at
each engine, as many questions as most GPUs can answer at the same time."""
MAX_REASON_CHARS = 200
CPUS_NEEDED = 5
"""Of a Ray that is started on this machine: one for each stage."""
GPU_ARGUMENTS = ("tensor_parallel_size", "pipeline_parallel_size")
"""Engine arguments of vLLM whose product is the number of GPUs of an engine."""
INSTALL = "pip install 'ray[llm]'"

Processor = Callable[[Dataset], Dataset]
"""Adds `generated_text`, `num_input_tokens`, `num_generated_tokens` and `__inference_error__` to
rows with `messages` and `sampling_params`."""


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """The engines of a model.

    Attributes:
        engines: maximum number of engines, each with its own GPUs.
        arguments: engine arguments of vLLM, such as `tensor_parallel_size`.

    Raises:
        ConfigError: a number is out of range.
    """

    engines: int = 1
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name in GPU_ARGUMENTS:
            number = self.arguments.get(name, 1)
            if not isinstance(number, int) or number < 1:
                raise ConfigError(
                    f"--engine-option {name}={number}: expected the number of GPUs, 1 or more"
                )

    @property
    def gpus_per_engine(self) -> int:
        """The number of GPUs of each engine."""
        return math.prod(self.arguments.get(name, 1) for name in GPU_ARGUMENTS)


class RayDataEngine:
    """Answers the questions that were added with one Ray Data job; Ray must be connected.

    Args:
        source: hub name or folder of the model, for provenance.
        processor: asks the model; see `vllm_processor`.
    """

    def __init__(self, source: str, processor: Processor) -> None:
        self._source, self._processor = source, processor
        self._rows: list[dict[str, Any]] = []
        self._blocks: list[ray.ObjectRef] = []

    @property
    def name(self) -> str:
        """The model, for provenance."""
        return f"ray-data:{self._source}"

    @property
    def settings(self) -> Mapping[str, Any]:
        """What an answer depends on, besides the question; the number of GPUs is not."""
        return {"max_tokens": MAX_TOKENS}

    def add(self, key: str, question: Question) -> None:
        """Keep a question for the next run."""
        self._rows.append(
            {
                "key": key,
                "instructions": question.instructions,
                "text": question.text,
                "picture": question.picture,
                "schema": json.dumps(dict(question.schema)),
            }
        )
        if len(self._rows) == QUESTIONS_PER_BLOCK:
            self._close_block()

    def run(self) -> Generator[tuple[str, Answer | str]]:
        """Answer the questions that were added; see `BatchEngine.run`."""
        if self._rows:
            self._close_block()
        # Taken out before anything can fail, so that the next run does not ask these once more.
        blocks, self._blocks = self._blocks, []
        if not blocks:
            return
        try:
            with _ray_data_settings():
                asked = ray.data.from_arrow_refs(blocks).map(request_of)
                answered = self._processor(asked).map(result_of)
                # Without a size, each block arrives as soon as it is answered, and its answers are
                # kept at once; otherwise, blocks would be joined or cut first.
                for block in answered.iter_batches(batch_size=None, batch_format="pyarrow"):
                    yield from (_answer(row) for row in block.to_pylist())
        except RayError as error:
            raise WorkersUnavailable(
                f"the engines of {self._source} failed: {_reason(error)}. Answers that arrived "
                f"are kept: run the same command again to continue"
            ) from error

    def _close_block(self) -> None:
        self._blocks.append(ray.put(pa.Table.from_pylist(self._rows)))
        self._rows = []


def request_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the processor needs for a question."""
    question = Question(
        instructions=row["instructions"],
        text=row["text"],
        picture=row["picture"],
        schema=json.loads(row["schema"]),
    )
    return {
        "key": row["key"],
        "messages": question.messages(),
        "sampling_params": {
            "temperature": 0.0,
            "max_tokens": MAX_TOKENS,
            # As text: Ray Data would fill up a dictionary with the keys of other schemas.
            "structured_outputs": {"json": row["schema"]},
        },
    }


def result_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the driver needs of a row that the processor returns."""
    return {
        "key": row["key"],
        # The additional character shows `checked_answer` that the text is too long.
        "text": row["generated_text"][: MAX_ANSWER_CHARS + 1],
        "tokens_in": row["num_input_tokens"],
        "tokens_out": row["num_generated_tokens"],
        "error": row["__inference_error__"][:MAX_REASON_CHARS],
    }


def _answer(row: Mapping[str, Any]) -> tuple[str, Answer | str]:
    if row["error"]:
        return row["key"], f"no answer: {' '.join(without_controls(row['error']).split())}"
    return row["key"], checked_answer(
        row["text"],
        tokens_in=row["tokens_in"],
        tokens_out=row["tokens_out"],
        cut_off=row["tokens_out"] >= MAX_TOKENS,
    )


def vllm_processor(source: str, options: EngineOptions) -> Processor:
    """Return the processor of a model that vLLM runs; Ray must be connected.

    Args:
        source: hub name or folder of the model, which every node must be able to read.
        options: see `EngineOptions`.

    Raises:
        ConfigError: vLLM is not installed on the nodes, or there are too few GPUs.
        CheckpointError: the model has no chat template, or cannot be read.
    """
    _require_vllm()
    _require_gpus(options)
    with translate_ray_errors():
        # In a worker, since this machine may not see the model; the process ends after it.
        form = ray.get(ray.remote(num_cpus=1, max_calls=1)(chat_format).remote(source))
    return build_vllm_processor(source, options, form)


def build_vllm_processor(source: str, options: EngineOptions, form: Mapping[str, Any]) -> Processor:
    """Return Ray Data LLM's processor.

    Args:
        source: hub name or folder of the model.
        options: see `EngineOptions`.
        form: see `chat_format`.
    """
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    config = vLLMEngineProcessorConfig(
        model_source=source,
        # Without a limit, vLLM reserves memory for many pictures in one question.
        engine_kwargs={"limit_mm_per_prompt": {"image": 1}, **options.arguments},
        concurrency=options.engines,
        batch_size=QUESTIONS_PER_BLOCK,
        should_continue_on_error=True,
        prepare_multimodal_stage={"enabled": True, **form},
        # The engine makes tokens of the prompt, because it must put those of the picture in.
        tokenize_stage=False,
        detokenize_stage=False,
    )
    processor: Processor = build_processor(config)
    return processor


def chat_format(source: str) -> dict[str, Any]:
    """Return how the chat template of a model takes the messages of a question.

    Some templates want the content of a message as parts, some as one string, and some want parts
    only of the user. A template that is given the wrong one fails, or prints Python's form of it.

    Returns:
        Settings of Ray Data's stage that prepares pictures.

    Raises:
        CheckpointError: the model has no chat template, or cannot be read.
    """
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{source} has no processor of transformers: {error}") from error
    if not processor.chat_template:
        raise CheckpointError(
            f"{source} has no chat template; use a model that follows instructions"
        )
    # A template is a program, so each form is tried. One that takes parts for plain text prints
    # them with the key 'type'.
    for system in ([{"type": "text", "text": "first"}], "first"):
        content = [{"type": "text", "text": "second"}]
        messages = [{"role": "system", "content": system}, {"role": "user", "content": content}]
        try:
            text = processor.apply_chat_template(messages, tokenize=False)
        except Exception as error:  # noqa: BLE001 - a template may raise anything
            logger.debug("the chat template of %s does not take parts: %s", source, error)
            continue
        if "first" in text and "second" in text and "'type'" not in text:
            keep_system = isinstance(system, str)
            return {
                "chat_template_content_format": "openai",
                "apply_sys_msg_formatting": keep_system,
            }
    return {"chat_template_content_format": "string", "apply_sys_msg_formatting": False}


def _require_vllm() -> None:
    """Check that vLLM is installed wherever a stage may run.

    Raises:
        ConfigError: it is not.
    """
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    # Without a CPU of its own, the question need not wait on a cluster that is busy.
    look = ray.remote(num_cpus=0)(_has_vllm)
    with translate_ray_errors():
        found = ray.get(
            [
                look.options(label_selector={"ray.io/node-id": node["NodeID"]}).remote()
                for node in nodes
            ]
        )
    without = [
        node["NodeManagerAddress"] for node, has in zip(nodes, found, strict=True) if not has
    ]
    if without:
        raise ConfigError(
            f"ray-data needs vLLM on every node of the Ray cluster; it is missing on "
            f"{len(without)} of {len(nodes)}, such as {without[0]}. Install it there, in Ray's "
            f"environment, with: {INSTALL}"
        )


def _has_vllm() -> bool:
    return importlib.util.find_spec("vllm") is not None


def _require_gpus(options: EngineOptions) -> None:
    """Check that an engine can start.

    Raises:
        ConfigError: Ray runs on this machine alone, which has too few GPUs.
    """
    gpus = ray.cluster_resources().get("GPU", 0.0)
    if gpus >= options.gpus_per_engine:
        return
    needs = f"an engine needs {options.gpus_per_engine} GPUs, and there are {gpus:g}"
    # A cluster may add machines with GPUs later; this machine cannot.
    if is_local():
        raise ConfigError(f"{needs} on this machine; set RAY_ADDRESS to the address of a cluster")
    logger.warning("%s in the cluster, so the run waits for more", needs)


@contextmanager
def _ray_data_settings() -> Iterator[None]:
    """Set Ray Data up for a run, and restore its settings, which belong to the whole process."""
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True  # for `_reason`
    with quiet_logs(), DataContext.current(context), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The maximum number of concurrent tasks")
        yield


def _reason(error: RayError) -> str:
    """Return the line of an error that says why; Ray puts a trace of calls before or after it."""
    if isinstance(error, RayTaskError) and error.cause is not None:
        cause = error.cause
        first, _, _ = str(cause).partition("\n")
        line = f"{type(cause).__name__}: {first}"
    else:
        line = str(error).strip().rpartition("\n")[2]
    return (line.strip() or type(error).__name__)[:MAX_REASON_CHARS].rstrip(".")
