"""BR@k and REC of a model in training, from the cached candidates of the held-out photos."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from tokenizers import Tokenizer

from reir.metrics.rec import rec_hits
from reir.metrics.reir import Gallery, Queries, reir_ranks
from reir.models.clare_nano import ClareNano
from reir.models.nano_encoder import tokenise
from reir_training.cache import FrozenCache
from reir_training.examples import VAL, TrainPhoto

PHOTO_BATCH, TEXT_BATCH = 16, 128


def validate(
    model: ClareNano,
    tokenizer: Tokenizer,
    photos: Sequence[TrainPhoto],
    cache: FrozenCache,
    *,
    half: bool,
) -> dict[str, float]:
    """Percentages on the photos of split "val"; empty when there are none.

    Returns:
        br1_50, br5_50, br10_50, br1_70 of long expressions over the gallery of all held-out
        photos (definition B), rec_long and rec_short within the photo at IoU .5.
    """
    rows = [i for i, photo in enumerate(photos) if photo.split == VAL]
    asked = [(n, e) for n, i in enumerate(rows) for e in photos[i].expressions]
    if not asked:
        return {}
    was_training, device = model.training, model.log_scale.device
    model.eval()
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=half):
        vectors, boxes, owners = _gallery(model, cache, rows)
        texts = _texts(model, tokenizer, [e.text for _, e in asked])
    model.train(was_training)
    targets = np.stack([photos[rows[n]].boxes[e.box] for n, e in asked])
    found = np.array([n for n, _ in asked])
    is_long = np.array([e.kind != "short" for _, e in asked])
    top = np.stack(
        [_best_box(t, n, vectors, boxes, owners) for t, n in zip(texts, found, strict=True)]
    )
    hit = rec_hits(top, targets, (0.5,)).hits[:, 0]
    ranks = reir_ranks(
        Queries(texts[is_long], found[is_long], targets[is_long]),
        Gallery(vectors, owners, boxes),
        iou_thresholds=(0.5, 0.7),
    )
    out = {f"br{k}_50": ranks.found_b(k, 0.5).mean() for k in (1, 5, 10)}
    out |= {"br1_70": ranks.found_b(1, 0.7).mean(), "rec_long": hit[is_long].mean()}
    if not is_long.all():
        out["rec_short"] = hit[~is_long].mean()
    return {name: round(100 * float(value), 2) for name, value in out.items()}


def _gallery(
    model: ClareNano, cache: FrozenCache, rows: Sequence[int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Vectors (J, D), boxes (J, 4) and position in `rows` (J,) of all candidates."""
    vectors, boxes, owners = [], [], []
    for start in range(0, len(rows), PHOTO_BATCH):
        batch = cache.batch(rows[start : start + PHOTO_BATCH])
        out = model.visual(batch.to(model.log_scale.device))
        vectors.append(out.vectors[batch.valid].cpu().numpy())
        boxes.append(out.boxes[batch.valid].cpu().numpy())
        owners.append(torch.nonzero(batch.valid)[:, 0].numpy() + start)
    return np.concatenate(vectors), np.concatenate(boxes), np.concatenate(owners)


def _texts(model: ClareNano, tokenizer: Tokenizer, texts: Sequence[str]) -> np.ndarray:
    """(M, D) expression vectors."""
    device, parts = model.log_scale.device, []
    for start in range(0, len(texts), TEXT_BATCH):
        some = texts[start : start + TEXT_BATCH]
        ids_NL, mask_NL = tokenise(tokenizer, some, model.config.max_tokens)
        parts.append(model.text(ids_NL.to(device), mask_NL.to(device)).float())
    return np.asarray(torch.cat(parts).cpu().numpy())


def _best_box(
    text: np.ndarray, photo: int, vectors: np.ndarray, boxes: np.ndarray, owners: np.ndarray
) -> np.ndarray:
    """Box of highest score within the photo; an empty box where it has no candidate."""
    own = np.flatnonzero(owners == photo)
    if not len(own):
        return np.zeros(4)
    return np.asarray(boxes[own[(vectors[own] @ text).argmax()]])
