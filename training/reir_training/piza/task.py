"""The training task of PIZA: model, batches, validation and checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForZeroShotObjectDetection

from reir.models.grounding_dino import MODEL_TYPES, captions_of
from reir.models.piza.checkpoint import save_piza
from reir.models.piza.config import PizaConfig
from reir.models.piza.looks import PizaLooks
from reir.models.piza.model import PizaModel, add_adapters
from reir.models.piza.zoom import ZoomingLocalizer
from reir.models.pretrained import PretrainedModel, load_pretrained
from reir_training.config import PizaTrainConfig
from reir_training.data.examples import TrainPhoto, count_annotations
from reir_training.data.photo_table import locked, read_run_photos
from reir_training.piza.data import PizaBatch, PizaData
from reir_training.piza.history_training import train_history
from reir_training.piza.losses import Grounding, grounding_loss, layers_of
from reir_training.piza.validate import validate_localizer
from reir_training.run.schedule import Epoch, Stage
from reir_training.run.step_stream import Load, StepStream, Stream, load_in_process, load_share

BACKBONE = "base.model.backbone."


class PizaObjective(nn.Module):
    """A grounding model with adapters, and its losses.

    Args:
        model: model to train.
        parts: the base with its tokenizer and image processor.
        half: compute in bf16.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: PizaModel, parts: PretrainedModel, *, half: bool) -> None:
        super().__init__()
        self.model, self._tokenizer, self._half = model, parts.tokenizer, half
        processor = parts.image_processor
        for name in ("mean", "std"):
            # For pixels of 0 to 255; those of the processor are for [0, 1]. They are not saved,
            # because the base has them.
            value = 255 * torch.tensor(getattr(processor, f"image_{name}"))
            self.register_buffer(name, value[:, None, None], persistent=False)

    def forward(self, batch: PizaBatch, stage: Stage) -> tuple[Tensor, dict[str, float]]:  # noqa: ARG002
        """Return the loss and its terms by name."""
        device = batch.pixels.device
        captions = captions_of(self._tokenizer, batch.texts, self.model.max_tokens).to(str(device))
        height, width = batch.pixels.shape[2:]
        inside_H = torch.arange(height, device=device) < batch.size_px[:, :1]
        inside_W = torch.arange(width, device=device) < batch.size_px[:, 1:]
        inside_BHW = inside_H[:, :, None] & inside_W[:, None]
        # Padding becomes 0 after the normalization, as the image processor of the base has it.
        pixels = (batch.pixels.float() - self.mean) / self.std * inside_BHW[:, None]
        with torch.autocast(device.type, torch.bfloat16, enabled=self._half):
            output = self.model(
                pixels,
                inside_BHW.long(),
                captions.input_ids,
                captions.attention_mask,
                batch.histories,
                batch.valid,
                all_layers=True,
            )
        # A box is predicted in [0, 1] of the picture without its padding, as it is in the batch.
        truth = Grounding(batch.boxes, captions.is_word, captions.attention_mask.bool())
        num_tokens, num_queries = captions.input_ids.shape[1], output.logits.shape[1]
        terms: dict[str, Tensor] = {}
        for layer in layers_of(output, num_tokens, num_queries):
            terms |= grounding_loss(layer, truth)
        return torch.stack([*terms.values()]).sum(), {k: v.item() for k, v in terms.items()}


