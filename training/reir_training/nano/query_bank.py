"""Fills the `QueryBank` of a model with sentences of the training set."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tokenizers import Tokenizer
from torch import Tensor

from reir.models.nano.model import ClareNano
from reir.models.nano.query_bank import QUERY_VALUE
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
    keep_half: bool = False,
) -> None:
    """Fill the bank of a model with its own vectors of sentences; the mode of the model is kept.

    Args:
        model: changed in place; nothing changes if no training photo has an expression.
        tokenizer: of the text tower.
        photos: all photos of the run.
        cache: output of the frozen part for these photos.
        rows: rows of the training photos. The sentences are those of every second photo; how well
            an instance usually fits them is measured on others, which they do not describe.
        keep_half: keep every second sentence of the bank, for a model that also knows other photos
            than these.
    """
    bank = model.bank
    texts = [e.text for row in rows[::2] for e in photos[row].expressions if e.kind != "short"]
    if not texts or not len(bank.vectors):
        return
    was_training = model.training
    model.eval()
    # Spread over all photos; a bank takes no more.
    texts = texts[:: max(1, len(texts) // len(bank.vectors))]
    usual = bank.usual.clone()
    whole = torch.from_numpy(text_vectors(model, tokenizer, texts)).to(bank.vectors.device)
    dim = model.config.dim
    compared = torch.cat(
        [whole[:, :dim], whole[:, dim + 1 :]], dim=-1
    )  # all but the bank's own part
    vectors_ND = torch.nn.functional.normalize(compared, dim=-1)
    (bank.mix if keep_half else bank.fill)(vectors_ND)
    penalties = _penalties(model, cache, rows[1::2][:PHOTOS])
    if len(penalties):
        bank.usual.copy_((usual + penalties.mean()) / 2 if keep_half else penalties.mean())
    model.train(was_training)


def _penalties(model: ClareNano, cache: FrozenCache, rows: Sequence[int]) -> Tensor:
    """Return the (J,) penalties of all instances of some photos."""
    penalties = [model.log_scale.new_zeros(0)]
    for start in range(0, len(rows), PHOTO_BATCH):
        batch = cache.batch(rows[start : start + PHOTO_BATCH]).to(model.log_scale.device)
        numbers_BK = model.encode_photos(batch).vectors[..., model.config.dim]
        # The inverse of `QueryBank.forward`.
        penalties.append((model.bank.usual - QUERY_VALUE * numbers_BK)[batch.valid])
    return torch.cat(penalties)
