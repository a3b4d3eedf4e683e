"""The losses of one step of the weakly supervised model, over the items of all workers."""

# Shapes: B items of one worker, N items of all workers, K chosen anchors, D dimension, S sentences

from __future__ import annotations

import torch
from torch import Tensor, nn

from reir.losses import anchor_contrast, equivariance, false_negative_suppression
from reir.models.weak_rec.model import WeakRec
from reir_training.run.batch_norm import use_global_batch_norm
from reir_training.run.collectives import WorkerCollectives
from reir_training.run.schedule import Stage
from reir_training.weak.config import WeakLossWeights
from reir_training.weak.data import WeakBatch


class WeakObjective(nn.Module):
    """A `WeakRec` and its losses (docs/weak-rec.md, section 4).

    Args:
        model: model to train.
        weights: weight of each loss term; terms of weight 0 are not computed.
        workers: gathers the items of all workers, and the statistics of batch norms; None for a
            single worker.
    """

    def __init__(
        self, model: WeakRec, weights: WeakLossWeights, *, workers: WorkerCollectives | None
    ) -> None:
        super().__init__()
        self.model, self._weights, self._workers = model, weights, workers
        if workers is not None:
            use_global_batch_norm(model, workers)

    def forward(self, batch: WeakBatch, stage: Stage) -> tuple[Tensor, dict[str, float]]:  # noqa: ARG002
        """Return the loss and its terms by name, each a mean over the sentences of an item."""
        found = self.model.anchors(batch.inputs)
        sentences = [self.model.encode_sentences(each) for each in batch.sentences]
        # As in CMA, the first sentence alone changes the anchors, which all sentences then use.
        anchors_NKD = self._gather(self.model.encode_anchors(found, sentences[0]))
        valid_NK = self._gather(found.valid.float()) > 0
        photos_N = self._gather(batch.photos)
        # The released code takes items of one photo for negatives of each other.
        parity = self.model.config.paper_parity
        same_NN = None if parity else photos_N[:, None] == photos_N
        terms: dict[str, list[Tensor]] = {}
        for each in sentences:
            texts_ND = self._gather(each.vectors)
            for name, term in self._terms(texts_ND, anchors_NKD, valid_NK, same_NN).items():
                terms.setdefault(name, []).append(term)
        means = {name: torch.stack(values).mean() for name, values in terms.items()}
        weights = self._weights.model_dump()
        total = torch.stack([weights[name] * value for name, value in means.items()]).sum()
        return total, {name: value.item() for name, value in means.items()}

    def _terms(
        self, texts_ND: Tensor, anchors_NKD: Tensor, valid_NK: Tensor, same_NN: Tensor | None
    ) -> dict[str, Tensor]:
        terms = {"contrast": anchor_contrast(texts_ND, anchors_NKD, valid_NK, same_NN)}
        if self._weights.suppression:
            terms["suppression"] = false_negative_suppression(texts_ND, anchors_NKD, valid_NK)
        if self._weights.equivariance:
            terms["equivariance"] = equivariance(texts_ND, anchors_NKD, valid_NK)
        return terms

    def _gather(self, rows: Tensor) -> Tensor:
        """(B, ...) -> (N, ...). Every worker then computes the loss of the whole step."""
        return rows if self._workers is None else self._workers.gather(rows)