class PizaTask:
    """Trains adapters of a frozen grounding model on photos that are decoded on demand.

    Args:
        config: settings of the run.
        rank, world_size: rank of this worker, and number of workers.
        cache: folder in which the processes of a machine share the annotations and the history
            encoder; without one, each process keeps them in memory.
        stream: loads the steps, possibly ahead of time.

    Raises:
        ConfigError: the settings do not fit one another, or there are no expressions.
        CheckpointError: the base cannot be loaded.
        DataError: the data cannot be read, or contains photos of an evaluation set.
    """

    def __init__(
        self,
        config: PizaTrainConfig,
        *,
        rank: int,
        world_size: int,
        cache: Path | None = None,
        stream: Stream = load_in_process,
    ) -> None:
        settings = config.optimization
        self._config, self._rank, self._world_size = config, rank, world_size
        self._stream = StepStream(stream, settings.accumulate_steps)
        train, self._held_out = read_run_photos(config, cache)
        self._describe = partial(count_annotations, train, self._held_out)
        self._parts = load_pretrained(config.base, AutoModelForZeroShotObjectDetection, MODEL_TYPES)
        self.model = start_piza(config, self._parts.model, train, cache)
        self._scalars = [p for p in self.model.parameters() if p.ndim == 0]
        _reshape(self._scalars, (1,))
        self._data = PizaData(
            train,
            config.augmentation,
            config.history.searches if self.model.config.zooms else None,
            batch_size=settings.photos_per_batch,
            seed=settings.seed,
        )
        half = settings.precision == "bf16"
        self.objective = PizaObjective(self.model, self._parts, half=half)

    @property
    def photos_per_step(self) -> int:
        """Expressions per step, over all workers."""
        return self._config.optimization.photos_per_batch

    def groups(self) -> list[dict[str, Any]]:
        """Return the parameter groups: what is trained of the image backbone, and the rest."""
        settings = self._config.optimization
        rates = {True: settings.learning_rate * settings.backbone_factor}
        rates[False] = settings.learning_rate
        members: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for name, parameter in self.model.trainable():
            members[name.startswith(BACKBONE)].append(parameter)
        return [
            {
                "params": members[is_backbone],
                "lr": rate,
                "base_lr": rate,
                "weight_decay": settings.weight_decay,
            }
            for is_backbone, rate in rates.items()
            if members[is_backbone]
        ]

    def steps(self, stage: Stage) -> int:  # noqa: ARG002 - there is one stage
        """Return the number of steps per epoch, in which every expression is used once."""
        return self._data.sampler.steps_per_epoch

    def batches(self, epoch: Epoch, first: int) -> Iterator[PizaBatch]:
        """Yield this worker's batches from step `first` of the epoch on, one per part of a step."""
        for arrays in self._stream.epoch(epoch, self.steps(epoch.stage), first, self._loader):
            yield PizaBatch.from_arrays(arrays)

    def validate(self) -> dict[str, float]:
        """Search the held-out photos with the current weights; see `validate_localizer`."""
        was_training = self.model.training
        # The model was loaded on the CPU, and the worker may have moved it to a GPU.
        parts = replace(self._parts, device=str(next(self.model.parameters()).device))
        # The weights change in every step, so they have no digest.
        looks = PizaLooks(self.model.eval(), parts, "in training")
        try:
            return validate_localizer(ZoomingLocalizer(looks), self._held_out)
        finally:
            self.model.train(was_training)

    def save(self, folder: Path, about: dict[str, Any]) -> None:
        """Write the checkpoint directory: the adapters, without the base."""
        _reshape(self._scalars, ())
        try:
            save_piza(folder, self.model, about, self._config.base)
        finally:
            _reshape(self._scalars, (1,))

    def about(self) -> dict[str, Any]:
        """Return metadata for the checkpoint: method and size of the training data."""
        return {"preset": "piza", "method": self._config.method, **self._describe()}

    def _loader(self, num_parts: int) -> Load:  # noqa: ARG002 - the same for any number
        place = (self._rank, self._world_size, self._config.optimization.accumulate_steps)
        return partial(load_share, self._data.load, self._data.sampler, place)


def _reshape(parameters: Sequence[nn.Parameter], shape: tuple[int, ...]) -> None:
    """Give parameters with one element another shape: DeepSpeed cannot broadcast scalars."""
    for parameter in parameters:
        parameter.data = parameter.data.reshape(shape)


def start_piza(
    config: PizaTrainConfig, base: Any, photos: Sequence[TrainPhoto], cache: Path | None
) -> PizaModel:
    """Return a base with new adapters and, if the method zooms, a trained history encoder.

    Args:
        config: settings of the run.
        base: grounding model.
        photos: training photos.
        cache: folder in which the processes of a machine share the history encoder; None to train
            it in this process only.

    Raises:
        ConfigError: the settings of the adapters do not fit one another.
    """
    adapters = PizaConfig(
        method=config.method,
        rank=config.rank,
        prompt_tokens=config.prompt_tokens,
        inserted=config.inserted,
        paper_parity=config.paper_parity,
    )
    # New adapters are random, but must be the same on all workers.
    torch.manual_seed(config.optimization.seed)
    model = add_adapters(base, adapters)
    if model.history is not None:
        model.history.load_state_dict(_history_weights(config, photos, cache))
    return model


def _history_weights(
    config: PizaTrainConfig, photos: Sequence[TrainPhoto], cache: Path | None
) -> dict[str, Tensor]:
    """Return the weights of a history encoder for the true boxes of these photos."""
    found = [(photo.boxes[e.box], photo.size_px) for photo in photos for e in photo.expressions]
    targets = np.array([box for box, _ in found], dtype=np.float32)
    sizes_px = [size for _, size in found]
    if cache is None:
        return train_history(targets, sizes_px, settings=config.history).state_dict()
    # The text form of the settings contains all of them, also those of the searches.
    digest = sha256(f"{config.history} {sizes_px}".encode() + targets.tobytes()).hexdigest()[:16]
    path = cache / f"history-{digest}.safetensors"
    # The first process trains, and the others wait and read. The file gets its name when it is
    # complete, so that a killed process leaves nothing that looks finished.
    with locked(cache / "lock"):
        if not path.is_file():
            trained = train_history(targets, sizes_px, settings=config.history)
            save_file(trained.state_dict(), path.with_suffix(".unfinished"))
            path.with_suffix(".unfinished").replace(path)
    return load_file(path)
