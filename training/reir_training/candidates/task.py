"""The training task of the candidate head of a finished `clare-nano`."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reir.checkpoint import (
    COLOR_HEAD,
    MASK_HEAD,
    load_model,
    read_config,
    save_checkpoint,
)
from reir.models.nano.candidate_head import CandidateHead, CandidateHeadConfig
from reir.models.nano.sentence_tower import WIDTH
from reir.query.presence import save_background
from reir_training.candidates.data import CandidateExampleBatch, CandidateExamples
from reir_training.config import NanoTrainConfig
from reir_training.data.examples import (
    UNKNOWN_CLASS,
    VAL,
    TrainPhoto,
    count_annotations,
    split_held_out,
)
from reir_training.nano.background import background_vectors
from reir_training.nano.cache import FrozenCache
from reir_training.nano.query_bank import fill_query_bank
from reir_training.report.model_card import write_candidates_card
from reir_training.run.row_task import RowTask
from reir_training.run.schedule import Stage

CLASS_WEIGHT, LABEL_SMOOTHING = 0.5, 0.05
KINDS = ("long", "short")
HIDDEN = -1e4
"""The score of padding."""


class CandidateObjective(nn.Module):
    """The candidate head and its losses."""

    def __init__(self, model: CandidateHead) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        batch: CandidateExampleBatch,
        stage: Stage,  # noqa: ARG002
    ) -> tuple[Tensor, dict[str, float]]:
        """Return the loss and its terms by name."""
        scores = self.model(batch.texts, batch.classes, batch.places)
        scores = scores.masked_fill(~batch.valid, HIDDEN)
        right = scores.masked_fill(~batch.right, HIDDEN)
        logits = self.model.named_classes(batch.texts)
        known = batch.categories != UNKNOWN_CLASS
        terms = {
            # No row of `right` is hidden as a whole: `match_photo` drops texts without a match.
            "candidate": (scores.logsumexp(1) - right.logsumexp(1)).mean(),
            # The sum is 0 in a step without a known class.
            "class": CLASS_WEIGHT
            * (
                F.cross_entropy(
                    logits[known], batch.categories[known], label_smoothing=LABEL_SMOOTHING
                )
                if known.any()
                else 0 * logits.sum()
            ),
        }
        return torch.stack([*terms.values()]).sum(), {k: v.item() for k, v in terms.items()}


def load_candidate_examples(
    config: NanoTrainConfig, photos: Sequence[TrainPhoto], *, cache: Path, init: Path
) -> CandidateExamples:
    """Load the training data of a run, and encode the texts that are not stored yet."""
    return CandidateExamples(
        photos,
        FrozenCache(cache),
        init,
        cache,
        generated_per_photo=config.candidates.generated_per_photo,
        seed=config.optimization.seed,
    )


@torch.inference_mode()
def usual_candidate(head: CandidateHead, cache: FrozenCache, rows: Sequence[int]) -> Tensor:
    """Return the (E,) mean of the head's part of the vectors of all candidates of some photos."""
    parts = [
        head.describe(torch.from_numpy(cache.boxes(row)), torch.from_numpy(cache.classes(row)))
        for row in rows
    ]
    return torch.cat(parts).mean(0)


class CandidateTask(RowTask[CandidateExampleBatch]):
    """Trains a candidate head on written and generated expressions.

    Args:
        config: settings of the run.
        photos: photos of the run; those of split "val" are only validated on.
        cache: folder of the complete `FrozenCache` of these photos.
        init: checkpoint directory of the model.
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
        self._photos, self._init, self._cache = photos, init, FrozenCache(cache)
        self.examples = load_candidate_examples(config, photos, cache=cache, init=init)
        # Right before the weights are drawn: they must be the same on all workers and in a repeated
        # run.
        torch.manual_seed(config.optimization.seed)
        # Without `generated_per_photo`, which is a setting of the training and not of the head.
        shape = config.candidates.model_dump(include=set(CandidateHeadConfig.__dataclass_fields__))
        self.model = CandidateHead(CandidateHeadConfig(**shape), WIDTH)
        super().__init__(
            config,
            CandidateObjective(self.model),
            maker=self.examples,
            rows=np.array(self.examples.rows(photos, held_out=False), dtype=np.int64),
            rank=rank,
            world_size=world_size,
        )

    def validate(self) -> dict[str, float]:
        """Return how often the best candidate of a held-out photo is right (percent), by kind.

        Only expressions that describe a candidate count.
        """
        rows = self.examples.rows(self._photos, held_out=True)
        figures: dict[str, float] = {}
        was_training, device = self.model.training, next(self.model.parameters()).device
        self.model.eval()
        for kind in KINDS:
            of_kind = [row for row in rows if self.examples.examples[row].kind == kind]
            if of_kind:
                batch = self.examples.batch(of_kind).to(device)
                with torch.inference_mode():
                    scores = self.model(batch.texts, batch.classes, batch.places)
                best = scores.masked_fill(~batch.valid, HIDDEN).argmax(1, keepdim=True)
                right = batch.right.gather(1, best).float().mean()
                figures[f"{kind}_p50"] = round(100 * float(right), 2)
        self.model.train(was_training)
        return figures

    def save(self, folder: Path, about: dict[str, Any]) -> None:
        """Write a checkpoint directory of the model with this head.

        The head changes the vectors, so of the optional parts, only those are kept that do not
        depend on them.
        """
        model, tokenizer = load_model(self._init)
        rows = [row for row, photo in enumerate(self._photos) if photo.split != VAL]
        # Copied, because `cpu` moves a module in place, and more epochs of training may follow.
        head = copy.deepcopy(self.model).cpu()
        # The order matters: `usual` belongs to the head, adding the head empties the query bank,
        # and the background holds vectors with a number that the bank computes.
        head.usual.copy_(usual_candidate(head, self._cache, rows))
        model.add_candidate_head(head)
        fill_query_bank(model, tokenizer, self._photos, self._cache, rows)
        of_model = read_config(self._init)["training"]
        digest = save_checkpoint(folder, model, tokenizer, {**of_model, "candidate_head": about})
        save_background(folder, background_vectors(model, self._cache, rows, half=False), digest)
        for part in (MASK_HEAD, COLOR_HEAD):
            part.copy(self._init, folder)
        write_candidates_card(folder, self._init, about)

    def about(self) -> dict[str, Any]:
        """Return metadata for the checkpoint: the size of the training data."""
        counts = count_annotations(*split_held_out(self._photos))
        return counts | {"examples": len(self._rows)}
