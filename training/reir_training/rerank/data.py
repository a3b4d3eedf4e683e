"""Training data of the re-ranker: photos and expressions, encoded by the frozen dual stream.

Photos and expressions exist in two variants: as they are, and mirrored, with "left" and "right"
swapped in the expressions. In each variant, every expression gets hard negatives, which are the
other photos that the dual stream scores highest for it. The dual stream does not change, so all of
this is computed only once. It is stored beside the cache of the frozen part, in a folder whose name
depends on the digest of the dual stream and on the texts. The name of a file depends on what else
determines it.
"""

# Shapes: B photos, K candidates per photo, M expressions, D dimension, T tokens of all texts

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
import torch.nn.functional as F
from torch import nn

from reir.checkpoint import load_model, weights_digest
from reir.errors import ConfigError
from reir.images.boxes import elementwise_iou
from reir.models.interfaces import EncodedExpression, TokenEncoder
from reir.models.nano.encoder import ClareNanoEncoder
from reir.models.nano.model import ClareNano, RelationLayer
from reir.models.relation_experts import MixtureOfRelationExperts
from reir.models.reranker import PhotoInstances
from reir.records import FloatArray
from reir.text import swap_left_right
from reir_training.data.examples import VAL, TrainPhoto
from reir_training.nano.batches import match_photo
from reir_training.nano.cache import FrozenCache

Ints = npt.NDArray[np.int64]
NamedArrays = dict[str, Any]
FIELDS = ("vectors", "boxes", "objectness", "valid")
PHOTO_BATCH, TEXT_PART, QUERY_CHUNK = 16, 1024, 256
# More than a step uses, so that an expression meets other hard negatives in every epoch.
NUM_RIVALS = 48
"""Number of hard negatives that are stored per expression."""


@dataclass(frozen=True)
class RerankExpression:
    """An expression of a training photo.

    Attributes:
        text: text of the expression.
        photo: row of the photo.
        box: row of the described box in the photo.
        kind: "long", "short" or "generated".
    """

    text: str
    photo: int
    box: int
    kind: str

    @property
    def sided(self) -> bool:
        """Whether the text contains "left" or "right", so that it is wrong for the mirror image."""
        return swap_left_right(self.text) != self.text


@dataclass(frozen=True)
class EncodedVariant:
    """All photos and expressions, either as they are or mirrored.

    Attributes:
        vectors: (B, K, D) float32, the candidates' instance vectors.
        boxes: (B, K, 4) xyxy in [0, 1].
        objectness: (B, K).
        valid: (B, K) bool, False on padding.
        texts: (M,) row of each expression in the `TextTable`.
        overlap: (M, K) IoU of the candidates of the expression's photo with the described box.
        rivals: (M, 48) photos that are the hard negatives of each expression, highest score first.
    """

    vectors: FloatArray
    boxes: FloatArray
    objectness: FloatArray
    valid: npt.NDArray[np.bool_]
    texts: Ints
    overlap: FloatArray
    rivals: Ints

    def photo(self, row: int) -> PhotoInstances:
        """Return the instances of a photo, as an index would store them."""
        real = self.valid[row]
        return PhotoInstances(
            self.vectors[row][real], self.boxes[row][real], self.objectness[row][real]
        )


class TextTable:
    """The encodings of a list of texts.

    They are stored in several files, so that an interrupted computation resumes after the last
    complete file.

    Args:
        folder: folder of the files; missing files are computed.
        encoder: encoder of the texts.
        texts: texts in the order of their rows.
    """

    def __init__(self, folder: Path, encoder: TokenEncoder, texts: Sequence[str]) -> None:
        self.vectors = np.zeros((len(texts), encoder.dim), dtype=np.float32)
        self._states: list[npt.NDArray[np.float16]] = []
        for start in range(0, len(texts), TEXT_PART):
            part = _load_or_compute(
                folder / f"texts_{start}.npz",
                partial(_encode_texts, encoder, texts[start : start + TEXT_PART]),
            )
            self.vectors[start : start + TEXT_PART] = part["vectors"]
            # Texts have different numbers of tokens, so a file holds their states in one long
            # array.
            self._states += np.split(part["states"], np.cumsum(part["lengths"])[:-1])

    def __getitem__(self, row: int) -> EncodedExpression:
        """Return the encoding of a text."""
        return EncodedExpression(self.vectors[row], self._states[row].astype(np.float32))


