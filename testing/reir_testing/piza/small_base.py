"""A grounding model that is small enough to be trained on a CPU, on ordinary generated scenes.

It is the real class of MM-GroundingDINO with few layers and 64 dimensions, for pictures of 256 px,
in which a target of a large scene is 7 to 8 px wide. Its finest features have a stride of 8 px. It
starts from random weights. As in the published training of such models, every phrase of a
caption is grounded: in "the red ring next to the star", the last two words belong to the star, and
the others to the ring. A caption joins several expressions, which the text encoder reads
separately, so that a picture teaches the model about several shapes at once.
"""

# Shapes: P phrases of all pictures, L tokens

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

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
from reir_testing.scene_expressions import SceneShape, is_next_to_one
from reir_testing.scenes import FORMS, Scene, make_scenes, render
from reir_training.piza.losses import Grounding, Predictions, grounding_loss, layers_of

SIDE_PX = 256
MAX_TOKENS = 40
WIDTH = 64
NUM_QUERIES = 48
"""More than the shapes of a picture, since a large shape is proposed by many places."""
FIRST_WORD = 104
"""Id of the first word of the vocabulary; the published ids of the delimiters stay free."""
WORDS = sorted({*FORMS, *PALETTE, "the", "shape", "next", "to"})
DELIMITERS = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]", 1012: "."}
PER_CAPTION = 6
"""Maximum number of expressions in a caption."""
DISTANCE = (0.3, 1.0)
"""Range of the factor by which the shapes of a scene are smaller when sentences are learned."""
SCENES_AT_ONCE = 64
PRIOR_LOGIT = -4.6
"""First logit of every token: a probability of .01, as is usual with the focal loss."""
STEPS = (480, 1008)
"""Steps on phrases and on sentences: two to four hours of a CPU with two cores."""
BATCH = 48
LEARNING_RATE = 1.5e-3
WARM_UP, FINAL_DECAY, FINAL_RATE = 200, 0.6, 0.02
"""Steps of warm-up; share of the last steps in which the rate falls, and to which share of it."""


