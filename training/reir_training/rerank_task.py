"""What a worker needs to train the relation re-ranker of a frozen `clare-nano`."""

# Shapes: M expressions, G photos an expression (its own, the mirror image of it, rivals), P photos
#         of the step, K candidates a photo

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from reir.checkpoint import CONFIG, TOKENIZER, WEIGHTS, save_reranker
from reir.evaluate.reranked import dual_scores, found_at, found_in_photo, reranked_scores
from reir.losses import ranking_loss, soft_target
from reir.models.reranker import (
    PhotoInstances,
    Reranker,
    RerankerConfig,
    RerankInputs,
    pad_inputs,
)
from reir_training.assemble import parameter_groups
from reir_training.batches import MATCH_IOU
from reir_training.cache import FrozenCache
from reir_training.card import write_rerank_card
from reir_training.config import RerankSettings, TrainConfig
from reir_training.examples import VAL, TrainPhoto, describe, divided
from reir_training.plan import Epoch, Stage
from reir_training.rerank_data import RerankData

OWN, MIRROR = 0, 1
"""Columns of `RerankBatch.slots`; rivals follow."""

NONE = -1


@dataclass
class RerankBatch:
    """One step's input.

    Attributes:
        inputs: P photos, each asked one of M expressions.
        slots: (M, G) row of each photo in `inputs`, -1 for none.
        overlap: (M, K) IoU of the candidates of the own photo with the described box.
    """

    inputs: RerankInputs
    slots: Tensor
    overlap: Tensor

    def to(self, device: torch.device | str) -> RerankBatch:
        """Return the batch on a device."""
        return RerankBatch(self.inputs.to(device), self.slots.to(device), self.overlap.to(device))


class RerankObjective(nn.Module):
    """Re-ranker and its loss: the right instance among all of the group, and of its own photo."""

    def __init__(self, model: Reranker) -> None:
        super().__init__()
        self.model = model
        self.log_scale = nn.Parameter(torch.tensor([25.0]).log())

    def forward(self, batch: RerankBatch, stage: Stage) -> tuple[Tensor, dict[str, float]]:  # noqa: ARG002
        """Return the loss and its parts by name."""
        out = self.model(batch.inputs)
        here = batch.slots >= 0
        rows = batch.slots.clamp(min=0)
        valid_MGK = batch.inputs.valid[rows] & here[..., None]
        logits_MGK = self.log_scale.exp() * (out.dual + out.correction)[rows]
        target_MGK = torch.zeros_like(logits_MGK)
        target_MGK[:, OWN] = soft_target(batch.overlap)
        group = ranking_loss(logits_MGK.flatten(1), target_MGK.flatten(1), valid_MGK.flatten(1))
        own = ranking_loss(logits_MGK[:, OWN], target_MGK[:, OWN], valid_MGK[:, OWN])
        return group + own, {"group": group.item(), "own": own.item()}


class GroupMaker:
    """Builds groups: an expression, its photo, and photos that the dual stream confuses with it.

    Args:
        data: encoded photos and expressions.
        settings: how many of what.
    """

    def __init__(self, data: RerankData, settings: RerankSettings) -> None:
        self._data, self._settings = data, settings

    def batch(self, rows: Sequence[int], rng: np.random.Generator) -> RerankBatch:
        """One group for each of some expressions, as it is or mirrored.

        Expressions that are unique only within their photo get no rivals.
        """
        photos: list[PhotoInstances] = []
        asked: list[int] = []
        slots = np.full((len(rows), 2 + self._settings.rivals), NONE)
        overlap, texts = [], []
        for m, row in enumerate(rows):
            each, side = self._data.askings[row], int(rng.integers(2))
            world = self._data.worlds[side]
            texts.append(self._data.texts[int(world.texts[row])])
            overlap.append(world.overlap[row])
            found = {OWN: (side, each.photo)}
            if each.sided:
                found[MIRROR] = (1 - side, each.photo)
            if each.kind == "long":
                near = world.rivals[row]
                drawn = rng.permutation(len(near))[: self._settings.rivals]
                found |= {2 + i: (side, int(near[j])) for i, j in enumerate(drawn)}
            for column, (of_world, photo) in found.items():
                slots[m, column] = len(photos)
                photos.append(self._data.worlds[of_world].photo(photo))
                asked.append(m)
        inputs = pad_inputs(texts, photos, asked)
        num = inputs.valid.shape[1]
        kept = np.stack(overlap)[:, :num]
        return RerankBatch(inputs, torch.from_numpy(slots), torch.from_numpy(kept))


def rerank_data(
    config: TrainConfig, photos: Sequence[TrainPhoto], *, cache: Path, init: Path
) -> RerankData:
    """What a run is trained on; computed where it is not yet beside the cache."""
    return RerankData(
        cache,
        init,
        photos,
        FrozenCache(cache),
        generated_per_photo=config.rerank.generated_per_photo,
        vector_dropout=config.rerank.vector_dropout,
        seed=config.optimisation.seed,
    )


