"""Public checkpoints in the layout of `transformers`: from a hub name or a directory to a model.

Knows no encoder. Everything is read from one folder: a hub model is first copied into the hub's
cache as a whole, so that weights, tokenizer and pre-processing are of the same revision. Only
safetensors are read, and no code that a checkpoint brings along is run.
"""

# Shapes: N texts, L tokens, H x W pixels

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from torch import Tensor

from reir.errors import CheckpointError
from reir.models.seams import RgbImage
from reir.text import normalise_expression

WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]
"""What is copied of a hub model: no weights in other formats, no pictures."""


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """A frozen model with what prepares its input; its methods may be called from many threads.

    Attributes:
        model: in eval mode, float32, without gradients, on `device`.
        tokenizer: of the text tower.
        image_processor: photos -> pixel values; the variant on Pillow, which gives the same pixels
            whether torchvision is installed or not.
        digest: sha256 of the weights.
        device: where the model runs.
        dtype: in which the image tower multiplies.
    """

    model: Any
    tokenizer: Any
    image_processor: Any
    digest: str
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    # setting the padding of a tokenizer is not safe from two threads
    _tokenizing: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def tokens(self, expressions: Sequence[str]) -> Mapping[str, Tensor]:
        """(N, L) ids and mask of normalised expressions, padded or cut to the tower's full L."""
        with self._tokenizing:
            tokens = self.tokenizer(
                [normalise_expression(text) for text in expressions],
                padding="max_length",
                truncation=True,
                max_length=self.model.config.text_config.max_position_embeddings,
                return_tensors="pt",
            )
        return dict(tokens.to(self.device))

    def pixels(self, images: Sequence[RgbImage]) -> Mapping[str, Tensor]:
        """Return what the image tower takes of (H, W, 3) pictures, each of its own size."""
        pixels = self.image_processor(
            images=list(images), input_data_format="channels_last", return_tensors="pt"
        )
        return dict(pixels.to(self.device))

    def multiplying(self) -> torch.autocast:
        """Return a context in which the model multiplies in `dtype`."""
        return torch.autocast(
            torch.device(self.device).type, self.dtype, self.dtype != torch.float32
        )


def load_pretrained(
    source: str,
    model_class: Any,
    model_types: Sequence[str],
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Pretrained:
    """Load a checkpoint.

    Args:
        source: directory that `save_pretrained` wrote, or hub name, `NAME@REVISION` for a certain
            revision.
        model_class: class of `transformers` with `from_pretrained`.
        model_types: values of `model_type` in config.json that are of use.
        device, dtype: see `Pretrained`.

    Raises:
        CheckpointError: not there, incomplete, or a model of another type.
        ImportError: a package that the tokenizer needs is not installed.
    """
    folder = fetch(source)
    try:
        with _no_progress_bars():
            config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
            _check_type(source, config.model_type, model_types)
            model, report = model_class.from_pretrained(
                folder,
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                output_loading_info=True,
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            image_processor = transformers.AutoImageProcessor.from_pretrained(
                folder, backend="pil", trust_remote_code=False
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"{source} does not load: {_first_line(error)}; it must hold config.json, {WEIGHTS}, "
            f"preprocessor_config.json and the tokenizer's files, all of one model"
        ) from error
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(
            f"{source} lacks {len(missing)} weights of {model_class.__name__}, "
            f"{missing[0]} first; use a checkpoint of that class"
        )
    return Pretrained(
        model=model.eval().requires_grad_(False).to(device),
        tokenizer=tokenizer,
        image_processor=image_processor,
        digest=weights_digest(folder),
        device=device,
        dtype=dtype,
    )


def fetch(source: str) -> Path:
    """Return the folder of a checkpoint; a hub model is downloaded unless the cache holds it.

    Raises:
        CheckpointError: neither a directory nor a model that the hub gives out.
    """
    if Path(source).is_dir():
        return Path(source)
    name, _, revision = source.partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=FILES))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{source!r} is neither a directory nor a hub model within reach: "
            f"{_first_line(error)}; check the name and the connection, or copy the model here and "
            f"give its directory"
        ) from error


def weights_digest(folder: Path) -> str:
    """Sha256 of the weights file, hex; of all parts in the order of their names if it is split.

    Raises:
        CheckpointError: there are no weights, or a part is missing.
    """
    files = _weight_files(folder)
    if missing := [file.name for file in files if not file.is_file()]:
        raise CheckpointError(
            f"{folder} has no {missing[0]}; save the model with `save_pretrained`, "
            f"which writes safetensors"
        )
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            while chunk := opened.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def _weight_files(folder: Path) -> list[Path]:
    index = folder / WEIGHTS_INDEX
    if (folder / WEIGHTS).is_file() or not index.is_file():
        return [folder / WEIGHTS]
    parts = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return [folder / name for name in sorted(parts)]


def _check_type(source: str, found: str, wanted: Sequence[str]) -> None:
    if found not in wanted:
        raise CheckpointError(
            f"{source} is a model of type {found!r}, this encoder takes {', '.join(wanted)}"
        )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Keep the library from drawing bars while files of this machine are read."""
    logging = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
