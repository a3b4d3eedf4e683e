"""A grounding model that is small enough to be trained on a CPU, on ordinary generated scenes.

It is the real class of MM-GroundingDINO with few layers and 64 dimensions, for pictures of 96 px.
It starts from random weights. As in the published training of such models, every phrase of a
caption is grounded: in "the red ring left of the star", the last two words belong to the star, and
the others to the ring. A caption joins several expressions, which the text encoder reads
separately, so that a picture teaches the model about several shapes at once.
"""

# Shapes: P phrases of all pictures, L tokens

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertTokenizer,
    MMGroundingDinoConfig,
    MMGroundingDinoForObjectDetection,
    SwinConfig,
)
from transformers.models.grounding_dino.image_processing_pil_grounding_dino import (
    GroundingDinoImageProcessorPil,
)

from reir.models.grounding_dino import captions_of
from reir.models.piza.config import PizaConfig
from reir.models.piza.model import add_adapters
from reir.records import Box
from reir_testing.fakes import PALETTE
from reir_testing.scene_expressions import (
    ORDINALS,
    SceneExpression,
    SceneShape,
    expressions,
)
from reir_testing.scenes import FORMS, Scene, make_scenes, render
from reir_training.piza.losses import Grounding, Predictions, grounding_loss, layers_of

SIDE_PX = 96
MAX_TOKENS = 40
WIDTH, NUM_QUERIES = 64, 16
FIRST_WORD = 104
"""Id of the first word of the vocabulary; the published ids of the delimiters stay free."""
SIZES = ("small", "medium", "large", "smallest", "largest")
SIDES = ("left", "right", "top", "bottom", "leftmost", "rightmost", "topmost", "bottommost")
RELATIONS = ("above", "below", "next", "nearest", "of", "to", "from", "and", "the", "shape")
WORDS = sorted({*FORMS, *PALETTE, *ORDINALS, *SIZES, *SIDES, *RELATIONS})
DELIMITERS = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]", 1012: "."}
PER_CAPTION = 4
"""Maximum number of expressions in a caption."""
SCENES_AT_ONCE = 64
PRIOR_LOGIT = -4.6
"""First logit of every token: a probability of .01, as is usual with the focal loss."""
WARM_UP, FINAL_DECAY, FINAL_RATE = 200, 0.4, 0.02
"""Steps of warm-up, share of the run in which the rate falls, and the share to which it falls."""


def small_base() -> Any:
    """Return a random model of 0.8 million parameters."""
    config = MMGroundingDinoConfig(
        backbone_config=SwinConfig(
            image_size=SIDE_PX,
            patch_size=4,
            embed_dim=24,
            depths=[1, 2, 2],
            num_heads=[2, 4, 4],
            window_size=6,
            out_features=["stage2", "stage3"],
            drop_path_rate=0.0,
        ),
        text_config=BertConfig(
            vocab_size=1030,
            hidden_size=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=2 * WIDTH,
            max_position_embeddings=MAX_TOKENS,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        ),
        num_queries=NUM_QUERIES,
        encoder_layers=2,
        decoder_layers=2,
        encoder_ffn_dim=2 * WIDTH,
        decoder_ffn_dim=2 * WIDTH,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_n_points=2,
        decoder_n_points=2,
        d_model=WIDTH,
        dropout=0.0,
        fusion_droppath=0.0,
        num_feature_levels=2,
        max_text_len=MAX_TOKENS,
    )
    model = MMGroundingDinoForObjectDetection(config)
    for name, parameter in model.named_parameters():
        if "class_embed" in name:
            torch.nn.init.constant_(parameter, PRIOR_LOGIT)
    return model


def word_tokenizer() -> BertTokenizer:
    """Return a tokenizer of the words of generated scenes."""
    vocabulary = [f"[unused{number}]" for number in range(1030)]
    for number, word in {**DELIMITERS, 1029: "?", **dict(enumerate(WORDS, FIRST_WORD))}.items():
        vocabulary[number] = word
    return BertTokenizer(vocab={word: number for number, word in enumerate(vocabulary)})


def save_small_base(folder: Path, model: Any) -> Path:
    """Write a model, its tokenizer and its image processor, and return the folder."""
    size = {"shortest_edge": SIDE_PX, "longest_edge": 2 * SIDE_PX}
    for part in (model, word_tokenizer(), GroundingDinoImageProcessorPil(size=size)):
        part.save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Phrase:
    """Some words of an expression, and the shape that they describe.

    Attributes:
        first, last: range of the words in the expression, `last` excluded.
        index: index of the shape in its scene.
    """

    first: int
    last: int
    index: int


@dataclass(frozen=True)
class CaptionedScene:
    """A picture with a caption of some of its expressions.

    Attributes:
        pixels: (H, W, 3) uint8.
        caption: the expressions, joined by periods.
        phrases: ranges of the words and periods of the caption, and the shapes of the scene.
        boxes: box of each phrase, xyxy in [0, 1].
    """

    pixels: npt.NDArray[np.uint8]
    caption: str
    phrases: tuple[Phrase, ...]
    boxes: tuple[Box, ...]


