"""The training task of the mask head of a frozen `clare-nano`."""

# Shapes: N crops of a step, h x w cells of a mask, S positions of an edge

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reir.checkpoint import load_model, save_mask_head
from reir.images import rle
from reir.images.decode import read_image
from reir.losses import box_loss, dice_loss
from reir.models.nano.crop_network import CropNetwork
from reir.models.nano.mask_head import MaskHead, MaskHeadConfig
from reir.models.nano.segmenter import NanoSegmenter
from reir_training.config import NanoTrainConfig
from reir_training.data.examples import VAL, TrainPhoto, count_annotations, split_held_out
from reir_training.masks.data import MaskBatch, MaskBatchMaker, mask_examples
from reir_training.nano.cache import FrozenCache
from reir_training.report.model_card import write_masks_card
from reir_training.run.row_task import RowTask, copy_checkpoint
from reir_training.run.schedule import Stage

EDGE_WEIGHT, L1_WEIGHT, GIOU_WEIGHT = 0.25, 2.0, 1.0


class MaskObjective(nn.Module):
    """The mask head and its losses, on features of the frozen crop network.

    Args:
        network: crop network of the checkpoint.
        head: head to train.
        half: compute in bf16.
    """

    def __init__(self, network: CropNetwork, head: MaskHead, *, half: bool) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.head, self._half = head, half

    def forward(self, batch: MaskBatch, stage: Stage) -> tuple[Tensor, dict[str, float]]:  # noqa: ARG002
        """Return the loss and its terms by name."""
        pixels = batch.crops.permute(0, 3, 1, 2).float()
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=self._half):
            with torch.no_grad():
                levels = self.network.levels(pixels)
            output = self.head(levels, batch.prompts)
        logits, masks = output.logits.float()[batch.masked], batch.masks[batch.masked]
        boxes, target = output.boxes()[batch.found], batch.boxes[batch.found]
        terms = {
            # The sums are 0 in a step without masks or without found boxes.
            "pixels": F.binary_cross_entropy_with_logits(logits, masks)
            if len(masks)
            else logits.sum(),
            "dice": dice_loss(logits.sigmoid(), masks).mean() if len(masks) else logits.sum(),
            "edges": EDGE_WEIGHT * edge_loss(output.edges.float()[batch.found], target),
            "box": box_loss(boxes, target, l1_weight=L1_WEIGHT, giou_weight=GIOU_WEIGHT),
        }
        return torch.stack([*terms.values()]).sum(), {k: v.item() for k, v in terms.items()}


def edge_loss(logits_N4S: Tensor, boxes_N4: Tensor) -> Tensor:
    """Return the mean cross entropy of the two positions next to each edge; 0 without boxes.

    Source: the distribution focal loss of Li et al. 2020, "Generalized Focal Loss", equation 6.
    """
    if not len(boxes_N4):
        return logits_N4S.sum()
    num = logits_N4S.shape[2]
    at = (boxes_N4 * num - 0.5).clamp(0, num - 1)
    low = at.floor().long().clamp(max=num - 2)
    share = at - low
    log_p = logits_N4S.log_softmax(2)
    below, above = (log_p.gather(2, (low + i)[..., None])[..., 0] for i in range(2))
    return -((1 - share) * below + share * above).mean()


class MaskTask(RowTask[MaskBatch]):
    """Trains a mask head on annotated masks, and on boxes where there is no mask.

    Args:
        config: settings of the run.
        photos: photos of the run, with masks; those of split "val" are only validated on.
        cache: folder of the complete `FrozenCache` of these photos.
        init: checkpoint directory with the crop network.
        rank, world_size: rank of this worker, and number of workers.
    """

    rows_are = "training photos with a mask or a found instance"

    def __init__(  # noqa: PLR0913 - most are keyword-only
        self,
        config: NanoTrainConfig,
        photos: Sequence[TrainPhoto],
        *,
        cache: Path,
        init: Path,
        rank: int,
        world_size: int,
    ) -> None:
        self._photos, self._init = photos, init
        settings = config.masks
        shape = MaskHeadConfig(
            width=settings.width, crop_px=settings.crop_px, margin=settings.margin
        )
        self.network = load_model(init)[0].crop_network
        torch.manual_seed(config.optimization.seed)
        self.model = MaskHead(shape, self.network.level_channels)
        half = config.optimization.precision == "bf16"
        found = FrozenCache(cache)
        examples = [mask_examples(photo, found.boxes(i)) for i, photo in enumerate(photos)]
        rows = [i for i, p in enumerate(photos) if p.split != VAL and examples[i]]
        super().__init__(
            config,
            MaskObjective(self.network, self.model, half=half),
            maker=MaskBatchMaker(photos, examples, shape, settings),
            rows=np.array(rows, dtype=np.int64),
            rank=rank,
            world_size=world_size,
        )

    def validate(self) -> dict[str, float]:
        """Return the mean IoU (percent) of masks on the held-out photos, prompted by true boxes."""
        # Copied, because the segmenter converts what it gets for inference on the CPU.
        network, head = copy.deepcopy(self.network).cpu(), copy.deepcopy(self.model).cpu()
        segmenter = NanoSegmenter(network, head, torch.float32)
        held_out = split_held_out(self._photos)[1]
        overlaps = [value for photo in held_out for value in mask_ious(segmenter, photo)]
        return {"mask_iou": round(100 * float(np.mean(overlaps)), 2)} if overlaps else {}

    def save(self, folder: Path, about: dict[str, Any]) -> None:
        """Write a copy of the checkpoint directory with this mask head added."""
        copy_checkpoint(self._init, folder)
        save_mask_head(folder, self.model, self.network, about)
        write_masks_card(folder, self._init, about)

    def about(self) -> dict[str, Any]:
        """Return metadata for the checkpoint: the size of the training data."""
        train, held_out = split_held_out(self._photos)
        masks = sum(mask is not None for photo in train for mask in photo.masks)
        return count_annotations(train, held_out) | {"masks": masks}


def mask_ious(segmenter: NanoSegmenter, photo: TrainPhoto) -> list[float]:
    """Return the IoU with the annotated mask of each instance that has one, from its true box."""
    rows = [i for i, mask in enumerate(photo.masks) if mask is not None]
    if not rows:
        return []
    found = segmenter.segment(read_image(photo.path), photo.boxes[rows])
    truths = [mask for mask in photo.masks if mask is not None]
    # Compared at the annotated size, of which the file may be a smaller copy.
    fitted = [rle.fitted(each.mask, truths[0].size) for each in found]
    overlaps = rle.pairwise_iou(fitted, truths)
    return [float(value) for value in np.diagonal(overlaps)]
