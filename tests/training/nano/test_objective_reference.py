"""`clare-nano`'s loss terms, compared with loops over expressions, photos and candidates."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from reir_testing.tiny import tiny_batch, tiny_model, tiny_tokenizer
from reir_training.config import NanoLossWeights
from reir_training.nano.batches import NanoBatch
from reir_training.nano.objective import LossInputs, NanoObjective

NUM_PHOTOS, NUM_CANDIDATES = 3, 5
TEXTS = (
    "the red dog",
    "a man left of the cat",
    "a blue car",
    "the right man",
    "the cat in the car",
    "a dog in the car",
    "a man of the green cat",
    "the green cat",
    "the car of a man",
    "the blue dog",
    "a man right of the cat",
    "the left man",
)
LOGITS = {"ranking": 20.0, "clia": 7.0, "bias": -3.0}


def some_batch(seed: int) -> NanoBatch:
    """Expressions of every kind, and candidates with high, low and no overlap, and padding."""
    random = torch.Generator().manual_seed(seed)
    candidates = tiny_batch(NUM_PHOTOS, NUM_CANDIDATES, seed)
    candidates.valid[0, 3:], candidates.valid[2, 4:] = False, False
    owner = torch.tensor([0, 0, 1, 1, 2])
    overlap = torch.rand(len(owner), NUM_CANDIDATES, generator=random)
    overlap[4] /= 2  # the last expression matches no candidate
    overlap *= candidates.valid[owner]
    matched = torch.tensor([[0, 0], [1, 2], [4, 1]])
    corner, size = torch.rand(2, 3, 2, generator=random) / 2
    return NanoBatch(
        candidates=candidates.followed_by(candidates.mirror()),
        texts=list(TEXTS),
        owner=owner,
        overlap=overlap,
        sided=torch.tensor([False, True, False, True, False]),
        cross_weight=torch.tensor([1.0, 0.3, 0.5, 0.0, 0.7]),
        caption_owner=torch.tensor([2, -1, 0, 1]),
        altered=torch.tensor([0, 1, 3]),
        matched=matched,
        matched_boxes=torch.cat([corner, corner + size + 0.05], dim=1),
        matched_classes=torch.tensor([3, -1, 7]),
    )


def softmax_loss(logits: Sequence[float], shares: Sequence[float]) -> float:
    """Cross-entropy of the softmax of `logits` with the target distribution `shares`."""
    total = math.log(math.fsum(math.exp(each) for each in logits))
    return -math.fsum(s * (x - total) for s, x in zip(shares, logits, strict=True))


def focal(logit: float, right: bool) -> float:
    p = 1 / (1 + math.exp(-logit))
    return -0.25 * (1 - p) ** 2 * math.log(p) if right else -0.75 * p**2 * math.log(1 - p)


def shares_of(overlaps: Sequence[float]) -> list[float]:
    """Target distribution: zero below IoU .5, then growing with the overlap."""
    weights = [math.exp(4 * each) if each >= 0.5 else 0.0 for each in overlaps]
    return [each / (sum(weights) or 1.0) for each in weights]


class Loops:
    """The loss terms of one ensemble member, computed pair by pair."""

    def __init__(self, step: LossInputs) -> None:
        self.step = step

    def pairs(self, m: int, photos: Sequence[int]) -> list[tuple[float, float]]:
        """(inner product, overlap) of an expression with the real candidates of some photos.

        Photo `NUM_PHOTOS + i` is the mirror image of photo i; an expression that names a side
        matches nothing in it.
        """
        step, found = self.step, []
        own = int(step.owner[m])
        fits = (own,) if step.sided[m] else (own, own + NUM_PHOTOS)
        for photo in photos:
            for k in range(NUM_CANDIDATES):
                if step.valid[photo, k]:
                    product = float(step.expressions[m] @ step.vectors[photo, k])
                    found.append((product, float(step.overlap[m, k]) if photo in fits else 0.0))
        return found

    def within(self) -> dict[str, float]:
        ranking, focals, right, ranked = 0.0, 0.0, 0, 0
        for m in range(len(self.step.owner)):
            own = int(self.step.owner[m])
            seen = self.pairs(m, (own, own + NUM_PHOTOS) if self.step.sided[m] else (own,))
            shares = shares_of([overlap for _, overlap in seen])
            if any(shares):
                ranking += softmax_loss([LOGITS["ranking"] * x for x, _ in seen], shares)
                ranked += 1
            for product, overlap in seen:  # a cosine of .5 means a probability of .5
                focals += focal(LOGITS["ranking"] * (product - 0.5), overlap >= 0.5)
                right += overlap >= 0.5
        return {"ranking": ranking / ranked, "discrimination": focals / right}

    def wrong_words(self, batch: NanoBatch) -> float:
        """Logistic loss of the score of the right sentence minus that of the wrong one."""
        total = 0.0
        for a, m in enumerate(batch.altered.tolist()):
            shares = shares_of(self.step.overlap[m].tolist())
            margin = 0.0
            for k, share in enumerate(shares):
                vector = self.step.vectors[int(self.step.owner[m]), k]
                margin += share * float((self.step.expressions[m] - self.step.wrong[a]) @ vector)
            total += math.log1p(math.exp(-LOGITS["ranking"] * margin))
        return total / len(batch.altered)

    def across(self) -> dict[str, float]:
        weights = self.step.cross_weight
        shown = [m for m in range(len(weights)) if weights[m] > 0]
        mean = sum(float(weights[m]) for m in shown) / len(shown)
        clia, ranking, ranked = 0.0, 0.0, 0
        for m in shown:
            weight, seen = float(weights[m]) / mean, self.pairs(m, range(2 * NUM_PHOTOS))
            for product, overlap in seen:
                logit = LOGITS["clia"] * product + LOGITS["bias"]
                clia += weight * math.log1p(math.exp(-logit if overlap >= 0.5 else logit))
            shares = shares_of([overlap for _, overlap in seen])
            if any(shares):
                logits = [LOGITS["ranking"] * product for product, _ in seen]
                ranking += weight * softmax_loss(logits, shares)
                ranked += 1
        return {"clia": clia / len(shown), "cross_ranking": ranking / ranked}

    def captions(self) -> float:
        step, total = self.step, 0.0
        logits = LOGITS["ranking"] * step.captions @ step.image_vectors.T
        right = [c for c in range(len(step.caption_owner)) if step.caption_owner[c] >= 0]
        for c in right:
            photo = int(step.caption_owner[c])
            of_photos = [float(p == photo) for p in range(NUM_PHOTOS)]
            of_captions = [float(each == c) for each in range(len(step.captions))]
            total += softmax_loss(logits[c].tolist(), of_photos) / 2
            total += softmax_loss(logits[:, photo].tolist(), of_captions) / 2
        return total / len(right)


def slow_boxes(step: LossInputs) -> dict[str, float]:
    """Box loss `5 * L1 + 2 * (1 - GIoU)`, L1 of center and size; label smoothing is 0.1."""
    box, categories = 0.0, []
    for p in range(len(step.boxes)):
        a, b = step.boxes[p].tolist(), step.matched_boxes[p].tolist()
        l1 = sum(abs(a[i] + a[i + 2] - b[i] - b[i + 2]) / 2 for i in (0, 1))
        l1 += sum(abs(a[i + 2] - a[i] - b[i + 2] + b[i]) for i in (0, 1))
        sides = [min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1)]
        inter = max(sides[0], 0) * max(sides[1], 0)
        union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter
        hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
        box += 5 * l1 + 2 * (1 - inter / union + (hull - union) / hull)
        label = int(step.matched_classes[p])
        if label >= 0:
            num = step.class_logits.shape[1]
            shares = [0.1 / num + (0.9 if c == label else 0.0) for c in range(num)]
            categories.append(softmax_loss(step.class_logits[p].tolist(), shares))
    return {"box": box / len(step.boxes), "category": sum(categories) / len(categories)}


def slow_parts(batch: NanoBatch, step: LossInputs, num_members: int) -> dict[str, float]:
    parts: dict[str, float] = {}
    for member in step.members(num_members):
        loops = Loops(member)
        mine = loops.within() | loops.across()
        mine |= {"caption": loops.captions(), "wrong_word": loops.wrong_words(batch)}
        for name, value in mine.items():
            parts[name] = parts.get(name, 0.0) + value / num_members
    return parts | slow_boxes(step)


@pytest.mark.parametrize("seed", range(3))
def test_every_loss_term_equals_the_loop(seed: int) -> None:
    model = tiny_model(seed)
    objective = NanoObjective(model, tiny_tokenizer(), NanoLossWeights())
    batch = some_batch(seed)
    with torch.no_grad():
        objective.log_ranking_scale.fill_(math.log(LOGITS["ranking"]))
        model.log_scale.fill_(math.log(LOGITS["clia"]))
        model.bias.fill_(LOGITS["bias"])
        _, parts = objective(batch, "clia")
        visual, text = model.visual(batch.candidates), objective._encode(batch.texts)
    wanted = slow_parts(batch, LossInputs.of(batch, visual, text), model.config.num_members)
    assert parts == pytest.approx(wanted, rel=2e-4)
