"""The training task of the relation re-ranker of a frozen `clare-nano`."""

# Shapes: M expressions, G photos per expression (its own, the mirror image, hard negatives),
#         P photos of the step, K candidates per photo

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from reir.checkpoint import save_reranker
from reir.evaluate.rerank_metrics import dual_scores, hits_at, hits_in_photo, reranked_scores
from reir.losses import ranking_loss, soft_target
from reir.models.reranker import (
    PhotoInstances,
    Reranker,
    RerankerConfig,
    RerankInputs,
    pad_inputs,
)
from reir_training.config import NanoTrainConfig, RerankSettings
from reir_training.data.examples import VAL, TrainPhoto, count_annotations, split_held_out
from reir_training.nano.batches import MATCH_IOU
from reir_training.nano.cache import FrozenCache
from reir_training.report.model_card import write_rerank_card
from reir_training.rerank.data import RerankData
from reir_training.run.row_task import RowTask, copy_checkpoint
from reir_training.run.schedule import Stage

OWN, MIRROR = 0, 1
"""Columns of `RerankBatch.slots`; the hard negatives follow."""

NONE = -1


@dataclass
class RerankBatch:
    """The input of one step.

    Attributes:
        inputs: P photos, each with one of M expressions.
        slots: (M, G) for each expression, the rows of its G photos in `inputs`; -1 where it has no
            such photo.
        overlap: (M, K) IoU of the candidates of the expression's photo with the described box.
    """

    inputs: RerankInputs
    slots: Tensor
    overlap: Tensor

    def to(self, device: torch.device | str) -> RerankBatch:
        """Return the batch on a device."""
        return RerankBatch(self.inputs.to(device), self.slots.to(device), self.overlap.to(device))


class RerankObjective(nn.Module):
    """The re-ranker and its two losses.

    One loss ranks the candidates of all photos of an expression together, the other only those of
    its own photo.
    """

    def __init__(self, model: Reranker) -> None:
        super().__init__()
        self.model = model
        # One element instead of a scalar, which DeepSpeed cannot broadcast.
        self.log_scale = nn.Parameter(torch.tensor([25.0]).log())

    def forward(self, batch: RerankBatch, stage: Stage) -> tuple[Tensor, dict[str, float]]:  # noqa: ARG002
        """Return the loss and its terms by name."""
        out = self.model(batch.inputs)
        here = batch.slots >= 0
        # A missing photo points to row 0, and `here` hides its candidates.
        rows = batch.slots.clamp(min=0)
        valid_MGK = batch.inputs.valid[rows] & here[..., None]
        logits_MGK = self.log_scale.exp() * (out.dual + out.correction)[rows]
        target_MGK = torch.zeros_like(logits_MGK)
        target_MGK[:, OWN] = soft_target(batch.overlap)
        group = ranking_loss(logits_MGK.flatten(1), target_MGK.flatten(1), valid_MGK.flatten(1))
        own = ranking_loss(logits_MGK[:, OWN], target_MGK[:, OWN], valid_MGK[:, OWN])
        return group + own, {"group": group.item(), "own": own.item()}


class RerankBatchMaker:
    """Builds batches: expressions, each with its own photo, the mirror image and hard negatives.

    Args:
        data: encoded photos and expressions.
        settings: numbers of photos and expressions.
    """

    def __init__(self, data: RerankData, settings: RerankSettings) -> None:
        self._data, self._settings = data, settings

    def batch(self, rows: Sequence[int], rng: np.random.Generator) -> RerankBatch:
        """Build a batch of some expressions, each in a random variant (as it is or mirrored).

        Short and generated expressions get no hard negatives.
        """
        photos: list[PhotoInstances] = []
        expression_of_photo: list[int] = []
        slots = np.full((len(rows), 2 + self._settings.rivals), NONE)
        overlap, texts = [], []
        for m, row in enumerate(rows):
            each, side = self._data.expressions[row], int(rng.integers(2))
            variant = self._data.variants[side]
            texts.append(self._data.texts[int(variant.texts[row])])
            overlap.append(variant.overlap[row])
            found = {OWN: (side, each.photo)}
            # Only an expression that names a side is wrong for the mirror image.
            if each.sided:
                found[MIRROR] = (1 - side, each.photo)
            # Other expressions are unique only within their photo, so any photo may fit them.
            if each.kind == "long":
                rivals = variant.rivals[row]
                drawn = rng.permutation(len(rivals))[: self._settings.rivals]
                found |= {2 + i: (side, int(rivals[j])) for i, j in enumerate(drawn)}
            for column, (chosen, photo) in found.items():
                slots[m, column] = len(photos)
                photos.append(self._data.variants[chosen].photo(photo))
                expression_of_photo.append(m)
        inputs = pad_inputs(texts, photos, expression_of_photo)
        num = inputs.valid.shape[1]
        overlap_MK = np.stack(overlap)[:, :num]
        return RerankBatch(inputs, torch.from_numpy(slots), torch.from_numpy(overlap_MK))


