"""What the re-ranker is trained on: photos and expressions as the frozen dual stream encodes them.

Every photo comes as it is and mirrored, every expression with the words for the sides as they are
and swapped. So there are two worlds of equal size, and in each the dual stream says which photos
it confuses with the right one. All of it is computed once and kept beside the cache of the frozen
part, under the digest of the dual stream.
"""

# Shapes: B photos, K candidates a photo, M expressions, D dimension, T tokens of all texts

from __future__ import annotations

import copy
import hashlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from reir.boxes import elementwise_iou
from reir.checkpoint import load_model, weights_digest
from reir.models.clare_nano import ClareNano, RelationLayer
from reir.models.more import MixtureOfRelationExperts
from reir.models.nano_encoder import ClareNanoEncoder
from reir.models.reranker import PhotoInstances
from reir.models.seams import EncodedExpression, TokenEncoder
from reir.records import FloatArray
from reir.text import swap_left_right
from reir_training.batches import targets_of
from reir_training.cache import FrozenCache
from reir_training.examples import VAL, TrainPhoto

Ints = npt.NDArray[np.int64]
Arrays = dict[str, Any]
FIELDS = ("vectors", "boxes", "objectness", "valid")
PHOTO_BATCH, TEXT_PART, QUERY_CHUNK = 16, 1024, 256
NUM_RIVALS = 48
"""Photos kept for each expression: those with the best wrong answers of the dual stream."""


@dataclass(frozen=True)
class Asking:
    """One expression of a training photo.

    Attributes:
        text: as written or generated.
        photo: row of the photo.
        box: row of its boxes.
        kind: "long", "short" or "generated".
    """

    text: str
    photo: int
    box: int
    kind: str

    @property
    def sided(self) -> bool:
        """Whether it names left or right, and so misses the mirror image."""
        return swap_left_right(self.text) != self.text


@dataclass(frozen=True)
class World:
    """All photos and all expressions, as they are or mirrored.

    Attributes:
        vectors: (B, K, D) float32.
        boxes: (B, K, 4) xyxy in [0, 1].
        objectness: (B, K).
        valid: (B, K) bool.
        texts: (M,) row in the table of texts.
        overlap: (M, K) IoU of the candidates of the expression's photo with the described box.
        rivals: (M, 48) rows of other training photos, best wrong answer first.
    """

    vectors: FloatArray
    boxes: FloatArray
    objectness: FloatArray
    valid: npt.NDArray[np.bool_]
    texts: Ints
    overlap: FloatArray
    rivals: Ints

    def photo(self, row: int) -> PhotoInstances:
        """What the index would hold of a photo."""
        real = self.valid[row]
        return PhotoInstances(
            self.vectors[row][real], self.boxes[row][real], self.objectness[row][real]
        )


class TextTable:
    """Encoded texts, kept in parts so that a killed run goes on.

    Args:
        folder: of the parts, which are computed where they are missing.
        encoder: of the texts.
        texts: in the order of their rows.
    """

    def __init__(self, folder: Path, encoder: TokenEncoder, texts: Sequence[str]) -> None:
        self.vectors = np.zeros((len(texts), encoder.dim), dtype=np.float32)
        self._states: list[npt.NDArray[np.float16]] = []
        for start in range(0, len(texts), TEXT_PART):
            part = _kept(
                folder / f"texts_{start}.npz",
                partial(_encode_texts, encoder, texts[start : start + TEXT_PART]),
            )
            self.vectors[start : start + TEXT_PART] = part["vectors"]
            self._states += np.split(part["states"], np.cumsum(part["lengths"])[:-1])

    def __getitem__(self, row: int) -> EncodedExpression:
        """One text."""
        return EncodedExpression(self.vectors[row], self._states[row].astype(np.float32))


def _encode_texts(encoder: TokenEncoder, texts: Sequence[str]) -> Arrays:
    """Vectors (N, D), token states (T, C) of all texts in a row, and the length of each."""
    encoded = encoder.encode_tokens(texts)
    return {
        "vectors": np.stack([each.vector for each in encoded]),
        "states": np.concatenate([each.states for each in encoded]).astype(np.float16),
        "lengths": np.array([len(each.states) for each in encoded]),
    }


def _kept(path: Path, make: Callable[[], Arrays]) -> Arrays:
    """Arrays by name that are computed once and kept in a file."""
    if not path.exists():
        unfinished = path.with_name(f"unfinished_{path.name}")
        np.savez(unfinished, **make())
        unfinished.rename(path)
    with np.load(path) as file:
        return dict(file)


def askings_of(
    photos: Sequence[TrainPhoto], cache: FrozenCache, generated_per_photo: int, seed: int
) -> list[Asking]:
    """Written expressions that a candidate reaches, and some generated ones, of training photos."""
    out: list[Asking] = []
    for row, photo in enumerate(photos):
        if photo.split == VAL:
            continue
        found = targets_of(photo, cache, row, short_weight=0.0)
        out += [
            Asking(text, row, box, "long" if weight == 1 else "short")
            for text, box, weight in found.written
        ]
        order = np.random.default_rng([seed, row]).permutation(len(found.generated))
        chosen = [found.generated[i] for i in order[:generated_per_photo]]
        out += [Asking(text, row, box, "generated") for text, box in chosen]
    return out


