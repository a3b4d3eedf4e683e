"""The small grounding model: its phrases, its words, and that training lowers its loss."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import torch

from reir.models.grounding_dino import captions_of, load_grounding_dino
from reir_testing.piza.small_base import (
    MAX_TOKENS,
    captioned_scenes,
    phrases_of,
    save_small_base,
    small_base,
    train_small_base,
    word_tokenizer,
)
from reir_testing.scene_expressions import SceneExpression, SceneShape
from reir_testing.scenes import make_scenes, render


def shape(size: str, color: str, form: str) -> SceneShape:
    return SceneShape(form=form, color=color, size=size, box=(0, 0, 0.1, 0.1), rgb=(0, 0, 0))


def test_every_phrase_belongs_to_the_shape_that_it_describes() -> None:
    shapes = (
        shape("small", "red", "ring"),
        shape("large", "blue", "star"),
        shape("small", "blue", "cross"),
    )
    text = "the small red ring left of the large blue star and above the cross"
    found = phrases_of(SceneExpression(text, 0, "relation_pair"), shapes)
    said = [(" ".join(text.split()[p.first : p.last]), p.index) for p in found]
    assert said == [
        ("the small red ring left of", 0),
        ("the large blue star", 1),
        ("the cross", 2),
    ]
    (whole,) = phrases_of(SceneExpression("the second shape from the left", 1, "ordinal"), shapes)
    assert (whole.first, whole.last, whole.index) == (0, 6, 1)


def test_all_words_are_known_and_captions_fit() -> None:
    tokenizer = word_tokenizer()
    for scene in islice(captioned_scenes(3), 100):
        captions = captions_of(tokenizer, [scene.caption], MAX_TOKENS)
        words = scene.caption.split()
        # start, words and periods, the last period, end
        assert captions.input_ids.shape == (1, len(words) + 3)
        assert tokenizer.convert_ids_to_tokens(captions.input_ids[0, 1:-2]) == words
        assert len(scene.phrases) == len(scene.boxes)
        for phrase in scene.phrases:
            assert "." not in words[phrase.first : phrase.last]


def test_training_lowers_the_loss_and_the_model_is_a_base(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    assert sum(p.numel() for p in small_base().parameters()) < 1_000_000
    losses: list[float] = []
    model = train_small_base(
        12, batch=8, learning_rate=2e-3, progress=lambda _, loss, __: losses.append(loss)
    )
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    localizer = load_grounding_dino(str(save_small_base(tmp_path, model)))
    (found,) = localizer.localize([render(make_scenes(1, 0)[0])], ["the red circle"])
    assert found.boxes.shape == (16, 4)
