"""The small grounding model: its phrases, its words, and that training lowers its loss."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from reir.models.grounding_dino import captions_of, load_grounding_dino
from reir_testing.piza.small_base import (
    MAX_TOKENS,
    NUM_QUERIES,
    Lesson,
    Phrase,
    captioned_scenes,
    grounded_expressions,
    phrases,
    save_small_base,
    sentences,
    small_base,
    train_small_base,
    word_tokenizer,
)
from reir_testing.scene_expressions import SceneShape
from reir_testing.scenes import make_scenes, render


def shape(color: str, form: str, x: float) -> SceneShape:
    box = (x, 0.1, x + 0.1, 0.2)
    return SceneShape(form=form, color=color, size="small", box=box, rgb=(0, 0, 0))


def test_an_expression_is_true_of_one_shape_and_names_another_where_others_look_alike() -> None:
    shapes = (
        shape("red", "ring", 0.1),
        shape("red", "ring", 0.6),
        shape("blue", "star", 0.75),
    )
    said = {
        " ".join(phrase.text for phrase in phrases): [phrase.index for phrase in phrases]
        for phrases in grounded_expressions(shapes)
    }
    assert said["the star"] == said["the blue star"] == said["the blue shape"] == [2]
    assert said["the red ring next to the blue star"] == [1, 2]
    # Two shapes are red rings, so none of them can be meant, or be next to which a shape is.
    assert not {"the red ring", "the ring", "the star next to the ring"} & said.keys()
    assert not [indices for indices in said.values() if indices[0] == 0]


def test_a_sentence_about_a_shape_that_is_missing_means_the_one_next_to_it() -> None:
    shapes = (shape("red", "ring", 0.1), shape("blue", "star", 0.25))
    short, joined, unseen = sentences(shapes, np.random.default_rng(0))
    assert (Phrase("the ring", 0),) in short
    assert (Phrase("the red ring next to the blue star", 0),) in joined
    for (phrase,) in unseen:
        color, form = phrase.text.split()[1:3]
        assert (color, form) not in [("red", "ring"), ("blue", "star")]
        near = phrase.text.split(" next to the ")[1].removesuffix(" shape").split()
        assert {*near} <= ({"red", "ring"}, {"blue", "star"})[phrase.index]


@pytest.mark.parametrize("lesson", [phrases, sentences])
def test_all_words_are_known_and_captions_fit(lesson: Lesson) -> None:
    tokenizer = word_tokenizer()
    for scene in islice(captioned_scenes(3, lesson), 100):
        captions = captions_of(tokenizer, [scene.caption], MAX_TOKENS)
        words = scene.caption.split()
        # start, words and periods, the last period, end
        assert captions.input_ids.shape == (1, len(words) + 3)
        assert tokenizer.convert_ids_to_tokens(captions.input_ids[0, 1:-2]) == words
        assert len(scene.ranges) == len(scene.boxes)
        boxes = np.array(scene.boxes)
        assert (boxes[:, :2] >= 0).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        assert (boxes[:, 2:] <= 1).all()
        for first, last in scene.ranges:
            assert words[first] == "the"
            assert "." not in words[first:last]


def test_training_lowers_the_loss_and_the_model_is_a_base(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    assert sum(p.numel() for p in small_base().parameters()) < 1_000_000
    losses: list[float] = []
    model = train_small_base((15, 1), batch=2, progress=lambda _, loss, __: losses.append(loss))
    assert len(losses) == 16
    assert sum(losses[-4:-1]) < 0.9 * sum(losses[:3])
    localizer = load_grounding_dino(str(save_small_base(tmp_path, model)))
    (found,) = localizer.localize([render(make_scenes(1, 0)[0])], ["the red circle"])
    assert found.boxes.shape == (NUM_QUERIES, 4)
