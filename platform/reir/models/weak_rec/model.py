"""`WeakRec`: chooses the anchor of a photo that a sentence describes, learned without boxes.

RefCLIP (Jin et al., CVPR 2023) with the optional cross-modality attention of CMA (Chu et al., ACCV
2024); see docs/weak-rec.md, section 3. Anchors and sentences are projected into one space, and the
anchor with the highest dot product is the answer. Where the detector has classes, the similarity
between the sentence and the names of the anchor's classes is added to the product.
"""

# Shapes: B photos, A anchors, K chosen anchors, N sentences, C features, D dimension

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from reir.config import StrictConfig
from reir.models.weak_rec.anchors import Anchors, AnchorSource
from reir.models.weak_rec.cross_attention import CrossModalityAttention
from reir.models.weak_rec.language import NUM_BLOCKS
from reir.models.weak_rec.vocabulary import MAX_TOKENS


class WeakRecConfig(StrictConfig):
    """The hyperparameters of the model; stored in `weak_rec.json` of a checkpoint.

    Attributes:
        anchors: "candidates" of `clare-nano`, or the cells of the published "yolov3".
        language: "phrase" of a frozen sentence encoder, or the published "gru" over words.
        dim: D; 512 as published.
        num_anchors: anchors of a photo to choose among, by confidence; RefCLIP has 17, a tenth of
            its cells.
        attention: whether the sentence changes the anchors' features before they are compared.
        paper_parity: behave as the released code does (docs/weak-rec.md, section 7).
        class_weight: weight of the class similarity in the score, which needs "candidates" and
            "phrase"; 0 for none, as published.
        anchor_dropout, text_dropout: of features, in training; 0 as published.
        max_words: longer sentences are truncated; for "gru" only.
        num_blocks: self-attention blocks of the language encoder; for "gru" only. As published, 3,
            or 1 for ReferIt.
    """

    anchors: Literal["candidates", "yolov3"] = "candidates"
    language: Literal["phrase", "gru"] = "phrase"
    dim: int = Field(128, ge=8, multiple_of=8)
    num_anchors: int = Field(30, ge=1)
    attention: bool = False
    paper_parity: bool = False
    class_weight: float = Field(8.0, ge=0)
    anchor_dropout: float = Field(0.5, ge=0, lt=1)
    text_dropout: float = Field(0.5, ge=0, lt=1)
    max_words: int = Field(MAX_TOKENS, ge=1)
    num_blocks: int = Field(NUM_BLOCKS, ge=1)

    @model_validator(mode="after")
    def _has_classes(self) -> WeakRecConfig:
        if self.class_weight and (self.anchors, self.language) != ("candidates", "phrase"):
            raise ValueError(
                f"class_weight={self.class_weight:g} compares the classes of candidates with "
                f"phrases, so it needs anchors: candidates and language: phrase, got "
                f"{self.anchors} and {self.language}; set class_weight: 0"
            )
        return self


class Language(Protocol):
    """Encodes sentences; what is loaded of a sentence is separate, so it can be cached."""

    @property
    def width(self) -> int:
        """C, the number of features of a sentence."""
        ...

    def load(self, sentences: Sequence[str]) -> Tensor:
        """Return what `forward` needs of some sentences, with one row for each."""
        ...

    def __call__(self, loaded: Tensor) -> Tensor:
        """(N, ...) loaded sentences -> (N, C) features."""
        ...

    def classes(self, loaded: Tensor) -> Tensor:
        """(N, ...) loaded sentences -> (N, classes) similarity to the names of each class."""
        ...


@dataclass(frozen=True)
class EncodedSentences:
    """N sentences.

    Attributes:
        features: (N, C), with which attention changes the anchors.
        vectors: (N, D') to compare with anchors.
    """

    features: Tensor
    vectors: Tensor


class WeakRec(nn.Module):
    """Anchors and sentences -> vectors whose dot product is the score.

    Args:
        config: hyperparameters.
        source: of the anchors.
        language: encoder of the sentences.
    """

    def __init__(self, config: WeakRecConfig, source: AnchorSource, language: Language) -> None:
        super().__init__()
        self.config, self.source, self.language = config, source, language
        self.drop_anchors = nn.Dropout(config.anchor_dropout)
        self.drop_texts = nn.Dropout(config.text_dropout)
        self.attention = (
            CrossModalityAttention(
                source.width, language.width, width=config.dim, paper_parity=config.paper_parity
            )
            if config.attention
            else None
        )
        self.project_anchors = None if self.attention else nn.Linear(source.width, config.dim)
        self.project_texts = nn.Linear(language.width, config.dim)
        if config.class_weight:
            # At first, the class alone decides; random vectors would only add noise to it.
            nn.init.zeros_(self.project_texts.weight)
            nn.init.zeros_(self.project_texts.bias)

    def anchors(self, inputs: Mapping[str, Tensor]) -> Anchors:
        """Return the anchors of photos among which sentences choose."""
        return self.source(inputs).most_confident(self.config.num_anchors)

    def encode_sentences(self, loaded: Tensor) -> EncodedSentences:
        """Encode N loaded sentences."""
        features_NC = self.drop_texts(self.language(loaded))
        vectors_ND = self.project_texts(features_NC)
        # With these dimensions on both sides, one inner product adds the class similarity. The
        # weight is on this side only, so that it counts once.
        if self.config.class_weight:
            named = self.config.class_weight * self.language.classes(loaded)
            vectors_ND = torch.cat([vectors_ND, named], dim=-1)
        return EncodedSentences(features_NC, vectors_ND)

    def encode_anchors(self, found: Anchors, sentences: EncodedSentences) -> Tensor:
        """(B, A, D') vectors of anchors, as the sentence at the same place sees them.

        Without attention, they do not depend on the sentence.
        """
        features_BAC = self.drop_anchors(found.features)
        if self.attention is not None:
            vectors_BAD: Tensor = self.attention(features_BAC, sentences.features, found.valid)
        else:
            assert self.project_anchors is not None
            vectors_BAD = self.project_anchors(features_BAC)
        if self.config.class_weight:
            return torch.cat([vectors_BAD, found.class_scores], dim=-1)
        return vectors_BAD

    def score(self, found: Anchors, loaded: Tensor) -> Tensor:
        """(B, A) score of each anchor for the sentence at the same place; padding has -inf.

        Args:
            found: anchors of B photos.
            loaded: B loaded sentences.
        """
        sentences = self.encode_sentences(loaded)
        vectors_BAD = self.encode_anchors(found, sentences)
        scores_BA = torch.einsum("bad,bd->ba", vectors_BAD, sentences.vectors)
        return scores_BA.masked_fill(~found.valid, -torch.inf)
