"""Validation during training: BR@k and REC on the held-out photos."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from tokenizers import Tokenizer

from reir.images.decode import read_image
from reir.metrics.rec import rec_hits
from reir.metrics.reir import Gallery, Queries, reir_ranks
from reir.models.interfaces import InstanceEncoder
from reir.models.nano.encoder import tokenize
from reir.models.nano.model import ClareNano
from reir_training.data.examples import VAL, TrainPhoto
from reir_training.nano.cache import FrozenCache

PHOTO_BATCH, TEXT_BATCH = 16, 128
PHOTO_SIDE_PX = 448
"""The metric of REC adds a constant to areas in pixels. Boxes here are in [0, 1], so they are
scaled to a photo of this size."""


def validate(
    model: ClareNano,
    tokenizer: Tokenizer,
    photos: Sequence[TrainPhoto],
    cache: FrozenCache,
    *,
    half: bool,
) -> dict[str, float]:
    """Evaluate `clare-nano` on the cached photos of the split "val".

    Returns:
        Percentages: br1_50, br5_50, br10_50 and br1_70 of long expressions over the gallery of
        all held-out photos (definition B), and rec_long and rec_short within the photo at IoU .5.
        Empty without held-out photos.
    """
    rows = _held_out(photos)
    texts = [e.text for i in rows for e in photos[i].expressions]
    if not texts:
        return {}
    was_training, device = model.training, model.log_scale.device
    model.eval()
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=half):
        gallery = cached_gallery(model, cache, rows)
        vectors = text_vectors(model, tokenizer, texts)
    # Training continues with this model, so restore dropout.
    model.train(was_training)
    return _figures([photos[i] for i in rows], gallery, vectors)


def validate_encoder(
    encoder: InstanceEncoder, photos: Sequence[TrainPhoto], *, batch_size: int = 8
) -> dict[str, float]:
    """Evaluate any encoder on the files of the held-out photos.

    Returns:
        The same figures as `validate`.

    Raises:
        ImageError: a photo cannot be decoded.
    """
    held_out = [photos[i] for i in _held_out(photos)]
    texts = [e.text for photo in held_out for e in photo.expressions]
    if not texts:
        return {}
    found = []
    for start in range(0, len(held_out), batch_size):
        images = [read_image(photo.path) for photo in held_out[start : start + batch_size]]
        found += encoder.encode_images(images)
    gallery = Gallery(
        np.concatenate([each.vectors for each in found]),
        np.repeat(np.arange(len(found)), [len(each) for each in found]),
        np.concatenate([each.boxes for each in found]),
    )
    return _figures(held_out, gallery, encoder.encode_expressions(texts))


def _held_out(photos: Sequence[TrainPhoto]) -> list[int]:
    return [i for i, photo in enumerate(photos) if photo.split == VAL]


def _figures(
    held_out: Sequence[TrainPhoto], gallery: Gallery, texts: np.ndarray
) -> dict[str, float]:
    """Compute the percentages; `texts` are the vectors of all expressions, in order of photos."""
    pairs = [(n, e) for n, photo in enumerate(held_out) for e in photo.expressions]
    targets = np.stack([held_out[n].boxes[e.box] for n, e in pairs])
    found = np.array([n for n, _ in pairs])
    is_long = np.array([e.kind != "short" for _, e in pairs])
    top = np.stack([_best_box(t, n, gallery) for t, n in zip(texts, found, strict=True)])
    hit = rec_hits(PHOTO_SIDE_PX * top, PHOTO_SIDE_PX * targets, (0.5,)).hits[:, 0]
    out = {}
    # Short expressions are unique only within their photo, so they are not searched for in the
    # whole gallery. Boxes may stay in [0, 1], since IoU does not depend on the unit.
    if is_long.any():
        queries = Queries(texts[is_long], found[is_long], targets[is_long])
        ranks = reir_ranks(queries, gallery, iou_thresholds=(0.5, 0.7))
        out = {f"br{k}_50": ranks.hits_b(k, 0.5).mean() for k in (1, 5, 10)}
        out |= {"br1_70": ranks.hits_b(1, 0.7).mean(), "rec_long": hit[is_long].mean()}
    if not is_long.all():
        out["rec_short"] = hit[~is_long].mean()
    return {name: round(100 * float(value), 2) for name, value in out.items()}


def cached_gallery(model: ClareNano, cache: FrozenCache, rows: Sequence[int]) -> Gallery:
    """Return the instances of the photos in these rows of the cache.

    The photos are numbered from 0, in the order of the rows.
    """
    vectors, boxes, owners = [], [], []
    for start in range(0, len(rows), PHOTO_BATCH):
        batch = cache.batch(rows[start : start + PHOTO_BATCH])
        out = model.encode_photos(batch.to(model.log_scale.device))
        vectors.append(out.vectors[batch.valid].cpu().numpy())
        boxes.append(out.boxes[batch.valid].cpu().numpy())
        # Galleries number the held-out photos from 0, whatever their rows in the cache.
        owners.append(torch.nonzero(batch.valid)[:, 0].numpy() + start)
    return Gallery(np.concatenate(vectors), np.concatenate(owners), np.concatenate(boxes))


def text_vectors(model: ClareNano, tokenizer: Tokenizer, texts: Sequence[str]) -> np.ndarray:
    """Return the (M, D) vectors of expressions."""
    device = model.log_scale.device
    parts = [torch.zeros(0, model.config.vector_dim, device=device)]
    for start in range(0, len(texts), TEXT_BATCH):
        some = texts[start : start + TEXT_BATCH]
        ids_NL, mask_NL = (
            each.to(device) for each in tokenize(tokenizer, some, model.config.max_tokens)
        )
        states_NLC = model.text.tower(ids_NL, mask_NL)
        parts.append(model.encode_texts(states_NLC, mask_NL).float())
    return np.asarray(torch.cat(parts).cpu().numpy())


def _best_box(text: np.ndarray, photo: int, gallery: Gallery) -> np.ndarray:
    """Return the box with the highest score in the photo; an empty box without candidates."""
    own = np.flatnonzero(gallery.images == photo)
    if not len(own):
        return np.zeros(4)
    return np.asarray(gallery.boxes_px[own[(gallery.vectors[own] @ text).argmax()]])
