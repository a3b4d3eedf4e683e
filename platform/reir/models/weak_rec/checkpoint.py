"""Reads and writes `WeakRec` checkpoints: `weak_rec.json`, `weak_rec.safetensors`, and a tokenizer.

A checkpoint is complete: it also contains the frozen parts, in float16. What was trained is in
float32.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from reir.checkpoint import TOKENIZER, read_tokenizer
from reir.errors import CheckpointError, DataError
from reir.models.nano.model import ClareNanoConfig
from reir.models.nano.sentence_tower import SentenceTower
from reir.models.weak_rec.anchors import AnchorSource, CandidateAnchors, FrozenParts
from reir.models.weak_rec.cells import CellAnchors
from reir.models.weak_rec.model import Language, WeakRec, WeakRecConfig
from reir.models.weak_rec.phrases import PhraseLanguage
from reir.models.weak_rec.vocabulary import Vocabulary
from reir.models.weak_rec.words import WordLanguage
from reir.models.weak_rec.yolov3 import YoloV3

CONFIG, WEIGHTS = "weak_rec.json", "weak_rec.safetensors"
FORMAT = 1


def save_weak_rec(folder: Path, model: WeakRec, about: Mapping[str, Any]) -> str:
    """Write a checkpoint, and return the digest of its weights.

    Args:
        folder: created if it does not exist; files in it are replaced.
        model: on any device.
        about: JSON values to store under "training" (data, steps, metrics).
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Parameters only: buffers, such as the statistics of batch norms, keep their precision.
    frozen = {name for name, value in model.named_parameters() if not value.requires_grad}
    weights = {
        name: (value.half() if name in frozen else value).cpu().contiguous()
        for name, value in model.state_dict().items()
    }
    save_file(weights, folder / WEIGHTS)
    shape: dict[str, Any] = {"model": model.config.model_dump()}
    if isinstance(model.source, CandidateAnchors):
        shape["candidates"] = asdict(model.source.parts.config)
    if isinstance(model.source, CellAnchors):
        shape["yolov3"] = model.source.yolo.shape
    if isinstance(model.language, PhraseLanguage):
        tower = model.language.tower
        shape["tower"] = {"num_layers": len(tower.layers), "max_tokens": len(tower.positions)}
        model.language.tokenizer.save(str(folder / TOKENIZER))
    if isinstance(model.language, WordLanguage):
        shape["words"] = model.language.vocabulary.words
        shape["word_width"] = model.language.encoder.words.embedding_dim
    config = {"format": FORMAT, "shape": shape, "training": dict(about)}
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
    return weights_digest(folder)


def load_weak_rec(folder: Path) -> WeakRec:
    """Load a model in eval mode and without gradients.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder} contains no weakly supervised model: {' and '.join(missing)} missing; give "
            f"a checkpoint that `reir train --preset weak-rec` wrote"
        )
    with _checkpoint_errors(folder):
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        version = config["format"]
    if version != FORMAT:
        raise CheckpointError(
            f"{folder} has format {version}, but this release reads format {FORMAT}; use the "
            f"release that wrote it, or train again with `reir train --preset weak-rec`"
        )
    with _checkpoint_errors(folder):
        model = _build(folder, config["shape"])
        weights = load_file(folder / WEIGHTS)
        model.load_state_dict({k: _float(v) for k, v in weights.items()})
    return model.eval().requires_grad_(False)


def weights_digest(folder: Path) -> str:
    """Return the sha256 of the weights file, in hex."""
    with (folder / WEIGHTS).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _build(folder: Path, shape: Mapping[str, Any]) -> WeakRec:
    config = WeakRecConfig(**shape["model"])
    source: AnchorSource
    if config.anchors == "candidates":
        source = CandidateAnchors(FrozenParts(ClareNanoConfig(**shape["candidates"])))
    else:
        source = CellAnchors(YoloV3(**shape["yolov3"], paper_parity=config.paper_parity))
    language: Language
    if config.language == "phrase":
        tower = SentenceTower(**shape["tower"])
        language = PhraseLanguage(tower, read_tokenizer(folder / TOKENIZER))
    else:
        vocabulary = Vocabulary(tuple(shape["words"]))
        # The checkpoint has the vectors; only their shape is needed to build the model.
        vectors = torch.zeros(len(vocabulary), shape["word_width"])
        language = WordLanguage(
            vocabulary, vectors, max_words=config.max_words, num_blocks=config.num_blocks
        )
    return WeakRec(config, source, language)


def _float(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value


@contextmanager
def _checkpoint_errors(folder: Path) -> Iterator[None]:
    """Turn errors of damaged files into a `CheckpointError` that names the folder."""
    try:
        yield
    except (
        *(OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError, DataError),
    ) as error:
        raise CheckpointError(
            f"cannot load the weakly supervised model in {folder}: {str(error).splitlines()[0]}; "
            f"{WEIGHTS} and {CONFIG} must come from one `reir train` run"
        ) from error