class RerankData:
    """Both worlds, the texts, and who asks what.

    Attributes:
        askings: M expressions of training photos.
        texts: encoded, as they are and swapped.
        worlds: photos and expressions as they are, and mirrored.

    Args:
        root: folder that holds such data by name.
        checkpoint: of the dual stream.
        photos: of the run.
        cache: output of the frozen part of these photos.
        generated_per_photo: expressions generated a photo.
        vector_dropout: of the visual stream while it encodes the photos. It was trained on them, so
            without dropout it is surer of them than of photos that it has never seen.
        seed: of every draw.
    """

    def __init__(  # noqa: PLR0913 - one by one is clearer than a bag
        self,
        root: Path,
        checkpoint: Path,
        photos: Sequence[TrainPhoto],
        cache: FrozenCache,
        *,
        generated_per_photo: int,
        vector_dropout: float,
        seed: int,
    ) -> None:
        model, tokenizer = load_model(checkpoint)
        self.digest = weights_digest(checkpoint)
        members = [m for m in model.text.members if isinstance(m, MixtureOfRelationExperts)]
        experts = [member.shared for member in members]
        self.projection = (
            torch.cat([expert.weight for expert in experts]),
            torch.cat([expert.bias for expert in experts]),
        )
        # a copy, since the encoder puts it into another form, and its visual part is run here
        encoder = ClareNanoEncoder(copy.deepcopy(model), tokenizer, self.digest)
        self.askings = askings_of(photos, cache, generated_per_photo, seed)
        texts = [a.text for a in self.askings]
        asked = (texts, [swap_left_right(text) for text in texts])
        table = {text: row for row, text in enumerate(dict.fromkeys([*asked[0], *asked[1]]))}
        name = hashlib.sha256("\n".join([self.digest, *table]).encode()).hexdigest()[:16]
        folder = root / f"rerank-{name}"
        folder.mkdir(parents=True, exist_ok=True)
        self.texts = TextTable(folder, encoder, list(table))
        self.worlds: list[World] = []
        for mirrored, spoken in enumerate(asked):
            name = f"{'mirrored' if mirrored else 'plain'}_{vector_dropout:g}"
            encode = partial(encode_photos, model, cache, bool(mirrored), vector_dropout, seed)
            found = _kept(folder / f"photos_{name}.npz", encode)
            rows = np.array([table[text] for text in spoken])
            self.worlds.append(
                self._world(
                    found, photos, rows, folder / f"rivals_{name}.npz", mirrored=bool(mirrored)
                )
            )

    def _world(
        self,
        found: Arrays,
        photos: Sequence[TrainPhoto],
        texts: Ints,
        rivals: Path,
        *,
        mirrored: bool,
    ) -> World:
        """Compare encoded photos with what is asked of them; rivals are kept in a file."""
        owners = np.array([each.photo for each in self.askings])
        targets = np.array([photos[each.photo].boxes[each.box] for each in self.askings])
        if mirrored:
            x1, y1, x2, y2 = targets.T
            targets = np.stack([1 - x2, y1, 1 - x1, y2], axis=-1)
        trained = np.array([photo.split != VAL for photo in photos])

        def hardest() -> Arrays:
            valid, asked = found["valid"] & trained[:, None], self.texts.vectors[texts]
            return {"rivals": hardest_photos(found["vectors"], valid, asked, owners)}

        return World(
            **found,
            **_kept(rivals, hardest),
            texts=texts,
            overlap=elementwise_iou(found["boxes"][owners], targets[:, None]).astype(np.float32),
        )


def encode_photos(
    model: ClareNano, cache: FrozenCache, mirrored: bool, dropout: float, seed: int
) -> Arrays:
    """Vectors, boxes, objectness and `valid` of all photos of a cache, as in `World`."""
    parts: dict[str, list[np.ndarray]] = defaultdict(list)
    torch.manual_seed(seed + mirrored)
    model.visual.train()
    for part in model.visual.modules():
        if isinstance(part, nn.Dropout):
            part.p = dropout
        elif isinstance(part, RelationLayer):
            part.dropout = dropout
    for start in range(0, len(cache), PHOTO_BATCH):
        batch = cache.batch(range(start, min(start + PHOTO_BATCH, len(cache))))
        batch = batch.mirrored() if mirrored else batch
        with torch.inference_mode():
            out = model.visual(batch)
        values = (out.vectors, out.boxes, batch.objectness, batch.valid)
        for name, value in zip(FIELDS, values, strict=True):
            parts[name].append(value.numpy())
    return {name: np.concatenate(values) for name, values in parts.items()}


def hardest_photos(
    vectors: FloatArray, valid: npt.NDArray[np.bool_], asked: FloatArray, owners: Ints
) -> Ints:
    """(M, 48) photos by their best valid candidate, without the expression's own."""
    num, width, dim = vectors.shape
    flat, out = vectors.reshape(-1, dim), []
    hidden = np.where(valid, 0, -4).astype(np.float32)
    most = min(NUM_RIVALS, int(valid.any(axis=1).sum()) - 1)
    for start in range(0, len(asked), QUERY_CHUNK):
        scores = (asked[start : start + QUERY_CHUNK] @ flat.T).reshape(-1, num, width) + hidden
        best = scores.max(-1)
        best[np.arange(len(best)), owners[start : start + QUERY_CHUNK]] = -9
        out.append(np.argsort(-best, axis=1)[:, :most])
    return np.concatenate(out)
