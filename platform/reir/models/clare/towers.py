"""CLARE's SigLIP towers: their configurations, and loading of public weights and tokenizers."""

from __future__ import annotations

import re
import string
from typing import Any

import torch
from safetensors import SafetensorError
from tokenizers import Regex, Tokenizer, normalizers
from torch import nn
from transformers import SiglipTextConfig, SiglipVisionConfig

from reir.errors import CheckpointError
from reir.models.clare.config import ClareConfig


def vision_config(config: ClareConfig) -> Any:
    """Return the `SiglipVisionConfig`, without the pooling head, which CLARE does not use."""
    return SiglipVisionConfig(
        hidden_size=config.vision_width,
        num_hidden_layers=config.vision_layers,
        num_attention_heads=config.vision_heads,
        intermediate_size=config.vision_mlp,
        patch_size=config.patch_px,
        image_size=config.patch_px * config.native_grid,
        vision_use_head=False,
        attn_implementation="sdpa",
    )


def text_config(config: ClareConfig) -> Any:
    """Return the `SiglipTextConfig`."""
    return SiglipTextConfig(
        hidden_size=config.text_width,
        num_hidden_layers=config.text_layers,
        num_attention_heads=config.text_heads,
        intermediate_size=config.text_mlp,
        vocab_size=config.vocabulary,
        max_position_embeddings=config.max_tokens,
        pad_token_id=config.pad_token,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="sdpa",
    )


def load_towers(vision: nn.Module, language: nn.Module, name_or_path: str) -> None:
    """Load pretrained SigLIP weights into both towers; only safetensors are read.

    Args:
        vision: SigLIP vision tower; its weights are overwritten.
        language: SigLIP text tower; its weights are overwritten.
        name_or_path: hub name or local directory of a SigLIP model with both towers.

    Raises:
        CheckpointError: the model does not exist, lacks weights, or has other shapes.
    """
    for tower, options in ((vision, {"vision_use_head": False}), (language, {})):
        kind: Any = type(tower)
        try:
            loaded, report = kind.from_pretrained(
                name_or_path,
                output_loading_info=True,
                use_safetensors=True,
                dtype=torch.float32,
                **options,
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            what = f"{type(error).__name__}: {error}".splitlines()[0]
            raise CheckpointError(
                f"{name_or_path} does not load as {kind.__name__} ({what}); "
                f"give a hub name or the directory of a SigLIP model"
            ) from error
        # The library gives missing weights random values, and only logs a warning.
        missing = sorted(report["missing_keys"])
        if missing:
            raise CheckpointError(
                f"{name_or_path} lacks {len(missing)} weights of {kind.__name__}, such as "
                f"{missing[0]}; give the directory of a whole SigLIP model"
            )
        # `from_pretrained` builds a tower from the public configuration. Copying its weights checks
        # that the tower of this model has the same shapes.
        try:
            tower.load_state_dict(loaded.state_dict())
        except RuntimeError as error:
            raise CheckpointError(
                f"{name_or_path} has other shapes than this configuration "
                f"({str(error).splitlines()[-1].strip()}); choose the preset of the same size"
            ) from error


def load_tokenizer(name_or_path: str) -> Tokenizer:
    """Load the tokenizer of pretrained towers, in the form that a checkpoint stores.

    SigLIP's tokenizer is a SentencePiece model; it is converted into one that produces the same
    tokens without SentencePiece.

    Args:
        name_or_path: as in `load_towers`.

    Raises:
        CheckpointError: there is no tokenizer, or a checkpoint cannot store one of its kind.
        ImportError: a package that the tokenizer needs is not installed.
    """
    from transformers import AutoTokenizer, SiglipTokenizer

    try:
        # Never the code that a model repository may contain.
        found = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
        if isinstance(found, SiglipTokenizer):
            return _from_sentence_piece(found)
        tokenizer: Tokenizer = found.backend_tokenizer
    except (OSError, ValueError, RuntimeError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        raise CheckpointError(
            f"{name_or_path} has no usable tokenizer ({what}); give the hub name or the directory "
            f"of a SigLIP model that includes spiece.model, or set `tokenizer` to another one"
        ) from error
    # `tokenize` pads and truncates itself, so that the end-of-sequence token is kept.
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _from_sentence_piece(slow: Any) -> Tokenizer:
    """Convert a `SiglipTokenizer` into a fast tokenizer that produces the same tokens.

    The converter for UDOP, which uses the same kind of SentencePiece model, handles the pieces and
    the end-of-sequence token. In addition, SigLIP lowercases text and removes punctuation first.
    """
    from transformers.convert_slow_tokenizer import UdopConverter

    tokenizer: Tokenizer = UdopConverter(slow).converted()
    punctuation = Regex(f"[{re.escape(string.punctuation)}]")
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Lowercase(),
            normalizers.Replace(punctuation, ""),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
            tokenizer.normalizer,
        ]
    )
    return tokenizer