def load_rerank_data(
    config: NanoTrainConfig, photos: Sequence[TrainPhoto], *, cache: Path, init: Path
) -> RerankData:
    """Load the training data of a run, and compute what is not stored beside the cache yet.

    Raises:
        ConfigError: no expression of a training photo describes a candidate.
    """
    # Drawn from the seed, so that all workers and a resumed run hold out the same photos.
    draw = np.random.default_rng(config.optimization.seed).random(len(photos))
    trained = np.array([photo.split != VAL for photo in photos])
    return RerankData(
        cache,
        init,
        photos,
        FrozenCache(cache),
        held_out=trained & (draw < config.rerank.held_out),
        generated_per_photo=config.rerank.generated_per_photo,
        vector_dropout=config.rerank.vector_dropout,
        seed=config.optimization.seed,
    )


class RerankTask(RowTask[RerankBatch]):
    """Trains the re-ranker on photos and expressions encoded by the frozen dual stream.

    Args:
        config: settings of the run.
        photos: photos of the run; those of split "val" are not used.
        cache: folder of the complete `FrozenCache` of these photos.
        init: checkpoint directory with the dual stream.
        rank, world_size: rank of this worker, and number of workers.
    """

    rows_are = "expressions that describe a candidate"

    def __init__(  # noqa: PLR0913 - most are keyword-only
        self,
        config: NanoTrainConfig,
        photos: Sequence[TrainPhoto],
        *,
        cache: Path,
        init: Path,
        rank: int,
        world_size: int,
    ) -> None:
        self._photos, self._init = photos, init
        settings = config.rerank
        self.data = load_rerank_data(config, photos, cache=cache, init=init)
        torch.manual_seed(config.optimization.seed)
        shape = settings.model_dump(include=set(RerankerConfig.__dataclass_fields__))
        self.model = Reranker(
            RerankerConfig(
                dim=self.data.texts.vectors.shape[1],
                text_width=self.data.texts[0].states.shape[1],
                **shape,
            )
        )
        self.model.start_from(*self.data.projection)
        self.held_out = self.data.held_out
        owners = np.array([each.photo for each in self.data.expressions])
        super().__init__(
            config,
            RerankObjective(self.model),
            maker=RerankBatchMaker(self.data, settings),
            rows=np.flatnonzero(~self.held_out[owners]),
            rank=rank,
            world_size=world_size,
        )

    def validate(self) -> dict[str, float]:
        """Return BR@k and REC on the held-out training photos, see `validate_reranker`."""
        return validate_reranker(self.model, self.data, self.held_out)

    def save(self, folder: Path, about: dict[str, Any]) -> None:
        """Write a copy of the dual stream's checkpoint directory with this re-ranker added."""
        copy_checkpoint(self._init, folder)
        save_reranker(folder, self.model, self.data.digest, about)
        write_rerank_card(folder, self._init, about)

    def about(self) -> dict[str, Any]:
        """Return metadata for the checkpoint: the size of the training data."""
        return count_annotations(*split_held_out(self._photos)) | {
            "rerank_held_out": int(self.held_out.sum())
        }


def validate_reranker(
    model: Reranker, data: RerankData, held_out: npt.NDArray[np.bool_]
) -> dict[str, float]:
    """Evaluate on a gallery of the held-out training photos.

    Returns:
        Percentages: BR@k and REC at IoU .5 for long expressions. Names that start with `dual_` are
        without the re-ranker. Empty without long expressions.
    """
    variant, rows_held_out = data.variants[0], np.flatnonzero(held_out)
    rows = [m for m, a in enumerate(data.expressions) if held_out[a.photo] and a.kind == "long"]
    if not rows:
        return {}
    photos = [variant.photo(i) for i in rows_held_out.tolist()]
    texts = [data.texts[int(variant.texts[m])] for m in rows]
    own = np.searchsorted(rows_held_out, [data.expressions[m].photo for m in rows])
    owner_J = np.repeat(np.arange(len(photos)), [len(photo.boxes) for photo in photos])
    inside = owner_J[None] == own[:, None]
    fits = np.zeros_like(inside)
    for m, row in enumerate(rows):
        # Padding comes last, so the first entries are those of the real candidates.
        fits[m, inside[m]] = variant.overlap[row][: inside[m].sum()] >= MATCH_IOU
    dual = dual_scores(texts, photos)
    was_training = model.training
    model.eval()
    scores = {"dual_": dual, "": reranked_scores(model, texts, photos, own)}
    model.train(was_training)
    out: dict[str, float] = {}
    for name, values in scores.items():
        out |= {f"{name}br{k}_50": hits_at(values, fits, k).mean() for k in (1, 5, 10)}
        out[f"{name}rec_long"] = hits_in_photo(values, fits, inside).mean()
    return {name: round(100 * float(value), 2) for name, value in out.items()}