class RerankTask:
    """Trains on what the frozen dual stream says of the photos and expressions of a run.

    Args:
        config: of the run.
        photos: to train on; those of split "val" are left alone.
        cache: folder of the frozen part's output of these photos, already built.
        init: checkpoint directory whose dual stream is re-ranked.
        rank, world_size: of this worker.
    """

    def __init__(  # noqa: PLR0913 - one by one is clearer than a bag
        self,
        config: TrainConfig,
        photos: Sequence[TrainPhoto],
        *,
        cache: Path,
        init: Path,
        rank: int,
        world_size: int,
    ) -> None:
        self._config, self._photos, self._init = config, photos, init
        self._rank, self._world_size = rank, world_size
        settings, seed = config.rerank, config.optimisation.seed
        self.data = rerank_data(config, photos, cache=cache, init=init)
        torch.manual_seed(seed)
        shape = settings.model_dump(include=set(RerankerConfig.__dataclass_fields__))
        self.model = Reranker(
            RerankerConfig(
                dim=self.data.texts.vectors.shape[1],
                text_width=self.data.texts[0].states.shape[1],
                **shape,
            )
        )
        self.model.start_from(*self.data.projection)
        self.objective = RerankObjective(self.model)
        self._maker = GroupMaker(self.data, settings)
        draw = np.random.default_rng(seed).random(len(photos))
        trained = np.array([photo.split != VAL for photo in photos])
        self.held_out = trained & (draw < settings.held_out)
        owners = np.array([each.photo for each in self.data.askings])
        self._rows = np.flatnonzero(~self.held_out[owners])

    @property
    def photos_per_step(self) -> int:
        """Expressions of one step, each with its own photo, over all workers."""
        return self._config.optimisation.photos_per_batch

    def groups(self) -> list[dict[str, Any]]:
        """Optimiser groups."""
        return parameter_groups(self.objective, self._config.optimisation)

    def steps(self, stage: Stage) -> int:  # noqa: ARG002 - there is one stage
        """Steps of one epoch, which shows every expression once."""
        return len(self._rows) // self.photos_per_step

    def batches(self, epoch: Epoch, first: int) -> Iterator[RerankBatch]:
        """This worker's batches from step `first` on, one a part of a step."""
        settings = self._config.optimisation
        parts = settings.accumulate_steps
        order = np.random.default_rng([settings.seed, epoch.number]).permutation(self._rows)
        for i in range(first, self.steps(epoch.stage)):
            whole = order[i * self.photos_per_step : (i + 1) * self.photos_per_step]
            for part in range(self._rank * parts, (self._rank + 1) * parts):
                share = np.array_split(whole, self._world_size * parts)[part]
                rng = np.random.default_rng([settings.seed, epoch.number, i, part])
                yield self._maker.batch(share.tolist(), rng)

    def validate(self) -> dict[str, float]:
        """BR@k and REC on the held-out training photos, re-ranked; `dual_*` as they were."""
        return validate_reranker(self.model, self.data, self.held_out)

    def save(self, folder: Path, about: dict[str, Any]) -> None:
        """Write the checkpoint directory of the dual stream with this re-ranker in it."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in (CONFIG, WEIGHTS, TOKENIZER):
            shutil.copyfile(self._init / name, folder / name)
        save_reranker(folder, self.model, self.data.digest, about)
        write_rerank_card(folder, self._init, about)

    def about(self) -> dict[str, Any]:
        """What the checkpoint says of the data it was made from."""
        return describe(*divided(self._photos)) | {"rerank_held_out": int(self.held_out.sum())}


def validate_reranker(
    model: Reranker, data: RerankData, held_out: npt.NDArray[np.bool_]
) -> dict[str, float]:
    """Percentages on some of the training photos: a gallery of these alone, as they are."""
    world, kept = data.worlds[0], np.flatnonzero(held_out)
    rows = [m for m, a in enumerate(data.askings) if held_out[a.photo] and a.kind == "long"]
    if not rows:
        return {}
    photos = [world.photo(i) for i in kept.tolist()]
    texts = [data.texts[int(world.texts[m])] for m in rows]
    own = np.searchsorted(kept, [data.askings[m].photo for m in rows])
    owner_J = np.repeat(np.arange(len(photos)), [len(photo.boxes) for photo in photos])
    inside = owner_J[None] == own[:, None]
    fits = np.zeros_like(inside)
    for m, row in enumerate(rows):
        fits[m, inside[m]] = world.overlap[row][: inside[m].sum()] >= MATCH_IOU
    dual = dual_scores(texts, photos)
    was_training = model.training
    model.eval()
    scores = {"dual_": dual, "": reranked_scores(model, texts, photos, own)}
    model.train(was_training)
    out: dict[str, float] = {}
    for name, values in scores.items():
        out |= {f"{name}br{k}_50": found_at(values, fits, k).mean() for k in (1, 5, 10)}
        out[f"{name}rec_long"] = found_in_photo(values, fits, inside).mean()
    return {name: round(100 * float(value), 2) for name, value in out.items()}
