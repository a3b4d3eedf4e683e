"""Weakly supervised models that are small enough for unit tests, in all four combinations."""

# Shapes: V words of the vocabulary, E width of their vectors

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from reir.models.nano.model import ClareNano
from reir.models.weak_rec.anchors import AnchorSource, CandidateAnchors, FrozenParts
from reir.models.weak_rec.cells import CellAnchors
from reir.models.weak_rec.model import Language, WeakRec, WeakRecConfig
from reir.models.weak_rec.phrases import PhraseLanguage
from reir.models.weak_rec.vocabulary import VECTOR_WIDTH, build_vocabulary
from reir.models.weak_rec.words import WordLanguage
from reir.models.weak_rec.yolov3 import YoloV3
from reir.records import RgbImage
from reir_testing.tiny import WORDS, tiny_batch, tiny_model, tiny_tokenizer

COMBINATIONS = tuple(product(("candidates", "yolov3"), ("phrase", "gru")))
"""All pairs of a source of anchors and a language."""
NORM_MOMENTUM = 0.1
"""The default of torch."""
SENTENCES = ("the red dog left of the man", "a blue car", "the cat", "the man in the green car")


def lively_nano() -> ClareNano:
    """Return a random `clare-nano` whose frozen parts find different things in different photos.

    With the usual initial weights, such deep networks return almost the same for all photos.
    """
    nano = tiny_model()
    generator = torch.Generator().manual_seed(0)
    for part in (nano.detector, nano.crop_network):
        for layer in part.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)
    return nano


def tiny_yolo(*, paper_parity: bool = False) -> YoloV3:
    """Return a random YOLOv3 with very few channels, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yolo = YoloV3(num_classes=3, width=4, paper_parity=True)
    _settle_norms(yolo, lambda: yolo(torch.randn(4, 3, 128, 128)))
    yolo.paper_parity = paper_parity
    return yolo


def tiny_cells(*, paper_parity: bool = False) -> CellAnchors:
    """Return the cells of `tiny_yolo` as anchors, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        source = CellAnchors(tiny_yolo(paper_parity=paper_parity))
    inputs = source.load(noise_photos())
    _settle_norms(source.fusion, lambda: source(inputs))
    return source.eval()


def _settle_norms(model: nn.Module, run: Callable[[], object]) -> None:
    """Give the batch norms of a model the statistics of one batch, and leave it in eval mode.

    Without them, a deep random network returns almost the same for all photos.
    """
    norms = [each for each in model.modules() if isinstance(each, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    model.train()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(3)
        run()
    for norm in norms:
        norm.momentum = NORM_MOMENTUM
    model.eval()


def word_vectors(words: Iterable[str]) -> Tensor:
    """Return (V, E) random vectors."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(len(list(words)), VECTOR_WIDTH, generator=generator)


def write_glove(path: Path, words: Iterable[str]) -> None:
    """Write a file of word vectors in the form of GloVe."""
    known = list(words)
    lines = zip(known, word_vectors(known).tolist(), strict=True)
    text = "".join(f"{word} {' '.join(f'{n:.4f}' for n in row)}\n" for word, row in lines)
    path.write_text(text)


def tiny_weak_rec(**changes: Any) -> WeakRec:
    """Return a model with random trained parts, without dropout, in eval mode.

    Args:
        changes: fields of `WeakRecConfig`, of which "anchors" and "language" choose the parts.
    """
    kinds = {"anchors": "candidates", "language": "phrase", **changes}
    classes = 1.0 if (kinds["anchors"], kinds["language"]) == COMBINATIONS[0] else 0.0
    usual = {"dim": 16, "num_anchors": 4, "class_weight": classes, "num_blocks": 1}
    dropouts = {"anchor_dropout": 0.0, "text_dropout": 0.0}
    config = WeakRecConfig(**usual | dropouts | kinds)
    source: AnchorSource
    language: Language
    if config.anchors == "candidates":
        source = CandidateAnchors(FrozenParts.of(lively_nano()))
        source.fit(tiny_batch(8, 6))
    else:
        source = tiny_cells(paper_parity=config.paper_parity)
    if config.language == "phrase":
        language = PhraseLanguage(tiny_model().text.tower, tiny_tokenizer())
        language.fit(language.load(SENTENCES))
    else:
        vocabulary = build_vocabulary([" ".join(WORDS)])
        vectors = word_vectors(vocabulary.words)
        language = WordLanguage(
            vocabulary, vectors, max_words=config.max_words, num_blocks=config.num_blocks
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return WeakRec(config, source, language).eval()


def make_random(model: WeakRec) -> None:
    """Give random values to the trained weights, some of which are zero at first; open gates."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                # Sums over many inputs must not grow with their number.
                scale = 0.1 if parameter.ndim < 2 else parameter[0].numel() ** -0.5
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
            if name.endswith("_gate"):
                parameter.fill_(1.0)


@lru_cache(maxsize=1)
def noise_photos() -> tuple[RgbImage, ...]:
    """Return three photos of different sizes."""
    rng = np.random.default_rng(0)
    return tuple(
        rng.integers(0, 256, size, dtype=np.uint8)
        for size in ((60, 90, 3), (120, 50, 3), (48, 48, 3))
    )
