"""A BERT text tower of MiniLM-L6 size, built from torch's encoder layers.

It accepts the weights of any BERT checkpoint of the same shape (`from_bert`), and its output equals
that of `transformers.BertModel`, which takes longer to import than a search takes.
"""

# Shapes: N texts, L tokens, C channels

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

VOCABULARY = 30522
WIDTH = 384
NUM_HEADS = 12
MLP_WIDTH = 1536
DROPOUT = 0.1
LAYER_NORM_EPS = 1e-12  # BERT's; the default of torch is 1e-5

_LAYER_NAMES = {
    "self_attn.out_proj": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    "linear1": "intermediate.dense",
    "linear2": "output.dense",
    "norm2": "output.LayerNorm",
}


class SentenceTower(nn.Module):
    """Token ids -> token states.

    Args:
        num_layers: number of encoder layers.
        max_tokens: maximum number of tokens of a text.
    """

    def __init__(self, *, num_layers: int, max_tokens: int) -> None:
        super().__init__()
        self.width = WIDTH
        self.words = nn.Embedding(VOCABULARY, WIDTH, padding_idx=0)
        self.positions = nn.Parameter(torch.zeros(max_tokens, WIDTH))
        self.norm = nn.LayerNorm(WIDTH, eps=LAYER_NORM_EPS)
        self.drop = nn.Dropout(DROPOUT)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                WIDTH,
                NUM_HEADS,
                MLP_WIDTH,
                DROPOUT,
                activation="gelu",
                layer_norm_eps=LAYER_NORM_EPS,
                batch_first=True,
            )
            for _ in range(num_layers)
        )
        for layer in self.layers:
            assert isinstance(layer, nn.TransformerEncoderLayer)
            layer.dropout = nn.Dropout(0.0)  # BERT has none between the layers of its MLP

    def train(self, mode: bool = True) -> SentenceTower:
        """Set the mode; frozen layers stay in evaluation mode, without dropout.

        Dropout there would not regularize what is trained, and takes a third of a training step.
        """
        super().train(mode)
        if _is_frozen(self.words):
            self.drop.eval()
        for layer in self.layers:
            if _is_frozen(layer):
                layer.eval()
        return self

    def keep_products_in(self, dtype: torch.dtype) -> None:
        """Store the weights of matrix products in the type that autocast would cast them to.

        The results are the same to the bit. Without it, encoding a single text spends a fifth of
        its time on casting. Not for training.
        """
        for layer in self.layers:
            for part in (layer.self_attn, layer.linear1, layer.linear2):
                part.to(dtype)

    def forward(self, ids_NL: Tensor, mask_NL: Tensor) -> Tensor:
        """Return (N, L, C) states of the last layer; `mask_NL` is 1 on real tokens."""
        x_NLC: Tensor = self.words(ids_NL) + self.positions[: ids_NL.shape[1]]
        x_NLC = self.drop(self.norm(x_NLC))
        padding_NL = mask_NL == 0
        for layer in self.layers:
            x_NLC = layer(x_NLC, src_key_padding_mask=padding_NL)
        return x_NLC


def _is_frozen(part: nn.Module) -> bool:
    return not any(parameter.requires_grad for parameter in part.parameters())


def from_bert(
    state: Mapping[str, Tensor], *, num_layers: int, max_tokens: int
) -> dict[str, Tensor]:
    """Rename a BERT state dict to that of a `SentenceTower`.

    Only the first segment is used, so its embedding is added to the positions.

    Raises:
        KeyError: a tensor is missing.
    """
    bert = {name.removeprefix("bert."): tensor for name, tensor in state.items()}
    segment = bert["embeddings.token_type_embeddings.weight"][0]
    out = {
        "words.weight": bert["embeddings.word_embeddings.weight"],
        "positions": bert["embeddings.position_embeddings.weight"][:max_tokens] + segment,
        "norm.weight": bert["embeddings.LayerNorm.weight"],
        "norm.bias": bert["embeddings.LayerNorm.bias"],
    }
    for i in range(num_layers):
        source = f"encoder.layer.{i}"
        for kind in ("weight", "bias"):
            parts = [bert[f"{source}.attention.self.{x}.{kind}"] for x in ("query", "key", "value")]
            out[f"layers.{i}.self_attn.in_proj_{kind}"] = torch.cat(parts)
            for name, theirs in _LAYER_NAMES.items():
                out[f"layers.{i}.{name}.{kind}"] = bert[f"{source}.{theirs}.{kind}"]
    return out