def _encode_texts(encoder: TokenEncoder, texts: Sequence[str]) -> NamedArrays:
    """Return the (N, D) vectors, the concatenated (T, C) token states, and the length of each."""
    encoded = encoder.encode_tokens(texts)
    return {
        "vectors": np.stack([each.vector for each in encoded]),
        "states": np.concatenate([each.states for each in encoded]).astype(np.float16),
        "lengths": np.array([len(each.states) for each in encoded]),
    }


def _load_or_compute(path: Path, make: Callable[[], NamedArrays]) -> NamedArrays:
    """Load arrays by name from a file; compute and save them if it does not exist."""
    if not path.exists():
        # Rename the file when it is complete, so that an interrupted run leaves no partial file.
        # The ending stays the same, because `np.savez` would append ".npz" to any other name.
        unfinished = path.with_name(f"unfinished_{path.name}")
        np.savez(unfinished, **make())
        unfinished.rename(path)
    with np.load(path) as file:
        return dict(file)


def rerank_expressions(
    photos: Sequence[TrainPhoto], cache: FrozenCache, generated_per_photo: int, seed: int
) -> list[RerankExpression]:
    """Choose the expressions to train on.

    These are all written expressions of the training photos whose box a candidate matches, and some
    generated ones.
    """
    out: list[RerankExpression] = []
    for row, photo in enumerate(photos):
        if photo.split == VAL:
            continue
        # `PhotoTargets` has no kinds, but with this weight, only long expressions have the weight
        # 1.
        found = match_photo(photo, cache, row, short_weight=0.0)
        out += [
            RerankExpression(text, row, box, "long" if weight == 1 else "short")
            for text, box, weight in found.written
        ]
        order = np.random.default_rng([seed, row]).permutation(len(found.generated))
        chosen = [found.generated[i] for i in order[:generated_per_photo]]
        out += [RerankExpression(text, row, box, "generated") for text, box in chosen]
    return out


