"""The training task of the published CLARE: model, batches, validation and checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.trainers import WordLevelTrainer
from torch import Tensor

from reir.checkpoint import TOKENIZER, load_clare, read_config, read_tokenizer, save_checkpoint
from reir.datasets.coco_classes import COCO_CLASSES
from reir.errors import CheckpointError, ConfigError
from reir.models.clare.config import ClareConfig, clare_base, clare_large
from reir.models.clare.denoising import DenoisingContent
from reir.models.clare.encoder import ClareEncoder, clean_expression
from reir.models.clare.masks import UPSAMPLING
from reir.models.clare.model import Clare
from reir.models.clare.towers import load_tokenizer, load_towers
from reir_training.clare.data import GROUNDING, ClareBatch, ClareData
from reir_training.clare.objective import ClareObjective
from reir_training.config import ClareTrainConfig
from reir_training.data.examples import TrainPhoto, count_annotations
from reir_training.data.photo_table import read_run_photos
from reir_training.report.model_card import write_clare_card
from reir_training.run.collectives import WorkerCollectives
from reir_training.run.schedule import Epoch, Stage
from reir_training.run.step_stream import Load, StepStream, Stream, load_in_process, load_share
from reir_training.run.validate import validate_encoder

SHAPES = {"clare-base": clare_base, "clare-large": clare_large}
TEXT_TOWER = "model.language."
# The parts with a tenth of the learning rate (docs/clare.md, section 5.1).
SLOW_PARTS = ("model.vision.", "model.pyramid.upsample.", ".sampling_offsets.")
DENOISING = "denoising.safetensors"
"""Checkpoint file with the weights of the denoising queries, which only training uses."""
CHANGEABLE = frozenset(
    {
        *("num_experts", "top_k_experts", "expert_mix", "masks", "neighbors"),
        *("num_candidates", "nms_iou", "shortest_side_px", "longest_side_px"),
    }
)
"""Settings in `shape` that may change with `--init`, because the other weights still fit."""
# In this order, the end token gets the id 1, with which `ClareConfig.pad_token` pads expressions.
UNKNOWN_WORD, END = "<unk>", "</s>"


class ClareTask:
    """Trains the published CLARE on photos that are decoded on demand.

    Args:
        preset: "clare-base" or "clare-large"; `config.shape` may change its settings.
        config: settings of the run.
        init: checkpoint directory to start from.
        rank, world_size: rank of this worker, and number of workers.
        cache: folder in which the processes of a machine share the annotations; without one, each
            process keeps them in memory.
        stream: loads the steps, possibly ahead of time.

    Raises:
        ConfigError: `config` does not fit the model or `init`, or there is nothing to train on.
        CheckpointError: towers, tokenizer or `init` cannot be loaded.
        DataError: the data cannot be read, or contains photos of an evaluation set.
    """

    def __init__(  # noqa: PLR0913 - most are keyword-only
        self,
        preset: str,
        config: ClareTrainConfig,
        *,
        init: Path | None,
        rank: int,
        world_size: int,
        cache: Path | None = None,
        stream: Stream = load_in_process,
    ) -> None:
        settings = config.optimization
        self._preset, self._config = preset, config
        self._rank, self._world_size = rank, world_size
        self._stream = StepStream(stream, settings.accumulate_steps)
        train, self._held_out = read_run_photos(config, cache, masks=config.masks)
        self._describe = partial(count_annotations, train, self._held_out)
        self.model, self.tokenizer = start_clare(preset, config, train, init)
        self._data = ClareData(
            train,
            config.augmentation,
            batch_size=settings.photos_per_batch,
            texts_per_photo=config.texts_per_photo,
            seed=settings.seed,
            mask_stride_px=self.model.config.strides[0] // UPSAMPLING if config.masks else None,
        )
        self.model.checkpoint_activations(config.checkpoint_activations)
        self._half = settings.precision == "bf16"
        # The released code counts possible false negatives as negatives.
        self.objective = ClareObjective(
            self.model,
            self.tokenizer,
            config.loss.model_copy(update={"mask_false_negatives": False})
            if config.paper_parity
            else config.loss,
            workers=WorkerCollectives() if world_size > 1 else None,
            half=self._half,
            denoising=config.denoising,
        )
        if self.objective.denoising is not None and init is not None:
            load_denoising(self.objective.denoising, init)

    @property
    def photos_per_step(self) -> int:
        """Photos per step, over all workers."""
        return self._config.optimization.photos_per_batch

    def groups(self) -> list[dict[str, Any]]:
        """Return the parameter groups: text tower, other parts with a lower rate, the rest."""
        settings = self._config.optimization
        text_factor = settings.text_tower_factor
        factors = {
            "text": settings.tower_factor if text_factor is None else text_factor,
            "slow": settings.tower_factor,
            "rest": 1.0,
        }
        members: dict[str, list[Tensor]] = {group: [] for group in factors}
        for name, parameter in self.objective.named_parameters():
            members[_group_of(name)].append(parameter)
        rates = {group: settings.learning_rate * factor for group, factor in factors.items()}
        return [
            {
                "params": members[group],
                "lr": rate,
                "base_lr": rate,
                "weight_decay": settings.weight_decay,
            }
            for group, rate in rates.items()
        ]

    def steps(self, stage: Stage) -> int:  # noqa: ARG002 - the same for both stages
        """Return the number of steps between two validations."""
        return self._config.optimization.steps_per_epoch

    def batches(self, epoch: Epoch, first: int) -> Iterator[ClareBatch]:
        """Yield this worker's batches from step `first` of the epoch on, one per part of a step."""
        loader = partial(self._loader, epoch.stage)
        for arrays in self._stream.epoch(epoch, self.steps(epoch.stage), first, loader):
            yield ClareBatch.from_arrays(arrays)

    def _loader(self, stage: Stage, num_batches: int) -> Load:
        """Return a function that loads a batch, given its number among those of the stage."""
        parts, share = self._config.optimization.accumulate_steps, self._config.hard_negatives_from
        if stage == "clia":
            # A step has several batches if gradients are accumulated, but the sampler counts steps.
            first_hard_batch = None if share == 1 else math.ceil(share * num_batches / parts)
            sampler = self._data.sampler((GROUNDING,), first_hard_batch)
            per_instance = self._config.expressions_per_instance
        else:
            sampler, per_instance = self._data.sampler(self._data.tasks), 1
        place = (self._rank, self._world_size, parts)
        load = partial(self._data.load, per_instance=per_instance)
        return partial(load_share, load, sampler, place)

    def validate(self) -> dict[str, float]:
        """Evaluate the current weights on the held-out photos."""
        with _training_state_restored(self.model):
            # The weights change in every step, so they have no digest.
            encoder = ClareEncoder(self.model, self.tokenizer, "in training", half=self._half)
            return validate_encoder(encoder, self._held_out)

    def save(self, folder: Path, about: dict[str, Any]) -> None:
        """Write the checkpoint directory, including the model card."""
        save_checkpoint(folder, self.model, self.tokenizer, about)
        # Kept so that a run with `--init` does not learn these weights again.
        if self.objective.denoising is not None:
            state = self.objective.denoising.state_dict()
            save_file({k: v.contiguous() for k, v in state.items()}, folder / DENOISING)
        write_clare_card(folder, about)

    def about(self) -> dict[str, Any]:
        """Return metadata for the checkpoint: preset, towers and size of the training data."""
        towers = self._config.towers
        # The path of a local folder means nothing on another machine.
        named = Path(towers).name if towers and Path(towers).exists() else towers
        return {"preset": self._preset, "towers": named, **self._describe()}


