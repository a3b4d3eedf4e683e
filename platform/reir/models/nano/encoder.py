"""`ClareNanoEncoder`: a trained `clare-nano` as an `InstanceEncoder`."""

# Shapes: B photos, K candidates, N texts, L tokens, C channels, D dimension

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from reir.models.interfaces import EncodedExpression
from reir.models.nano.candidates import CandidateExtractor
from reir.models.nano.model import ClareNano
from reir.models.traced_module import TracedModule
from reir.records import FloatArray, Instances, RgbImage
from reir.text import normalize_expression

DETECTOR_BATCH = 8
TEXT_BATCH = 128


def tokenize(tokenizer: Tokenizer, texts: Sequence[str], max_tokens: int) -> tuple[Tensor, Tensor]:
    """Return (N, L) int64 token ids and mask (1 on real tokens), padded to the longest text."""
    encoded = [e.ids for e in tokenizer.encode_batch([normalize_expression(t) for t in texts])]
    # Truncated by hand, so that the end token is kept.
    encoded = [
        ids if len(ids) <= max_tokens else [*ids[: max_tokens - 1], ids[-1]] for ids in encoded
    ]
    longest = max((len(ids) for ids in encoded), default=0)
    ids_NL = torch.zeros(len(encoded), longest, dtype=torch.long)
    mask_NL = torch.zeros_like(ids_NL)
    for row, ids in enumerate(encoded):
        ids_NL[row, : len(ids)] = torch.tensor(ids)
        mask_NL[row, : len(ids)] = 1
    return ids_NL, mask_NL


def fast_dtype() -> torch.dtype:
    """Return bf16 if the CPU has instructions for it, else float32."""
    # AVX2 alone is not enough: oneDNN has no bf16 for it.
    supported = torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if supported else torch.float32


def cpu_path() -> str:
    """Describe the arithmetic that `fast_dtype` selects on this CPU."""
    if fast_dtype() == torch.float32:
        return "fp32"
    return "bf16 (AMX)" if torch.cpu._is_amx_tile_supported() else "bf16 (AVX-512)"


class _Text(nn.Module):
    """Token ids and mask -> token states and vectors."""

    def __init__(self, model: ClareNano) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids_NL: Tensor, mask_NL: Tensor) -> tuple[Tensor, Tensor]:
        """Return (N, L, C) and (N, D)."""
        states_NLC = self.model.text.tower(ids_NL, mask_NL)
        return states_NLC, self.model.encode_texts(states_NLC, mask_NL)


