"""Random model outputs and targets of a training step of CLARE, in float64.

They include the special cases: one photo has the maximum number of targets and another has none,
texts are padded, and photos and instances occur twice. The module needs scipy, as the losses do.
"""

# Shapes: see `reir_training.clare.losses`

from __future__ import annotations

import torch
from torch import Tensor

from reir.models.clare.denoising import DenoisingQueries, denoising_queries
from reir_training.clare.losses import CliaBatch, Predictions, StepOutputs
from reir_training.clare.mask_losses import MaskOutputs
from reir_training.clare.matching import Targets

# Small, because the tests compare with nested loops.
LAYERS, PHOTOS, QUERIES, PROPOSALS, MOST_TARGETS, TEXTS = 3, 4, 7, 9, 3, 2
CELLS = 4, 5


def normal(*shape: int, random: torch.Generator) -> Tensor:
    """Return normally distributed numbers."""
    return torch.randn(*shape, generator=random, dtype=torch.float64)


def some_boxes(*shape: int, random: torch.Generator) -> Tensor:
    """Return random boxes, (..., 4) xyxy in [0, 1]."""
    points = torch.rand(*shape, 2, 2, generator=random, dtype=torch.float64)
    return points.sort(dim=-2).values.flatten(-2)


def some_predictions(
    random: torch.Generator, num: int = QUERIES, texts: int = TEXTS
) -> Predictions:
    """Return (L, B, num, ..) random predictions that require a gradient."""
    return Predictions(
        normal(LAYERS, PHOTOS, num, texts, random=random).requires_grad_(),
        some_boxes(LAYERS, PHOTOS, num, random=random).requires_grad_(),
    )


def some_proposals(random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return (B, A) logits and (B, A, 4) boxes of proposals that require a gradient."""
    logits_BA = normal(PHOTOS, PROPOSALS, random=random).requires_grad_()
    return logits_BA, some_boxes(PHOTOS, PROPOSALS, random=random).requires_grad_()


def some_targets(random: torch.Generator, texts: int = TEXTS) -> Targets:
    """Return random targets.

    The first photo has the maximum number of targets, the second has none, and the others have
    random numbers of them.
    """
    count = torch.randint(0, MOST_TARGETS + 1, (PHOTOS, 1), generator=random)
    count[0], count[1] = MOST_TARGETS, 0
    valid = torch.arange(MOST_TARGETS) < count
    text_valid = torch.rand(PHOTOS, texts, generator=random) < 0.7
    text_valid[:, 0] = True
    described = torch.rand(PHOTOS, MOST_TARGETS, texts, generator=random) < 0.5
    described &= text_valid[:, None]
    # Every target needs at least one text; text 0 is always valid.
    described[..., 0] |= ~described.any(-1)
    boxes = some_boxes(PHOTOS, MOST_TARGETS, random=random) * valid[..., None]
    return Targets(boxes, described & valid[..., None], valid, text_valid)


def some_denoising(
    random: torch.Generator, targets: Targets
) -> tuple[Predictions, DenoisingQueries]:
    """Return random predictions of denoising queries, and the denoising queries themselves."""
    queries = denoising_queries(
        torch.zeros(*targets.valid.shape, 2),
        targets.boxes_xyxy,
        targets.valid,
        num_queries=QUERIES,
        seeds=torch.randint(2**31, (PHOTOS,), generator=random).tolist(),
    )
    return some_predictions(random, num=queries.target.shape[1]), queries


def some_masks(random: torch.Generator, targets: Targets) -> tuple[MaskOutputs, Tensor]:
    """Return random masks, and the (L, B, N, h, w) mask logits of all queries.

    Some targets have no mask, and the photos have different sizes. The logits require a gradient,
    and `predict` selects from them.
    """
    logits = normal(LAYERS, PHOTOS, QUERIES, *CELLS, random=random).requires_grad_()
    rows, columns = (torch.randint(1, side + 1, (PHOTOS, 1), generator=random) for side in CELLS)
    inside = (torch.arange(CELLS[0]) < rows)[..., None] & (torch.arange(CELLS[1]) < columns)[
        :, None
    ]
    masks = torch.rand(*targets.valid.shape, *CELLS, generator=random) < 0.4
    known = targets.valid & (torch.rand(targets.valid.shape, generator=random) < 0.8)

    def predict(query_LBP: Tensor) -> Tensor:
        return logits.gather(2, query_LBP[..., None, None].expand(-1, -1, -1, *CELLS))

    return MaskOutputs(predict, masks & inside[:, None], known, inside), logits


def some_clia(random: torch.Generator, targets: Targets) -> CliaBatch:
    """Return random scores for CLIA.

    Every target has zero to two expressions. There are also expressions of other workers, one more
    than of this worker.
    """
    own = targets.valid.nonzero().repeat(2, 1)
    own = own[torch.rand(len(own), generator=random) < 0.7]
    # From few numbers, so that photos and instances occur in several records.
    photo_image = torch.randint(3, (PHOTOS,), generator=random)
    instance = torch.randint(-1, 5, targets.valid.shape, generator=random)
    instance = torch.where(targets.valid, instance, -1)
    others = len(own) + 1
    nowhere = torch.full((others,), -1)
    photo = torch.cat([own[:, 0], nowhere])
    strange_image = torch.randint(4, (others,), generator=random)
    strange_instance = torch.randint(-1, 6, (others,), generator=random)
    return CliaBatch(
        logits=normal(LAYERS, len(photo), PHOTOS, QUERIES, random=random).requires_grad_(),
        photo=photo,
        target=torch.cat([own[:, 1], nowhere]),
        image=torch.cat([photo_image[own[:, 0]], strange_image]),
        instance=torch.cat([instance[own[:, 0], own[:, 1]], strange_instance]),
        photo_image=photo_image,
        target_instance=instance,
    )


def some_step(seed: int) -> tuple[StepOutputs, Targets]:
    """Return the outputs and targets of a step of stage 2 with all kinds of queries."""
    random = torch.Generator().manual_seed(seed)
    targets = some_targets(random)
    outputs = StepOutputs(
        some_predictions(random),
        proposals=some_proposals(random),
        denoising=some_denoising(random, targets),
        clia=some_clia(random, targets),
    )
    return outputs, targets
