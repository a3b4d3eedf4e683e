"""Writes folders with tiny random models of `transformers`, as `save_pretrained` would."""

from __future__ import annotations

import json
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from transformers import (
    AutoModel,
    BertTokenizer,
    CLIPTokenizer,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    MMGroundingDinoConfig,
    MMGroundingDinoForObjectDetection,
    Owlv2Config,
    Owlv2ForObjectDetection,
    PreTrainedTokenizerFast,
    Sam2Config,
    Sam2Model,
    Sam2VisionConfig,
    Siglip2Config,
    Siglip2Tokenizer,
    SiglipConfig,
    SiglipModel,
    SiglipTokenizer,
)
from transformers.models.grounding_dino.image_processing_pil_grounding_dino import (
    GroundingDinoImageProcessorPil,
)
from transformers.models.owlv2.image_processing_pil_owlv2 import Owlv2ImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

from reir.models.clare.config import ClareConfig
from reir.models.clare.towers import text_config, vision_config
from reir_testing.tiny import tiny_tokenizer

TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
SWIN: dict[str, Any] = {
    "model_type": "swin",
    "image_size": 64,
    "embed_dim": 8,
    "depths": [1, 1, 1, 1],
    "num_heads": [1, 1, 2, 2],
    "window_size": 2,
    "out_indices": [2, 3, 4],
}
LETTERS = string.ascii_lowercase + string.digits + "'-,"
START, END = "<|startoftext|>", "<|endoftext|>"


def save_tiny_owlv2(folder: Path, seed: int = 0) -> Path:
    """Write a random OWLv2 with 36 boxes per photo, and return the folder.

    Each box has a shift and a scale of its own.
    """
    tokenizer = _clip_tokenizer()
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = Owlv2Config(
        text_config=TOWER | special | {"vocab_size": len(tokenizer), "pad_token_id": 0},
        vision_config=TOWER | {"hidden_size": 40, "image_size": 96, "patch_size": 16},
        projection_dim=32,
    )
    # The forked generator leaves the random numbers of the calling test as they are.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _spread(Owlv2ForObjectDetection(config))
        # Small weights, so that the boxes stay near their patches.
        torch.nn.init.normal_(model.box_head.dense2.weight, std=0.05)
        torch.nn.init.zeros_(model.box_head.dense2.bias)
    size = {"height": 96, "width": 96}
    for part in (model, tokenizer, Owlv2ImageProcessorPil(size=size)):
        part.save_pretrained(folder)
    return folder