class RerankData:
    """The training data: expressions, their encoded texts, and the photos in both variants.

    Attributes:
        expressions: M expressions of training photos.
        texts: encodings of all texts, as written and with "left" and "right" swapped.
        variants: two variants: photos and expressions as they are, then mirrored.
        projection: weight and bias of the dual stream's last text layer, from which the re-ranker
            starts.
        held_out: see below.

    Args:
        root: folder in which such data is stored by name.
        checkpoint: checkpoint of the dual stream.
        photos: photos of the run.
        cache: output of the frozen part for these photos.
        held_out: (B,) bool, training photos that are held out to choose the best epoch.
        generated_per_photo: number of generated expressions per photo.
        vector_dropout: dropout of the visual stream when it encodes the photos. The stream was
            trained on these photos, so without dropout it would be more certain about them than
            about new photos.
        seed: random seed.

    Raises:
        ConfigError: no expression of a training photo describes a candidate.
    """

    def __init__(  # noqa: PLR0913 - most are keyword-only
        self,
        root: Path,
        checkpoint: Path,
        photos: Sequence[TrainPhoto],
        cache: FrozenCache,
        *,
        held_out: npt.NDArray[np.bool_],
        generated_per_photo: int,
        vector_dropout: float,
        seed: int,
    ) -> None:
        model, tokenizer = load_model(checkpoint)
        self.digest = weights_digest(checkpoint)
        # The shared experts of the members form one layer, as their vectors form one vector.
        members = [m for m in model.text.members if isinstance(m, MixtureOfRelationExperts)]
        experts = [member.shared for member in members]
        # It knows nothing of what the query bank and the candidate head add to the vectors.
        unknown = model.config.vector_dim - model.config.dim
        self.projection = (
            F.pad(torch.cat([expert.weight for expert in experts]), (0, 0, 0, unknown)),
            F.pad(torch.cat([expert.bias for expert in experts]), (0, unknown)),
        )
        # Copy the model, because the encoder converts it, and its visual stream is used below.
        encoder = ClareNanoEncoder(copy.deepcopy(model), tokenizer, self.digest)
        self.held_out = held_out
        self.expressions = rerank_expressions(photos, cache, generated_per_photo, seed)
        if not self.expressions:
            raise ConfigError(
                "no expression of a training photo describes a candidate: add photos with "
                "expressions about objects that the detector finds"
            )
        texts = [a.text for a in self.expressions]
        both = (texts, [swap_left_right(text) for text in texts])
        table = {text: row for row, text in enumerate(dict.fromkeys([*both[0], *both[1]]))}
        name = hashlib.sha256("\n".join([self.digest, *table]).encode()).hexdigest()[:16]
        folder = root / f"rerank-{name}"
        folder.mkdir(parents=True, exist_ok=True)
        self.texts = TextTable(folder, encoder, list(table))
        self.variants: list[EncodedVariant] = []
        for mirrored, variant_texts in enumerate(both):
            # The seed decides which numbers of the vectors are dropped.
            name = f"{'mirrored' if mirrored else 'plain'}_{vector_dropout:g}_{seed}"
            encode = partial(encode_photos, model, cache, bool(mirrored), vector_dropout, seed)
            found = _load_or_compute(folder / f"photos_{name}.npz", encode)
            rows = np.array([table[text] for text in variant_texts])
            stem = folder / f"rivals_{name}"
            self.variants.append(self._variant(found, photos, rows, stem, mirrored=bool(mirrored)))

    def _variant(
        self,
        found: NamedArrays,
        photos: Sequence[TrainPhoto],
        texts: Ints,
        stem: Path,
        *,
        mirrored: bool,
    ) -> EncodedVariant:
        """Combine encoded photos and expressions; the hard negatives are stored in a file.

        Its name begins with `stem`.
        """
        owners = np.array([each.photo for each in self.expressions])
        targets = np.array([photos[each.photo].boxes[each.box] for each in self.expressions])
        if mirrored:
            x1, y1, x2, y2 = targets.T
            targets = np.stack([1 - x2, y1, 1 - x1, y2], axis=-1)
        # Held-out photos must not appear in training, not even as negatives.
        trained = np.array([photo.split != VAL for photo in photos]) & ~self.held_out
        # A row of the file is an expression, and the same texts may be about other photos.
        digest = hashlib.sha256(b"".join(each.tobytes() for each in (texts, owners, trained)))
        rivals = stem.with_name(f"{stem.name}_{digest.hexdigest()[:16]}.npz")

        def compute_rivals() -> NamedArrays:
            valid, vectors = found["valid"] & trained[:, None], self.texts.vectors[texts]
            return {"rivals": find_rivals(found["vectors"], valid, vectors, owners)}

        return EncodedVariant(
            **found,
            **_load_or_compute(rivals, compute_rivals),
            texts=texts,
            overlap=elementwise_iou(found["boxes"][owners], targets[:, None]).astype(np.float32),
        )


def encode_photos(
    model: ClareNano, cache: FrozenCache, mirrored: bool, dropout: float, seed: int
) -> NamedArrays:
    """Encode all photos of a cache into the arrays of an `EncodedVariant`."""
    # In evaluation mode, the modules would skip dropout, which is wanted here (see `RerankData`).
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
        batch = batch.mirror() if mirrored else batch
        with torch.inference_mode():
            out = model.encode_photos(batch)
        values = (out.vectors, out.boxes, batch.objectness, batch.valid)
        for name, value in zip(FIELDS, values, strict=True):
            parts[name].append(value.numpy())
    return {name: np.concatenate(values) for name, values in parts.items()}


def find_rivals(
    vectors: FloatArray, valid: npt.NDArray[np.bool_], query_vectors: FloatArray, owners: Ints
) -> Ints:
    """Return the (M, 48) photos with the highest scores, without the expression's own photo."""
    num, width, dim = vectors.shape
    flat, out = vectors.reshape(-1, dim), []
    # Lower than any score, so that padding never ranks above a candidate.
    hidden = np.where(valid, 0, -4).astype(np.float32)
    most = min(NUM_RIVALS, int(valid.any(axis=1).sum()) - 1)
    for start in range(0, len(query_vectors), QUERY_CHUNK):
        scores = (query_vectors[start : start + QUERY_CHUNK] @ flat.T).reshape(
            -1, num, width
        ) + hidden
        best = scores.max(-1)
        # Lower still, so that the expression's own photo is never one of its hard negatives.
        best[np.arange(len(best)), owners[start : start + QUERY_CHUNK]] = -9
        out.append(np.argsort(-best, axis=1)[:, :most])
    return np.concatenate(out)