def captioned_scenes(seed: int) -> Iterator[CaptionedScene]:
    """Yield scenes without end; all kinds of expressions are equally frequent."""
    rng = np.random.default_rng(seed)
    while True:
        scenes = make_scenes(SCENES_AT_ONCE, int(rng.integers(2**31)), SIDE_PX)
        said = expressions([scene.shapes for scene in scenes], "photo")
        for scene, of_scene in zip(scenes, said, strict=True):
            if chosen := _choose(of_scene, rng):
                yield _captioned(scene, chosen)


def _captioned(scene: Scene, chosen: Sequence[SceneExpression]) -> CaptionedScene:
    found: list[Phrase] = []
    start = 0
    for each in chosen:
        found += [
            Phrase(start + phrase.first, start + phrase.last, phrase.index)
            for phrase in phrases_of(each, scene.shapes)
        ]
        start += len(each.text.split()) + 1
    boxes = tuple(scene.shapes[phrase.index].box for phrase in found)
    caption = " . ".join(each.text for each in chosen)
    return CaptionedScene(render(scene), caption, tuple(found), boxes)


def phrases_of(said: SceneExpression, shapes: Sequence[SceneShape]) -> list[Phrase]:
    """Return the phrases of an expression: first that of its own shape, then those of the others.

    Each relation is followed by "the" and a description that is true of one shape only.
    """
    words = said.text.split()
    starts = [place for place, word in enumerate(words) if word == "the"]
    if said.kind not in ("relation", "relation_pair"):
        return [Phrase(0, len(words), said.index)]
    found = [Phrase(0, starts[1], said.index)]
    for start in starts[1:]:
        last = next(i for i in range(start, len(words)) if words[i] in FORMS) + 1
        named = set(words[start + 1 : last])
        (index,) = [
            i for i, shape in enumerate(shapes) if named <= {shape.size, shape.color, shape.form}
        ]
        found.append(Phrase(start, last, index))
    return found


def _choose(said: Sequence[SceneExpression], rng: np.random.Generator) -> list[SceneExpression]:
    """Choose one to four expressions that fit into a caption."""
    by_kind: dict[str, list[SceneExpression]] = defaultdict(list)
    for each in said:
        by_kind[each.kind].append(each)
    chosen: list[SceneExpression] = []
    # Beside the words, a caption has a period after each expression, a start and an end.
    room = MAX_TOKENS - 2
    for _ in range(int(rng.integers(1, PER_CAPTION + 1)) if by_kind else 0):
        kind = list(by_kind)[int(rng.integers(len(by_kind)))]
        each = by_kind[kind][int(rng.integers(len(by_kind[kind])))]
        room -= len(each.text.split()) + 1
        if room < 0:
            break
        chosen.append(each)
    return chosen


def train_small_base(
    steps: int,
    *,
    batch: int = 24,
    learning_rate: float = 1e-3,
    seed: int = 0,
    progress: Callable[[int, float, float], None] | None = None,
) -> Any:
    """Train a model from random weights, and return it in eval mode.

    Args:
        steps: optimizer steps.
        batch: pictures per step.
        learning_rate: of AdamW, after a warm-up; it falls at the end.
        seed: of weights and scenes.
        progress: called after each step, with the loss and the seconds so far.
    """
    torch.manual_seed(seed)
    model = add_adapters(small_base(), PizaConfig(method="full"))
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=1e-4)
    scenes, tokenizer, began = captioned_scenes(seed), word_tokenizer(), time.perf_counter()
    model.train()
    for step in range(steps):
        left = (1 - step / steps) / FINAL_DECAY
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min((step + 1) / WARM_UP, max(left, FINAL_RATE), 1)
        loss = _loss(model, tokenizer, [next(scenes) for _ in range(batch)])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if progress is not None:
            progress(step, float(loss.detach()), time.perf_counter() - began)
    return model.base.eval()


def _loss(model: Any, tokenizer: Any, scenes: Sequence[CaptionedScene]) -> Tensor:
    """Return the loss of some pictures, a mean over all of their phrases."""
    processor = GroundingDinoImageProcessorPil(do_resize=False, do_pad=False)
    pixels = processor(images=[scene.pixels for scene in scenes], return_tensors="pt")
    captions = captions_of(tokenizer, [each.caption for each in scenes], MAX_TOKENS)
    output = model(
        pixels["pixel_values"], None, captions.input_ids, captions.attention_mask, all_layers=True
    )
    picture_P = torch.repeat_interleave(torch.tensor([len(each.phrases) for each in scenes]))
    # Every word is one token, and the first token is the start.
    ranges = [(1 + p.first, 1 + p.last) for each in scenes for p in each.phrases]
    first_P, last_P = torch.tensor(ranges).T
    place_L = torch.arange(captions.input_ids.shape[1])
    own_PL = (place_L >= first_P[:, None]) & (place_L < last_P[:, None])
    # Only the tokens of a phrase count in its row: of the others, some are positive elsewhere.
    truth = Grounding(torch.tensor([box for each in scenes for box in each.boxes]), own_PL, own_PL)
    terms = [
        term
        for layer in layers_of(output, captions.input_ids.shape[1], NUM_QUERIES)
        for term in grounding_loss(
            Predictions(layer.name, layer.logits[picture_P], layer.boxes_xyxy[picture_P]), truth
        ).values()
    ]
    return torch.stack(terms).sum()
