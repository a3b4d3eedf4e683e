"""Fills the `QueryBank` of a model with sentences of the training set."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tokenizers import Tokenizer

from reir.models.nano.encoder import tokenize
from reir.models.nano.model import ClareNano
from reir_training.data.examples import TrainPhoto
from reir_training.nano.cache import FrozenCache

PHOTOS = 500
"""Number of photos on which it is measured how well photos usually fit the sentences."""
PHOTO_BATCH, TEXT_BATCH = 16, 128


@torch.inference_mode()
def fill_query_bank(
    model: ClareNano,
    tokenizer: Tokenizer,
    photos: Sequence[TrainPhoto],
    cache: FrozenCache,
    rows: Sequence[int],
) -> None:
    """Fill the bank of a model with its own vectors of sentences; the mode of the model is kept.

    Args:
        model: changed in place; nothing changes if no training photo has an expression.
        tokenizer: of the text tower.
        photos: all photos of the run.
        cache: output of the frozen part for these photos.
        rows: rows of the training photos. The sentences are those of every second photo; how well
            a photo usually fits them is measured on others, which they do not describe.
    """
    bank = model.visual.bank
    texts = [e.text for row in rows[::2] for e in photos[row].expressions if e.kind != "short"]
    if not texts or not len(bank.vectors):
        return
    was_training, device = model.training, model.log_scale.device
    model.eval()
    # Spread over all photos; a bank takes no more.
    texts = texts[:: max(1, len(texts) // len(bank.vectors))]
    parts = []
    for start in range(0, len(texts), TEXT_BATCH):
        some = texts[start : start + TEXT_BATCH]
        ids_NL, mask_NL = tokenize(tokenizer, some, model.config.max_tokens)
        parts.append(model.text(ids_NL.to(device), mask_NL.to(device)).float())
    bank.fill(torch.cat(parts))
    others, fits = rows[1::2][:PHOTOS], []
    for start in range(0, len(others), PHOTO_BATCH):
        batch = cache.batch(others[start : start + PHOTO_BATCH]).to(device)
        # Normalized, since an earlier value of `usual` may have changed the length.
        vectors = torch.nn.functional.normalize(model.visual(batch).vectors, dim=-1)
        fits.append(bank.fit(vectors, batch.valid))
    if fits:
        bank.usual.copy_(torch.cat(fits).mean())
    model.train(was_training)