def _group_of(name: str) -> str:
    """Return the parameter group of a parameter."""
    if TEXT_TOWER in name:
        return "text"
    return "slow" if any(part in name for part in SLOW_PARTS) else "rest"


@contextmanager
def _training_state_restored(model: Clare) -> Iterator[None]:
    """Restore the training state of a model after the block.

    `ClareEncoder` puts the model into evaluation mode and freezes its parameters.
    """
    learning = [parameter.requires_grad for parameter in model.parameters()]
    was_training = model.training
    try:
        yield
    finally:
        for parameter, learns in zip(model.parameters(), learning, strict=True):
            parameter.requires_grad_(learns)
        model.train(was_training)


def start_clare(
    preset: str, config: ClareTrainConfig, photos: Sequence[TrainPhoto], init: Path | None
) -> tuple[Clare, Tokenizer]:
    """Return the model and the tokenizer to start from.

    With a checkpoint, `config.shape` may change the experts, the mask branch and settings without
    weights. Weights that the checkpoint lacks are initialized at random.

    Without a checkpoint, the towers are loaded from `config.towers` or initialized at random. The
    tokenizer is `config.tokenizer` or that of the towers; for random towers, it is built from the
    words of the training expressions.

    Raises:
        ConfigError: `preset`, `config.shape` or `config.paper_parity` does not fit the checkpoint.
        CheckpointError: the checkpoint, the towers or their tokenizer cannot be loaded.
    """
    if init is not None:
        check_preset(preset, init)
        model, tokenizer = load_clare(init)
        return with_changed_shape(model, config, init), tokenizer
    if config.tokenizer is not None:
        tokenizer = read_tokenizer(_tokenizer_file(config.tokenizer))
    elif config.towers is not None:
        tokenizer = load_tokenizer(config.towers)
    else:
        tokenizer = build_word_tokenizer([e.text for photo in photos for e in photo.expressions])
    # A tokenizer that is built from the data has another vocabulary than SigLIP's.
    own = {} if config.towers is not None else {"vocabulary": tokenizer.get_vocab_size()}
    torch.manual_seed(config.optimization.seed)
    model = Clare(clare_shape(preset, config, own))
    if config.towers is not None:
        load_towers(model.vision, model.language, config.towers)
    return model, tokenizer


