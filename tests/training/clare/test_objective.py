"""The objective of the published CLARE, on tiny random models of the real classes."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from reir.datasets.coco_classes import COCO_CLASSES
from reir.images.rle import encode
from reir_testing.tiny_clare import tiny_clare
from reir_training.clare.data import DETECTION, GROUNDING, ClareBatch, ClareData
from reir_training.clare.losses import ClareLossWeights
from reir_training.clare.objective import ClareObjective, PaddedTargets, cells_inside
from reir_training.data.augment import Augmentation
from reir_training.data.examples import TrainExpression, TrainPhoto
from reir_training.run.schedule import Stage

PLAIN = Augmentation(short_sides=(64,), long_side=128, crop_probability=0.0, mirror_probability=0.0)
WORDS = ("<unk>", "</s>", "red", "blue", "green", "one", "the", "left", "right", "cat", "dog")
CLASSES = (COCO_CLASSES.index("cat"), COCO_CLASSES.index("dog"))


def tokenizer() -> Tokenizer:
    built = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    built.pre_tokenizer = Whitespace()
    return built


def photos(folder: Path, count: int = 4) -> list[TrainPhoto]:
    """Photos of unlike sizes with a red and a blue rectangle."""
    rng, out = np.random.default_rng(0), []
    for i in range(count):
        width, height = 96 + 16 * (i % 3), 80
        pixels = rng.integers(80, 110, (height, width, 3)).astype(np.uint8)
        boxes = np.array([[5 + 3 * i, 8, 40, 44], [50, 20, 88 - 2 * i, 70]], np.float32)
        for (x1, y1, x2, y2), color in zip(
            boxes.astype(int), ((230, 20, 20), (20, 20, 230)), strict=True
        ):
            pixels[y1:y2, x1:x2] = color
        path = folder / f"{i}.png"
        if not path.exists():  # another worker may be reading it
            Image.fromarray(pixels).save(path)
        out.append(
            TrainPhoto(
                path=path,
                split="train",
                boxes=(boxes / ([width, height] * 2)).astype(np.float32),
                categories=np.array(CLASSES),
                names=("cat", "dog"),
                expressions=(
                    TrainExpression("the red one", 0, "long"),
                    TrainExpression("the blue one", 1, "long"),
                ),
                is_wide=True,
            )
        )
    return out


def load(folder: Path, task: str, rank: int = 0, world_size: int = 1, texts: int = 2) -> ClareBatch:
    data = ClareData(photos(folder), PLAIN, batch_size=4, texts_per_photo=texts)
    step = data.sampler([task]).step(0, rank, world_size)
    return ClareBatch.from_arrays(data.load(step, rank))


def make(**settings: object) -> ClareObjective:
    model = tiny_clare(num_experts=0)
    weights = ClareLossWeights()
    return ClareObjective(model, tokenizer(), weights, **settings)  # type: ignore[arg-type]


def test_padded_targets_contain_every_target_once(tmp_path: Path) -> None:
    for task in (DETECTION, GROUNDING):
        batch = load(tmp_path, task)
        slots = PaddedTargets(batch)
        targets = slots.targets()
        assert int(targets.valid.sum()) == len(batch.boxes)
        for place, (photo, text) in enumerate(
            zip(batch.box_photo.tolist(), batch.box_text.tolist(), strict=True)
        ):
            slot = int(slots.slot_T[place])
            assert torch.equal(targets.boxes_xyxy[photo, slot], batch.boxes[place])
            (column,) = targets.texts[photo, slot].nonzero()[:, 0].tolist()
            assert column == (text if task == DETECTION else slot)


@pytest.mark.parametrize("stage", ["grounding", "clia"])
@pytest.mark.parametrize("half", [False, True])
def test_gradients_reach_both_streams_and_are_finite(
    tmp_path: Path, stage: Stage, half: bool
) -> None:
    objective = make(half=half).train()
    loss, parts = objective(load(tmp_path, GROUNDING), stage)
    loss.backward()
    assert ("clia" in parts) == (stage == "clia")
    assert {"classes", "l1", "giou", "proposal_classes", "denoising_classes"} <= set(parts)
    silent = {
        name
        for name, p in objective.named_parameters()
        if p.grad is None or not torch.isfinite(p.grad).all()
    }
    unused = {"model.clia_log_scale", "model.clia_bias"} if stage == "grounding" else set()
    assert silent == unused


def test_additional_expressions_have_the_target_they_describe(tmp_path: Path) -> None:
    objective = make().eval()
    once = load(tmp_path, GROUNDING)
    num_texts = len(once.texts)
    order = torch.tensor([*range(num_texts), *reversed(range(num_texts))])

    def repeated(targets: torch.Tensor) -> ClareBatch:
        return replace(
            once,
            texts=[once.texts[i] for i in order.tolist()],
            text_target=targets,
            instance_key=once.instance_key[order],
        )

    def clia(batch: ClareBatch) -> float:
        return float(objective(batch, "clia")[1]["clia"])

    wanted = clia(once)
    assert clia(repeated(once.text_target[order])) == pytest.approx(wanted, rel=1e-5)
    swapped = torch.cat([once.text_target, once.text_target])
    assert abs(clia(repeated(swapped)) - wanted) > 1e-3 * wanted


def test_the_objective_can_overfit_a_few_photos(tmp_path: Path) -> None:
    torch.manual_seed(0)
    objective = make().train()
    batches: list[tuple[ClareBatch, Stage]] = [
        (load(tmp_path, GROUNDING), "clia"),
        (load(tmp_path, DETECTION), "grounding"),
    ]
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-3)
    first, last = 0.0, 0.0
    for _ in range(25):
        for batch, stage in batches:
            loss, _ = objective(batch, stage)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
            optimizer.step()
            first = first or float(loss.detach())
        last = float(loss.detach())
    assert last < 0.8 * first


# ----------------------------------------------------------------------------------- two workers


class Pair:
    """Lets two workers, in two threads of this process, exchange values without detaching them."""

    def __init__(self) -> None:
        self._sent: dict[bool, torch.Tensor] = {}
        self._barrier = threading.Barrier(2, timeout=60)

    def exchange(self, first: bool, values: torch.Tensor) -> torch.Tensor:
        """Send values to the other worker, and return those that it sent."""
        self._sent[first] = values
        self._barrier.wait()
        other = self._sent[not first]
        self._barrier.wait()
        return other


class PairWorker:
    """One worker of a pair."""

    def __init__(self, pair: Pair, first: bool) -> None:
        self._exchange = partial(pair.exchange, first)

    def gather_others(self, values: torch.Tensor) -> torch.Tensor:
        return self._exchange(values)

    def mean(self, counts: torch.Tensor) -> torch.Tensor:
        return (counts.detach() + self._exchange(counts.detach())) / 2


def batch_of_worker(folder: Path, rank: int = 0, world_size: int = 1) -> ClareBatch:
    """Photos of one size, because padding has an effect under `paper_parity`.

    The first photo has one expression, the others have two.
    """
    same = photos(folder, 10)[::3]
    same[0] = replace(same[0], expressions=same[0].expressions[:1])
    data = ClareData(same, PLAIN, batch_size=4, texts_per_photo=2)
    step = data.sampler([GROUNDING]).step(0, rank, world_size)
    return ClareBatch.from_arrays(data.load(step, rank))


@pytest.mark.parametrize("parity", [False, True])
def test_losses_of_two_workers_equal_those_of_one_unless_parity(
    tmp_path: Path, parity: bool
) -> None:
    """Under parity, each of G workers divides CLIA by all texts, so the mean is 1 / G of it."""
    model, pair = tiny_clare(num_experts=0, paper_parity=parity), Pair()
    weights = ClareLossWeights(mask_false_negatives=False)
    objective = partial(ClareObjective, model, tokenizer(), weights, denoising=False)

    def work(first: bool, batch: ClareBatch) -> tuple[torch.Tensor, dict[str, float]]:
        loss, parts = objective(workers=PairWorker(pair, first))(batch, "clia")
        return loss, parts

    # not in the threads: both would write the photos, and one could read half a file
    batches = [batch_of_worker(tmp_path, rank, 2) for rank in (0, 1)]
    with ThreadPoolExecutor(2) as threads:
        shares = list(threads.map(work, [True, False], batches))
    _, of_one = objective()(batch_of_worker(tmp_path), "clia")
    together = shares[0][1]
    torch.testing.assert_close(together, shares[1][1])
    scale = 0.5 if parity else 1.0
    for name in ("clia", "clia_auxiliary"):
        assert together[name] == pytest.approx(scale * of_one[name], rel=1e-4)

    # as released, each worker divides by its own matched queries; otherwise by those of both
    alone = [objective()(batch, "clia")[1] for batch in batches]
    for name in ("classes", "l1", "giou", "proposal_l1"):
        own = (alone[0][name] + alone[1][name]) / 2
        assert together[name] == pytest.approx(own if parity else of_one[name], rel=1e-4)
    assert any(
        abs(alone[0][name] + alone[1][name] - 2 * of_one[name]) > 1e-3 * of_one[name]
        for name in ("l1", "giou")
    )


# ------------------------------------------------------------------------------------------- masks


def masked_photos(folder: Path) -> list[TrainPhoto]:
    """The photos with the masks of their red and of every second blue rectangle."""
    out = []
    for i, photo in enumerate(photos(folder)):
        red, blue = (
            (color > 200) & (other < 50)
            for pixels in [np.asarray(Image.open(photo.path))]
            for color, other in (
                (pixels[..., 0], pixels[..., 2]),
                (pixels[..., 2], pixels[..., 0]),
            )
        )
        out.append(replace(photo, masks=(encode(red), encode(blue) if i % 2 else None)))
    return out


def load_masked(folder: Path, rank: int = 0, world_size: int = 1) -> ClareBatch:
    data = ClareData(
        masked_photos(folder), PLAIN, batch_size=4, texts_per_photo=2, mask_stride_px=4
    )
    step = data.sampler([GROUNDING]).step(0, rank, world_size)
    return ClareBatch.from_arrays(data.load(step, rank))


def make_masked(**settings: object) -> ClareObjective:
    model = tiny_clare(num_experts=0, masks=True)
    return ClareObjective(model, tokenizer(), ClareLossWeights(), **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("half", [False, True])
def test_mask_losses_have_gradients_in_the_branch_and_the_tower(tmp_path: Path, half: bool) -> None:
    objective = make_masked(half=half).train()
    _, parts = objective(load_masked(tmp_path), "grounding")
    assert parts["mask_focal"] > 0
    assert parts["mask_dice"] > 0
    loss, _ = objective(load_masked(tmp_path), "clia")
    loss.backward()
    for name, parameter in objective.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any() or "masks." not in name, name


def test_data_without_masks_adds_no_mask_loss(tmp_path: Path) -> None:
    data = ClareData(photos(tmp_path), PLAIN, batch_size=4, texts_per_photo=2, mask_stride_px=4)
    bare = ClareBatch.from_arrays(data.load(data.sampler([GROUNDING]).step(0)))
    objective = make_masked(denoising=False)
    loss, parts = objective(bare, "grounding")
    assert (parts["mask_focal"], parts["mask_dice"]) == (0, 0)
    loss.backward()
    gradients = [parameter.grad for parameter in objective.model.masks.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)
    want, without = objective(load(tmp_path, GROUNDING), "grounding")
    assert "mask_focal" not in without
    torch.testing.assert_close(loss, want)


def test_cells_with_their_center_in_the_photo_are_inside() -> None:
    got = cells_inside(torch.tensor([[6, 7], [8, 10]]), (3, 4), 4)
    rows = [[True, False, False], [True, True, False]]
    columns = [[True, True, False, False], [True, True, False, False]]
    for each, row, column in zip(got, rows, columns, strict=True):
        assert torch.equal(each, torch.tensor(row)[:, None] & torch.tensor(column))


class RecordingWorker:
    """Replaces the other worker: records the counts, or returns their known mean."""

    def __init__(self, mean: torch.Tensor | None = None) -> None:
        self.known, self.seen = mean, torch.empty(0)

    def gather_others(self, values: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError(f"not asked in grounding, got {tuple(values.shape)}")

    def mean(self, counts: torch.Tensor) -> torch.Tensor:
        if counts.requires_grad:  # losses, which are averaged for the log alone
            return counts
        self.seen = counts
        return counts if self.known is None else self.known


def test_two_workers_with_masks_equal_one(tmp_path: Path) -> None:
    """Their batches are padded to different sizes and have different numbers of masks."""
    whole, _ = make_masked(denoising=False)(load_masked(tmp_path), "grounding")
    batches = [load_masked(tmp_path, rank, 2) for rank in range(2)]
    notes = [RecordingWorker(), RecordingWorker()]
    for note, batch in zip(notes, batches, strict=True):
        make_masked(denoising=False, workers=note)(batch, "grounding")
    known = RecordingWorker((notes[0].seen + notes[1].seen) / 2)
    both = [make_masked(denoising=False, workers=known)(each, "grounding")[0] for each in batches]
    torch.testing.assert_close((both[0] + both[1]) / 2, whole, rtol=1e-5, atol=1e-5)
