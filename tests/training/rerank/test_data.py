"""Training of the re-ranker: batches, loss, and that it learns relations."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from reir.evaluate.rerank_metrics import dual_scores, hits_at, hits_in_photo, reranked_scores
from reir.models.interfaces import EncodedExpression
from reir.models.reranker import PhotoInstances, Reranker, RerankerConfig, pad_inputs
from reir_testing.fakes import PALETTE
from reir_testing.scene_expressions import expressions
from reir_testing.scenes import FORMS, Scene, make_scenes
from reir_training.rerank.task import NONE, RerankBatch, RerankObjective

SIDES = ("left of", "right of", "above", "below")
LOOKS = (*PALETTE, *FORMS)
ROLES = ("head", *SIDES, "anchor")
RELATION = re.compile(rf"the (.+) ({'|'.join(SIDES)}) the (.+)")


def seen(scene: Scene, rng: np.random.Generator) -> PhotoInstances:
    """Vectors that encode color and form of each shape, but not its neighbors."""
    vectors = rng.normal(0, 0.1, size=(len(scene.shapes), len(LOOKS)))
    for vector, shape in zip(vectors, scene.shapes, strict=True):
        vector[[LOOKS.index(shape.color), LOOKS.index(shape.form)]] += 1
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return PhotoInstances(
        vectors.astype(np.float32),
        np.array([shape.box for shape in scene.shapes], dtype=np.float32),
        np.ones(len(scene.shapes), dtype=np.float32),
    )


def read(head: str, side: str, anchor: str) -> EncodedExpression:
    """Imitate the output of a text tower: each word with its role in the sentence.

    The vector names the looks of head and anchor alike, so it cannot tell them apart.
    """
    states, vector = [], np.zeros(len(LOOKS), dtype=np.float32)
    for role, words in (("head", head), (side, ""), ("anchor", anchor)):
        row = np.zeros(len(LOOKS) + len(ROLES), dtype=np.float32)
        row[len(LOOKS) + ROLES.index(role)] = 1
        states.append(row)
        for word in (w for w in words.split() if w in LOOKS):
            states.append(row.copy())
            states[-1][LOOKS.index(word)] = 1
            vector[LOOKS.index(word)] += 1
    return EncodedExpression(vector / max(float(np.linalg.norm(vector)), 1.0), np.stack(states))


Task = tuple[EncodedExpression, PhotoInstances, int]


def relations(count: int, seed: int) -> list[Task]:
    """Return expression, photo and instance for every simple relation in some scenes."""
    rng, scenes = np.random.default_rng(seed), make_scenes(count, seed)
    tasks = []
    for scene, said in zip(scenes, expressions([s.shapes for s in scenes], "photo"), strict=True):
        found = [(RELATION.fullmatch(e.text), e.index) for e in said if e.kind == "relation"]
        usable = [(match, index) for match, index in found if match]
        for i in rng.permutation(len(usable))[:4]:
            match, index = usable[i]
            if "small" not in match[0] and "medium" not in match[0] and "large" not in match[0]:
                tasks.append((read(*match.groups()), seen(scene, rng), index))
    return tasks


def batch_of(tasks: Sequence[Task]) -> RerankBatch:
    inputs = pad_inputs([t[0] for t in tasks], [t[1] for t in tasks], range(len(tasks)))
    overlap = torch.zeros(inputs.valid.shape)
    overlap[range(len(tasks)), [t[2] for t in tasks]] = 1
    return RerankBatch(inputs, torch.arange(len(tasks))[:, None], overlap)


@pytest.mark.slow
def test_the_reranker_learns_relations_that_the_vectors_do_not_contain() -> None:
    train, held_out = relations(400, 0), relations(60, 1)
    torch.manual_seed(0)
    shape = RerankerConfig(
        dim=len(LOOKS), text_width=len(LOOKS) + len(ROLES), width=32, num_layers=2, dropout=0
    )
    objective = RerankObjective(Reranker(shape))
    optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    rng = np.random.default_rng(0)
    for _ in range(250):
        chosen = [train[i] for i in rng.integers(len(train), size=32)]
        loss, _ = objective(batch_of(chosen), "rerank")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    texts, photos, right = zip(*held_out, strict=True)
    own = np.arange(len(held_out))
    owner = np.repeat(own, [len(photo.boxes) for photo in photos])
    inside = owner[None] == own[:, None]
    fits = np.zeros_like(inside)
    fits[own, [np.flatnonzero(inside[m])[i] for m, i in enumerate(right)]] = True
    scores = reranked_scores(objective.model.eval(), texts, photos, own)
    before = hits_in_photo(dual_scores(texts, photos), fits, inside).mean()
    after = hits_in_photo(scores, fits, inside).mean()
    assert before < 0.6
    assert after > 0.85
    assert hits_at(scores, fits, 1).mean() > hits_at(dual_scores(texts, photos), fits, 1).mean()


def test_photos_beyond_the_best_keep_their_order() -> None:
    texts, photos, _ = zip(*relations(30, 2), strict=True)
    torch.manual_seed(0)
    model = Reranker(
        RerankerConfig(dim=len(LOOKS), text_width=len(LOOKS) + len(ROLES), width=16)
    ).eval()
    own, dual = np.arange(len(texts)), dual_scores(texts, photos)
    scores = reranked_scores(model, texts, photos, own, num_photos=3)
    owner = np.repeat(own, [len(photo.boxes) for photo in photos])
    for m in range(5):
        best = [dual[m, owner == p].max() for p in own]
        top = np.isin(owner, np.argsort(best)[-3:])
        np.testing.assert_allclose(scores[m, top], dual[m, top], atol=1e-5)  # no correction yet
        assert scores[m, ~top].max() < scores[m, top].min()
        np.testing.assert_allclose(scores[m, ~top], dual[m, ~top] - 10, atol=1e-5)


def slow_loss(scores: Sequence[float], overlaps: Sequence[float]) -> float | None:
    """Softmax cross-entropy whose targets grow with overlaps from .5 on; None if all are lower."""
    weights = [math.exp(4 * each) if each >= 0.5 else 0.0 for each in overlaps]
    if not any(weights):
        return None
    total = math.log(math.fsum(math.exp(each) for each in scores))
    return -sum(w * (x - total) for w, x in zip(weights, scores, strict=True)) / sum(weights)


@pytest.mark.parametrize("seed", range(3))
def test_the_loss_equals_the_loop_over_groups_and_own_photos(seed: int) -> None:
    """Five expressions, each with its own photo; some also with its mirror image or a rival."""
    tasks = relations(10, seed)[:5]
    torch.manual_seed(seed)
    model = Reranker(RerankerConfig(dim=len(LOOKS), text_width=len(LOOKS) + len(ROLES), width=16))
    torch.nn.init.normal_(model.correct.weight)
    objective = RerankObjective(model.eval())
    columns = [[0, 1, NONE], [1, NONE, 2], [2, NONE, NONE], [3, 4, 0], [4, NONE, NONE]]
    plain = batch_of(tasks)
    batch = RerankBatch(plain.inputs, torch.tensor(columns), torch.rand(plain.overlap.shape))
    batch.overlap[4] /= 2  # the last expression matches no candidate
    batch.overlap *= plain.inputs.valid
    with torch.no_grad():
        loss, parts = objective(batch, "rerank")
        out = model(batch.inputs)
    scores = 25 * (out.dual + out.correction)
    group, own = [], []
    for m, photos in enumerate(columns):
        here = [(p, k) for p in photos if p != NONE for k in range(len(tasks[p][1].boxes))]
        fits = [float(batch.overlap[m, k]) if p == photos[0] else 0.0 for p, k in here]
        group.append(slow_loss([float(scores[p, k]) for p, k in here], fits))
        mine = range(len(tasks[photos[0]][1].boxes))
        own.append(
            slow_loss(
                [float(scores[photos[0], k]) for k in mine],
                [float(batch.overlap[m, k]) for k in mine],
            )
        )
    assert group[4] is None
    wanted = {"group": sum(filter(None, group)) / 4, "own": sum(filter(None, own)) / 4}
    assert parts == pytest.approx(wanted, rel=1e-4)
    assert loss.item() == pytest.approx(wanted["group"] + wanted["own"], rel=1e-4)


def test_missing_hard_negatives_do_not_change_the_loss() -> None:
    tasks = relations(10, 3)[:4]
    torch.manual_seed(0)
    objective = RerankObjective(
        Reranker(RerankerConfig(dim=len(LOOKS), text_width=len(LOOKS) + len(ROLES), width=16))
    ).eval()
    plain = batch_of(tasks)
    padded = RerankBatch(
        plain.inputs, torch.cat([plain.slots, torch.full_like(plain.slots, NONE)], 1), plain.overlap
    )
    with_rival = RerankBatch(
        plain.inputs, torch.cat([plain.slots, plain.slots.roll(1)], 1), plain.overlap
    )
    losses = [objective(b, "rerank")[1] for b in (plain, padded, with_rival)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert losses[2]["own"] == losses[0]["own"]
    assert losses[2]["group"] > losses[0]["group"]
