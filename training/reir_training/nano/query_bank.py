"""Fills the `QueryBank` of a model with sentences of the training set."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tokenizers import Tokenizer
from torch import Tensor

from reir.models.nano.model import ClareNano
from reir.models.nano.query_bank import MAX_PART, QUERY_VALUE
from reir_training.data.examples import TrainPhoto
from reir_training.nano.cache import FrozenCache
from reir_training.run.validate import text_vectors

PHOTOS = 500
"""Number of photos on which it is measured how well instances usually fit the sentences."""
PHOTO_BATCH = 16


@torch.inference_mode()
def fill_query_bank(  # noqa: PLR0913 - the last one is by name
    model: ClareNano,
    tokenizer: Tokenizer,
    photos: Sequence[TrainPhoto],
    cache: FrozenCache,
    rows: Sequence[int],
    *,
    extend: bool = False,
) -> None:
    """Fill the bank of a model with its own vectors of sentences; the mode of the model is kept.

    Args:
        model: changed in place; nothing changes if no training photo has an expression.
        tokenizer: of the text tower.
        photos: all photos of the run.
        cache: output of the frozen part for these photos.
        rows: rows of the training photos. The sentences are those of every second photo; how well
            an instance usually fits them is measured on others, which they do not describe.
        extend: keep the sentences that the bank has, for a model that also knows other photos.
            Without them, it would find less in those photos.
    """
    bank, was_training = model.bank, model.training
    vectors_ND = _sentences(model.eval(), tokenizer, photos, rows)
    if len(vectors_ND) and len(bank.vectors):
        (model.extend_bank if extend else bank.fill)(vectors_ND)
        penalties = _penalties(model, cache, rows[1::2][:PHOTOS])
        if len(penalties):
            usual = penalties.mean()
            bank.usual.copy_((bank.usual + usual) / 2 if extend else usual)
    model.train(was_training)


def _sentences(
    model: ClareNano, tokenizer: Tokenizer, photos: Sequence[TrainPhoto], rows: Sequence[int]
) -> Tensor:
    """Return (N, D) unit vectors of the sentences of every second photo, as a bank holds them."""
    texts = [e.text for row in rows[::2] for e in photos[row].expressions if e.kind != "short"]
    # Spread over all photos; a bank takes no more.
    texts = texts[:: max(1, len(texts) // MAX_PART)]
    whole = torch.from_numpy(text_vectors(model, tokenizer, texts)).to(model.bank.vectors.device)
    dim = model.config.dim
    # All but the bank's own part.
    compared = torch.cat([whole[:, :dim], whole[:, dim + 1 :]], dim=-1)
    return torch.nn.functional.normalize(compared, dim=-1)


def _penalties(model: ClareNano, cache: FrozenCache, rows: Sequence[int]) -> Tensor:
    """Return the (J,) penalties of all instances of some photos."""
    penalties = [model.log_scale.new_zeros(0)]
    for start in range(0, len(rows), PHOTO_BATCH):
        batch = cache.batch(rows[start : start + PHOTO_BATCH]).to(model.log_scale.device)
        numbers_BK = model.encode_photos(batch).vectors[..., model.config.dim]
        # The inverse of `QueryBank.forward`.
        penalties.append((model.bank.usual - QUERY_VALUE * numbers_BK)[batch.valid])
    return torch.cat(penalties)