class ClareNanoEncoder:
    """Encodes photos and expressions; thread-safe, since nothing is written after construction.

    Args:
        model: trained model; converted in place for inference, and cannot be trained after.
        tokenizer: of the text tower, without padding or truncation.
        digest: sha256 of the weights file.
        num_candidates: instances to keep per photo; None for the number in the checkpoint.

    Raises:
        ValueError: `num_candidates` is below 1.
    """

    masks = False

    def __init__(
        self,
        model: ClareNano,
        tokenizer: Tokenizer,
        digest: str,
        *,
        num_candidates: int | None = None,
    ) -> None:
        if num_candidates is not None and num_candidates < 1:
            raise ValueError(f"num_candidates must be at least 1, got {num_candidates}")
        self._model = model.eval().requires_grad_(False)
        self._tokenizer, self._digest = tokenizer, digest
        self._num_candidates = num_candidates or model.config.num_candidates
        self._dtype = fast_dtype()
        self._extract = CandidateExtractor(model, self._dtype)
        model.text.tower.keep_products_in(self._dtype)
        for part in model.visual.modules():
            if isinstance(part, nn.Linear):
                part.to(self._dtype)  # once, instead of by autocast in every pass; same bits
        self._text = self._trace_text()

    @property
    def parts(self) -> tuple[ClareNano, Tokenizer]:
        """The model, converted for inference, and the tokenizer of its text tower."""
        return self._model, self._tokenizer

    @property
    def dim(self) -> int:
        """Dimension D of both kinds of vector."""
        return self._model.config.vector_dim

    @property
    def candidate_dims(self) -> int:
        """Number of the last dimensions, which the candidate head fills; 0 without one."""
        return self._model.config.candidate_dims

    @property
    def digest(self) -> str:
        """Sha256 of the weights."""
        return self._digest

    @property
    def num_candidates(self) -> int:
        """Maximum number of instances per photo."""
        return self._num_candidates

    def encode_images(self, images: Sequence[RgbImage]) -> list[Instances]:
        """Return the instances of each photo, by descending objectness; a photo may have none."""
        return [instances for instances, _ in self.encode_with_classes(images)]

    def encode_with_classes(self, images: Sequence[RgbImage]) -> list[tuple[Instances, FloatArray]]:
        """Return instances and their class scores; see `ClassifyingEncoder.encode_with_classes`."""
        out: list[tuple[Instances, FloatArray]] = []
        for start in range(0, len(images), DETECTOR_BATCH):
            out.extend(self._encode_batch(images[start : start + DETECTOR_BATCH]))
        return out

    def propose_boxes(self, image: RgbImage, num_boxes: int) -> tuple[FloatArray, FloatArray]:
        """Return the boxes of one photo and their scores; see `BoxProposer.propose_boxes`."""
        (found,) = self._extract.propose([image], num_boxes)
        return found.boxes.numpy(), found.scores.numpy()

    def _encode_batch(self, images: Sequence[RgbImage]) -> list[tuple[Instances, FloatArray]]:
        batch = self._extract(images, self._num_candidates)
        with torch.inference_mode(), torch.autocast("cpu", self._dtype, self._half):
            visual = self._model.encode_photos(batch)
        counts = batch.valid.sum(1).tolist()
        return [
            (
                Instances(
                    boxes=visual.boxes[i, :n].numpy(),
                    objectness=batch.objectness[i, :n].numpy(),
                    vectors=visual.vectors[i, :n].numpy(),
                    image_vector=visual.image_vectors[i].numpy(),
                ),
                batch.class_scores[i, :n].numpy(),
            )
            for i, n in enumerate(counts)
        ]

    @property
    def _half(self) -> bool:
        return self._dtype != torch.float32

    def encode_expressions(self, expressions: Sequence[str]) -> FloatArray:
        """(N, D) float32 unit vectors, in the order given."""
        vectors = np.zeros((len(expressions), self.dim), dtype=np.float32)
        for rows, encoded, _, _ in self._text_batches(expressions):
            vectors[rows] = encoded
        return vectors

    def encode_tokens(self, expressions: Sequence[str]) -> list[EncodedExpression]:
        """Return the vector and the token states of each expression, in the order given."""
        found: dict[int, EncodedExpression] = {}
        for rows, vectors, states, lengths in self._text_batches(expressions):
            for i, row in enumerate(rows):
                found[row] = EncodedExpression(vectors[i], states[i, : lengths[i]])
        return [found[row] for row in range(len(expressions))]

    def _trace_text(self) -> TracedModule:
        ids_NL = torch.tensor([[1, 1, 1], [1, 1, 0]])
        # Without the weight cache of autocast, as torch recommends for tracing.
        with torch.autocast("cpu", self._dtype, self._half, cache_enabled=False):
            return TracedModule(_Text(self._model).eval(), ids_NL, (ids_NL > 0).long())

    def _text_batches(
        self, expressions: Sequence[str]
    ) -> Iterator[tuple[list[int], FloatArray, FloatArray, list[int]]]:
        """Yield rows, (n, D) vectors, (n, L, C) states and lengths, by texts of similar length."""
        # A batch is padded to its longest text, so texts of similar length go together.
        by_length = sorted(range(len(expressions)), key=lambda i: len(expressions[i]))
        for start in range(0, len(by_length), TEXT_BATCH):
            rows = by_length[start : start + TEXT_BATCH]
            texts = [expressions[i] for i in rows]
            ids_NL, mask_NL = tokenize(self._tokenizer, texts, self._model.config.max_tokens)
            with torch.autocast("cpu", self._dtype, self._half):
                states, vectors = self._text(ids_NL, mask_NL)
            lengths: list[int] = mask_NL.sum(1).tolist()
            yield rows, vectors.float().numpy(), states.float().numpy(), lengths
