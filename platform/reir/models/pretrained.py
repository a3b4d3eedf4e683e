"""Loads public checkpoints in the layout of `transformers`, from a directory or a model hub.

A hub model is first copied to the hub's cache as a whole, so that weights, tokenizer and image
processor are of the same revision. Only safetensors are read, and no code from a checkpoint is run.
"""

# Shapes: N texts, L tokens, H x W pixels

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from torch import Tensor

from reir.errors import CheckpointError
from reir.records import RgbImage
from reir.text import normalize_expression

WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
"""The files to copy of a hub model: not weights in other formats, and not pictures."""
_NEEDED = (
    f"it must contain config.json, {WEIGHTS}, preprocessor_config.json and the tokenizer files "
    f"of one model"
)


@dataclass(frozen=True, kw_only=True)
class PretrainedModel:
    """A frozen model with its tokenizer and image processor; its methods are thread-safe.

    Attributes:
        model: in eval mode, float32, without gradients, on `device`.
        tokenizer: of the text tower.
        image_processor: photos -> pixel values; the Pillow variant, whose pixels do not depend on
            whether torchvision is installed.
        digest: sha256 of the weights.
        device: where the model runs.
        dtype: of matrix products in the image tower.
    """

    model: Any
    tokenizer: Any
    image_processor: Any
    digest: str
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    # A call sets the padding of the tokenizer, which is shared between threads.
    _tokenizing: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def tokens(self, expressions: Sequence[str]) -> Mapping[str, Tensor]:
        """Return (N, L) ids and mask of expressions, padded or truncated to the tower's length."""
        with self._tokenizing:
            tokens = self.tokenizer(
                [normalize_expression(text) for text in expressions],
                padding="max_length",
                truncation=True,
                max_length=self.model.config.text_config.max_position_embeddings,
                return_tensors="pt",
            )
        return dict(tokens.to(self.device))

    def pixels(self, images: Sequence[RgbImage]) -> Mapping[str, Tensor]:
        """Return the input of the image tower for (H, W, 3) pictures of any sizes."""
        # The library would take a crop that is 1 or 3 pixels high for one with its channels first.
        pixels = self.image_processor(
            images=list(images), input_data_format="channels_last", return_tensors="pt"
        )
        return dict(pixels.to(self.device))

    def autocast(self) -> torch.autocast:
        """Return a context in which matrix products are computed in `dtype`."""
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
) -> PretrainedModel:
    """Load a checkpoint.

    Args:
        source: directory that `save_pretrained` wrote, or hub name, `NAME@REVISION` for a certain
            revision.
        model_class: class of `transformers` with `from_pretrained`.
        model_types: accepted values of `model_type` in config.json.
        device, dtype: see `PretrainedModel`.

    Raises:
        CheckpointError: it does not exist, is incomplete, or is a model of another type.
        ImportError: a package that the tokenizer needs is not installed.
    """
    folder = fetch(source)
    try:
        with no_progress_bars():
            config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
            check_type(source, config.model_type, model_types)
            # In float32, whatever the file has: only the image tower computes in half precision.
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
    except (CheckpointError, ImportError):
        raise
    except Exception as error:  # of damaged files, the libraries raise anything
        raise CheckpointError(f"cannot load {source}: {_first_line(error)}; {_NEEDED}") from error
    check_weights(source, report, model_class.__name__)
    _check_vocabulary(source, len(tokenizer), model.config.text_config.vocab_size)
    return PretrainedModel(
        model=model.eval().requires_grad_(False).to(device),
        tokenizer=tokenizer,
        image_processor=image_processor,
        digest=weights_digest(folder),
        device=device,
        dtype=dtype,
    )


def fetch(source: str) -> Path:
    """Return the folder of a checkpoint; a hub model is downloaded unless it is in the cache.

    Raises:
        CheckpointError: the source is neither a directory nor a hub model that can be reached.
    """
    # Not `Path.expanduser`, which raises an error for the home folder of an unknown user.
    folder = Path(os.path.expanduser(source))
    if folder.is_dir():
        return folder
    name, _, revision = source.partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=FILES))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{source!r} is neither a directory nor a hub model that can be reached: "
            f"{_first_line(error)}; check the name and the connection, or copy the model to "
            f"this machine and give its directory"
        ) from error


def weights_digest(folder: Path) -> str:
    """Return the SHA-256 of the weights in hex; of all files, sorted by name, if there are several.

    Raises:
        CheckpointError: the weights, or a part of them, are missing.
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
    # A single file comes first, as in the library: the digest must be that of the loaded weights.
    if (folder / WEIGHTS).is_file() or not index.is_file():
        return [folder / WEIGHTS]
    parts = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return [folder / name for name in sorted(parts)]


def check_weights(source: str, report: Mapping[str, Any], model_class: str) -> None:
    """Check that a checkpoint had all weights of its model.

    The library gives missing weights random values, and only logs a warning.

    Args:
        source: directory or hub name.
        report: the loading information of `from_pretrained`.
        model_class: name of the class that was loaded.

    Raises:
        CheckpointError: weights are missing.
    """
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(
            f"{source} lacks {len(missing)} weights of {model_class}, such as {missing[0]}; use a "
            f"checkpoint of that class"
        )


def _check_vocabulary(source: str, found: int, wanted: int) -> None:
    # Without its files, the library makes a tokenizer that knows hardly a token. The number of
    # rows in the text tower is often rounded up, but by far less than this.
    if found < wanted / 2:
        raise CheckpointError(
            f"cannot load {source}: its tokenizer has {found} tokens, but its text tower reads "
            f"{wanted}; {_NEEDED}"
        )


def check_type(source: str, found: str, wanted: Sequence[str]) -> None:
    """Check the `model_type` that a checkpoint's config.json names.

    Raises:
        CheckpointError: it is none of `wanted`.
    """
    if found not in wanted:
        raise CheckpointError(
            f"{source} is a model of type {found!r}, but what is needed is {' or '.join(wanted)}"
        )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Hide the progress bars that the library shows even for local files."""
    logging = transformers.utils.logging
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()