def small_base() -> Any:
    """Return a random model of 0.91 million parameters."""
    config = MMGroundingDinoConfig(
        backbone_config=SwinConfig(
            image_size=SIDE_PX,
            patch_size=4,
            embed_dim=32,
            depths=[1, 2, 1],
            num_heads=[2, 4, 4],
            window_size=8,
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
        num_feature_levels=3,
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
        text: the words.
        index: index of the shape in its scene.
    """

    text: str
    index: int

    @property
    def num_words(self) -> int:
        """The number of words, each of which is one token."""
        return len(self.text.split())


Grounded = tuple[Phrase, ...]
"""The phrases of an expression."""
Lesson = Callable[[Sequence[SceneShape], np.random.Generator], list[list[Grounded]]]
"""Returns expressions about a scene, by kind."""


@dataclass(frozen=True)
class CaptionedScene:
    """A picture with a caption of some expressions.

    Attributes:
        pixels: (H, W, 3) uint8.
        caption: the expressions, joined by periods.
        ranges: of each phrase, the first word of the caption and the one after its last; the
            periods between expressions count as words.
        boxes: box of each phrase, xyxy in [0, 1].
    """

    pixels: npt.NDArray[np.uint8]
    caption: str
    ranges: tuple[tuple[int, int], ...]
    boxes: tuple[Box, ...]


def captioned_scenes(seed: int, lesson: Lesson) -> Iterator[CaptionedScene]:
    """Yield scenes without end, each with a caption of some expressions of a lesson."""
    rng = np.random.default_rng(seed)
    while True:
        for scene in make_scenes(SCENES_AT_ONCE, int(rng.integers(2**31)), SIDE_PX):
            if chosen := _choose(lesson(scene.shapes, rng), rng):
                yield _captioned(_from_afar(scene, rng) if lesson is sentences else scene, chosen)


def _from_afar(scene: Scene, rng: np.random.Generator) -> Scene:
    """Return a scene whose shapes are closer to each other and smaller, by the same factor."""
    factor = float(rng.uniform(*DISTANCE))
    offset = rng.uniform(0, 1 - factor, size=2)
    shapes = []
    for shape in scene.shapes:
        side_px = max(round(factor * shape.side * scene.side_px), 1)
        x, y = np.rint((factor * np.array(shape.box[:2]) + offset) * scene.side_px).astype(int)
        x, y = (min(int(start), scene.side_px - side_px) for start in (x, y))
        x1, y1, x2, y2 = (edge / scene.side_px for edge in (x, y, x + side_px, y + side_px))
        shapes.append(replace(shape, box=(x1, y1, x2, y2)))
    return replace(scene, shapes=tuple(shapes))


def phrases(shapes: Sequence[SceneShape], _: np.random.Generator) -> list[list[Grounded]]:
    """Return expressions with one phrase, and with two; each phrase describes its own shape."""
    said = [*grounded_expressions(shapes)]
    return [[each for each in said if len(each) == number] for number in (1, 2)]


def sentences(shapes: Sequence[SceneShape], rng: np.random.Generator) -> list[list[Grounded]]:
    """Return expressions all of whose words describe the same shape.

    It is the first one that is named. If that is not in the picture, as the small shapes of a large
    photo hardly are in a look at the whole photo, it is the shape that it should be next to.
    """
    short, pairs = phrases(shapes, rng)
    joined: list[Grounded] = [
        (Phrase(" ".join(each.text for each in pair), pair[0].index),) for pair in pairs
    ]
    present = {f"{shape.color} {shape.form}" for shape in shapes}
    looks = sorted({f"{color} {form}" for color in PALETTE for form in FORMS} - present)
    unseen: list[Grounded] = [
        (Phrase(f"the {looks[int(rng.integers(len(looks)))]} next to {each.text}", each.index),)
        for (each,) in short
    ]
    return [short, joined, unseen]


def grounded_expressions(shapes: Sequence[SceneShape]) -> Iterator[Grounded]:
    """Yield expressions that are true of one shape: first its own phrase, then that of another.

    A shape is described by its form, its color or both, and if others look alike, by the other
    shape that it alone is next to.
    """
    looks = [_descriptions(shape) for shape in shapes]
    members: dict[str, list[int]] = defaultdict(list)
    for index, of_shape in enumerate(looks):
        for text in of_shape:
            members[text].append(index)
    for index, of_shape in enumerate(looks):
        for text in of_shape:
            rivals = [shapes[i] for i in members[text] if i != index]
            if not rivals:
                yield (Phrase(f"the {text}", index),)
            for other, anchor in enumerate(shapes):
                if other != index and is_next_to_one(shapes[index], rivals, anchor):
                    for named in looks[other]:
                        if members[named] == [other]:
                            near = Phrase(f"the {text} next to", index)
                            yield near, Phrase(f"the {named}", other)


def _descriptions(shape: SceneShape) -> tuple[str, ...]:
    return f"{shape.color} {shape.form}", shape.form, f"{shape.color} shape"


def _choose(said: Sequence[list[Grounded]], rng: np.random.Generator) -> list[Grounded]:
    """Choose expressions that fit into a caption together; all kinds are equally frequent."""
    chosen: list[Grounded] = []
    # Beside the words, a caption has a period after each expression, a start and an end.
    room = MAX_TOKENS - 2
    while len(chosen) < PER_CAPTION and (kinds := [each for each in said if each]):
        of_kind = kinds[int(rng.integers(len(kinds)))]
        each = of_kind.pop(int(rng.integers(len(of_kind))))
        room -= sum(phrase.num_words for phrase in each) + 1
        if room < 0:
            break
        chosen.append(each)
    return chosen


def _captioned(scene: Scene, said: Sequence[Grounded]) -> CaptionedScene:
    """Render a scene, and join expressions to its caption."""
    ranges: list[tuple[int, int]] = []
    start = 0
    for phrases in said:
        for phrase in phrases:
            ranges.append((start, start + phrase.num_words))
            start += phrase.num_words
        start += 1
    caption = " . ".join(" ".join(phrase.text for phrase in phrases) for phrases in said)
    boxes = tuple(scene.shapes[phrase.index].box for phrases in said for phrase in phrases)
    return CaptionedScene(render(scene), caption, tuple(ranges), boxes)


def train_small_base(
    steps: tuple[int, int] = STEPS,
    *,
    batch: int = BATCH,
    seed: int = 0,
    progress: Callable[[int, float, float], None] | None = None,
) -> Any:
    """Train a model from random weights, first on phrases and then on sentences.

    Args:
        steps: optimizer steps on phrases, and on sentences.
        batch: pictures per step.
        seed: of weights and scenes.
        progress: called after each step, with the loss and the seconds so far.

    Returns:
        the model in eval mode.
    """
    torch.manual_seed(seed)
    model = add_adapters(small_base(), PizaConfig(method="full")).train()
    tokenizer, began = word_tokenizer(), time.perf_counter()
    for number, lesson in enumerate((phrases, sentences)):
        optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=1e-4)
        scenes = captioned_scenes(seed + number, lesson)
        for step in range(steps[number]):
            left = (1 - step / steps[number]) / FINAL_DECAY if lesson is sentences else 1
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * min((step + 1) / WARM_UP, max(left, FINAL_RATE), 1)
            loss = _loss(model, tokenizer, [next(scenes) for _ in range(batch)])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if progress is not None:
                progress(
                    sum(steps[:number]) + step, float(loss.detach()), time.perf_counter() - began
                )
    return model.base.eval()


def _loss(model: Any, tokenizer: Any, scenes: Sequence[CaptionedScene]) -> Tensor:
    """Return the loss of some pictures, a mean over all of their phrases."""
    processor = GroundingDinoImageProcessorPil(do_resize=False, do_pad=False)
    pixels = processor(images=[scene.pixels for scene in scenes], return_tensors="pt")
    return phrase_loss(model, pixels["pixel_values"], caption_tensors(tokenizer, scenes))


class CaptionTensors(NamedTuple):
    """The phrases of some captions, and the boxes that they describe, as tensors.

    Attributes:
        input_ids, attention_mask: (N, L) tokens of each caption.
        picture: (P,) picture of each phrase.
        is_own: (P, L) which tokens belong to the phrase.
        boxes: (P, 4) box of each phrase, xyxy in [0, 1].
    """

    input_ids: Tensor
    attention_mask: Tensor
    picture: Tensor
    is_own: Tensor
    boxes: Tensor


def caption_tensors(tokenizer: Any, scenes: Sequence[CaptionedScene]) -> CaptionTensors:
    """Return the captions of some pictures as tensors."""
    captions = captions_of(tokenizer, [each.caption for each in scenes], MAX_TOKENS)
    picture_P = torch.repeat_interleave(torch.tensor([len(each.boxes) for each in scenes]))
    # Every word is one token, and the first token is the start.
    ranges = [(1 + first, 1 + last) for each in scenes for first, last in each.ranges]
    first_P, last_P = torch.tensor(ranges).T
    place_L = torch.arange(captions.input_ids.shape[1])
    is_own_PL = (place_L >= first_P[:, None]) & (place_L < last_P[:, None])
    boxes_P4 = torch.tensor([box for each in scenes for box in each.boxes])
    return CaptionTensors(
        captions.input_ids, captions.attention_mask, picture_P, is_own_PL, boxes_P4
    )


def phrase_loss(model: Any, pixels: Tensor, said: CaptionTensors) -> Tensor:
    """Return the loss of (N, 3, H, W) pictures, a mean over all of their phrases."""
    output = model(pixels, None, said.input_ids, said.attention_mask, all_layers=True)
    # Only the tokens of a phrase count in its row: of the others, some are positive elsewhere.
    truth = Grounding(said.boxes, said.is_own, said.is_own)
    terms = [
        term
        for layer in layers_of(output, said.input_ids.shape[1], NUM_QUERIES)
        for term in grounding_loss(
            Predictions(layer.name, layer.logits[said.picture], layer.boxes_xyxy[said.picture]),
            truth,
        ).values()
    ]
    return torch.stack(terms).sum()
