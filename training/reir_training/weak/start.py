"""Builds the `WeakRec` to train, from its frozen parts."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer

from reir.errors import ConfigError
from reir.models.nano.model import ClareNano
from reir.models.weak_rec.anchors import AnchorSource, CandidateAnchors, FrozenParts
from reir.models.weak_rec.cells import CellAnchors
from reir.models.weak_rec.model import Language, WeakRec
from reir.models.weak_rec.phrases import PhraseLanguage
from reir.models.weak_rec.vocabulary import build_vocabulary, load_glove
from reir.models.weak_rec.words import WordLanguage
from reir.models.weak_rec.yolov3_weights import load_yolov3
from reir_training.config import NanoTrainConfig
from reir_training.nano.initialization import start_model
from reir_training.weak.config import WeakTrainConfig
from reir_training.weak.data import all_sentences


def start_weak_rec(config: WeakTrainConfig, init: Path | None) -> WeakRec:
    """Build a model whose trained parts are random.

    Args:
        config: settings of the run.
        init: checkpoint of the `clare-nano` that has the frozen parts; None for `config.weights`.

    Raises:
        ConfigError: a setting that the model needs is missing.
        CheckpointError: the weights of a part are missing or do not fit.
        DataError: the sentences for the vocabulary cannot be read.
    """
    settings = config.model
    source: AnchorSource
    language: Language
    if settings.anchors == "candidates" or settings.language == "phrase":
        nano, tokenizer = start_nano(config, init)
    if settings.anchors == "candidates":
        source = CandidateAnchors(FrozenParts.of(nano))
    if settings.language == "phrase":
        language = PhraseLanguage(nano.text.tower, tokenizer)
    # All workers must start from the same random weights, and a repeated run too.
    torch.manual_seed(config.optimization.seed)
    if settings.anchors == "yolov3":
        source = _cells(config)
    if settings.language == "gru":
        language = _words(config)
    return WeakRec(settings, source, language)


def start_nano(config: WeakTrainConfig, init: Path | None) -> tuple[ClareNano, Tokenizer]:
    """Return the `clare-nano` whose frozen parts the model uses, and its tokenizer.

    Raises:
        ConfigError: there is neither a checkpoint nor a folder of weights.
        CheckpointError: the weights of a part are missing or do not fit.
    """
    if init is None and config.weights is None:
        raise ConfigError(
            f"anchors: {config.model.anchors} with language: {config.model.language} needs parts "
            f"of a clare-nano: give its checkpoint with --init, or set `weights` to the folder of "
            f"the published weights of its parts"
        )
    return start_model(NanoTrainConfig(data=config.data, weights=config.weights or Path()), init)


def _cells(config: WeakTrainConfig) -> CellAnchors:
    if config.yolov3 is None:
        raise ConfigError(
            "anchors: yolov3 needs weights: set `yolov3` to the file with those of YOLOv3"
        )
    return CellAnchors(load_yolov3(config.yolov3, paper_parity=config.model.paper_parity))


def _words(config: WeakTrainConfig) -> WordLanguage:
    if config.word_vectors is None:
        raise ConfigError(
            "language: gru needs word vectors: set `word_vectors` to a text file of GloVe"
        )
    vocabulary, settings = build_vocabulary(all_sentences(config)), config.model
    vectors = load_glove(config.word_vectors, vocabulary)
    return WordLanguage(
        vocabulary, vectors, max_words=settings.max_words, num_blocks=settings.num_blocks
    )