def check_preset(preset: str, init: Path) -> None:
    """Check that a checkpoint was trained with this preset, if it names one.

    Raises:
        ConfigError: it was trained with another preset.
        CheckpointError: its `config.json` is missing or damaged.
    """
    # A checkpoint that does not name a preset is accepted; its weights must still fit the model.
    trained = read_config(init).get("training", {}).get("preset", preset)
    if trained != preset:
        raise ConfigError(
            f"the preset is {preset!r}, but the checkpoint {init} was trained with {trained!r}: "
            f"use --preset {trained}, or train without --init"
        )


def with_changed_shape(model: Clare, config: ClareTrainConfig, init: Path) -> Clare:
    """Return a checkpoint's model, changed to the shape in the configuration.

    Raises:
        ConfigError: the checkpoint's weights do not fit that shape, or `paper_parity` differs.
    """
    own = vars(model.config)
    changed = {name: value for name, value in config.shape.items() if own.get(name) != value}
    if refused := sorted(changed.keys() - CHANGEABLE):
        name = refused[0]
        problem = f"it is {own[name]} in" if name in own else "there is no such setting in"
        raise ConfigError(
            f"shape: {name}={changed[name]}, but {problem} the checkpoint {init}; with --init, "
            f"only {', '.join(sorted(CHANGEABLE))} can be changed: remove {name} from shape, or "
            f"train without --init"
        )
    if config.paper_parity != model.config.paper_parity:
        raise ConfigError(
            f"paper_parity={config.paper_parity}, but the checkpoint {init} was trained with "
            f"{model.config.paper_parity}, which gives scores another meaning; set paper_parity: "
            f"{str(model.config.paper_parity).lower()}, or train without --init"
        )
    if not changed:
        return model
    # New parts are random, but must be the same on all workers.
    torch.manual_seed(config.optimization.seed)
    try:
        other = Clare(replace(model.config, **changed))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"shape: {error}; allowed are the settings of ClareConfig") from error
    needed = other.state_dict()
    fitting = {
        name: value
        for name, value in model.state_dict().items()
        if name in needed and value.shape == needed[name].shape
    }
    other.load_state_dict(fitting, strict=False)
    return other


def load_denoising(content: DenoisingContent, folder: Path) -> None:
    """Load the denoising weights of a checkpoint, if it has any.

    Raises:
        CheckpointError: the file is damaged, or belongs to another model.
    """
    path = folder / DENOISING
    if not path.is_file():
        return
    try:
        content.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} cannot be loaded: {str(error).splitlines()[0]}; restore it, or delete it to "
            f"initialize the denoising queries at random"
        ) from error


def clare_shape(preset: str, config: ClareTrainConfig, own: dict[str, Any]) -> ClareConfig:
    """Return the preset's settings with the changes in the configuration.

    Raises:
        ConfigError: a setting is unknown, or a value is not allowed.
    """
    values = vars(SHAPES[preset](paper_parity=config.paper_parity)) | own | config.shape
    try:
        return ClareConfig(**values)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"shape: {error}; allowed are the settings of ClareConfig") from error


def build_word_tokenizer(texts: Sequence[str]) -> Tokenizer:
    """Build a tokenizer for the words of these texts and of COCO's class names."""
    tokenizer = Tokenizer(WordLevel({UNKNOWN_WORD: 0, END: 1}, unk_token=UNKNOWN_WORD))
    tokenizer.pre_tokenizer = Whitespace()
    trainer = WordLevelTrainer(special_tokens=[UNKNOWN_WORD, END], show_progress=False)
    known = [clean_expression(text) for text in (*texts, *COCO_CLASSES)]
    tokenizer.train_from_iterator(known, trainer)
    return tokenizer


def _tokenizer_file(path: Path) -> Path:
    return path / TOKENIZER if path.is_dir() else path