def save_tiny_sam2(folder: Path, seed: int = 0) -> Path:
    """Write a random SAM 2 for pictures of 64 px, and return the folder."""
    backbone = {
        "model_type": "sam2_hiera_det_model",
        "hidden_size": 8,
        "image_size": [64, 64],
        "embed_dim_per_stage": [8, 16, 32, 64],
        "num_attention_heads_per_stage": [1, 2, 4, 8],
        "blocks_per_stage": [1, 2, 2, 1],
        "window_size_per_stage": [4, 4, 4, 4],
        "global_attention_blocks": [4],
        "window_positional_embedding_background_size": [4, 4],
    }
    config = Sam2Config(
        vision_config=Sam2VisionConfig(
            backbone_config=backbone,
            backbone_channel_list=[64, 32, 16, 8],
            backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]],
            fpn_hidden_size=32,
        ),
        prompt_encoder_config={"hidden_size": 32, "image_size": 64},
        mask_decoder_config={
            "hidden_size": 32,
            "mlp_dim": 32,
            "num_attention_heads": 4,
            "iou_head_hidden_dim": 16,
        },
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        Sam2Model(config).save_pretrained(folder)
    settings = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def save_tiny_grounding_dino(
    folder: Path, *, mm: bool = False, num_queries: int = 20, seed: int = 0
) -> Path:
    """Write a random GroundingDINO for photos of 64 to 112 px, and return the folder.

    Args:
        folder: folder to write to.
        mm: write an MM-GroundingDINO instead.
        num_queries: boxes for each photo.
        seed: seed of the weights.
    """
    tokenizer = _bert_tokenizer()
    bert = TOWER | {"model_type": "bert", "vocab_size": len(tokenizer)}
    shape: dict[str, Any] = {
        "backbone_config": SWIN,
        "text_config": bert | {"max_position_embeddings": 64},
        "d_model": 64,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "num_queries": num_queries,
        "max_text_len": 32,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = (
            MMGroundingDinoForObjectDetection(MMGroundingDinoConfig(**shape))
            if mm
            else GroundingDinoForObjectDetection(GroundingDinoConfig(**shape))
        )
        for name, parameter in model.named_parameters():
            # Untrained, photo and caption hardly influence each other.
            if name.endswith(("vision_param", "text_param")):
                torch.nn.init.constant_(parameter, 0.5)
            # Otherwise, most scores would be 1.
            elif name == "model.decoder.layer_norm.weight" and not mm:
                torch.nn.init.constant_(parameter, 0.1)
            elif "bbox_embed" in name and parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    size = {"shortest_edge": 64, "longest_edge": 112}
    for part in (model, tokenizer, GroundingDinoImageProcessorPil(size=size)):
        part.save_pretrained(folder)
    return folder


def save_tiny_siglip(folder: Path, *, flexible: bool = False, seed: int = 0) -> Path:
    """Write a random SigLIP, and return the folder.

    Args:
        folder: folder to write to.
        flexible: write a SigLIP 2 that accepts pictures of any shape instead.
        seed: seed of the weights.
    """
    tokenizer = _siglip2_tokenizer() if flexible else _word_tokenizer()
    special = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    text = TOWER | special | {"vocab_size": len(tokenizer), "max_position_embeddings": 12}
    if flexible:
        config = Siglip2Config(text_config=text, vision_config=TOWER | {"num_patches": 16})
        processor = Siglip2ImageProcessorPil(max_num_patches=16)
    else:
        config = SiglipConfig(text_config=text, vision_config=TOWER | {"image_size": 48})
        processor = SiglipImageProcessorPil(size={"height": 48, "width": 48})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _spread(AutoModel.from_config(config))
    for part in (model, tokenizer, processor):
        part.save_pretrained(folder)
    return folder


def save_siglip_towers(
    folder: Path, config: ClareConfig, texts: Sequence[str], seed: int = 0
) -> Path:
    """Write random SigLIP towers of CLARE's shape in the published format, and return the folder.

    The tokenizer is stored only as a SentencePiece model, `spiece.model`.

    Args:
        folder: created if it does not exist.
        config: shape of the towers; its vocabulary is also that of the tokenizer.
        texts: training data of the tokenizer; there must be enough for the vocabulary.
        seed: seed of the weights.
    """
    vision, text = vision_config(config).to_dict(), text_config(config).to_dict()
    # The published checkpoints contain a pooling head, which CLARE's towers do not use.
    whole = SiglipConfig(vision_config=vision | {"vision_use_head": True}, text_config=text)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        SiglipModel(whole).save_pretrained(folder)
    with (folder / "spiece.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=file,
            vocab_size=config.vocabulary,
            pad_id=0,
            eos_id=config.pad_token,
            unk_id=2,
            bos_id=-1,
            minloglevel=2,
        )
    SiglipTokenizer(str(folder / "spiece.model")).save_pretrained(folder)
    return folder


def _spread(model: Any) -> Any:
    """Draw weights that are large enough for different inputs to give different outputs."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def _bert_tokenizer() -> BertTokenizer:
    """Return a BERT tokenizer that knows single characters, with the published ids of delimiters.

    GroundingDINO recognizes delimiters by these ids.
    """
    words = [f"[unused{number}]" for number in range(1100)]
    published = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]"}
    for number, word in {**published, 1012: ".", 1029: "?"}.items():
        words[number] = word
    words[200 : 200 + 2 * len(LETTERS)] = [*LETTERS, *(f"##{letter}" for letter in LETTERS)]
    return BertTokenizer(vocab={word: number for number, word in enumerate(words)})


def _clip_tokenizer() -> Any:
    """Return a CLIP tokenizer that knows only single characters."""
    # CLIP reads the text feature at the token with the highest id, so the end token must come last.
    words = ["!", *LETTERS, *(f"{letter}</w>" for letter in LETTERS), START, END]
    return CLIPTokenizer(
        vocab={word: number for number, word in enumerate(words)},
        merges=[],
        unk_token=END,
        bos_token=START,
        eos_token=END,
        pad_token="!",
        model_max_length=16,
    )


def _word_tokenizer() -> Any:
    return PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer(),
        pad_token="[PAD]",
        unk_token="[UNK]",
        model_input_names=["input_ids"],
    )


def _siglip2_tokenizer() -> Any:
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "\u2581", *LETTERS]
    return Siglip2Tokenizer(vocab={word: number for number, word in enumerate(words)}, merges=[])
