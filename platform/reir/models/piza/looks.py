"""`PizaLooks`: looks at parts of photos with a `PizaModel`, and loads it for searches."""

# Shapes: B crops of one shape, T boxes of the longest search

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from reir.models.grounding_dino import BATCH, captions_of, found_boxes, stretched
from reir.models.interfaces import FoundBoxes
from reir.models.piza.checkpoint import load_piza_parts, weights_digest
from reir.models.piza.model import PizaModel
from reir.models.piza.zoom import ZoomingLocalizer
from reir.models.pretrained import PretrainedModel
from reir.records import FloatArray, RgbImage


def load_zooming_localizer(folder: str) -> ZoomingLocalizer:
    """Load the localizer of a directory that `save_piza` wrote, on a GPU if there is one.

    Raises:
        CheckpointError: the adapters or their base cannot be loaded, or do not belong together.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    path = Path(folder).expanduser()
    model, parts = load_piza_parts(path, device=device)
    return ZoomingLocalizer(PizaLooks(model, parts, weights_digest(path)))


class PizaLooks:
    """Looks at crops with an adapted model; thread-safe. It is a `ZoomModel`.

    Args:
        model: in eval mode.
        parts: its base with tokenizer and image processor.
        digest: of the adapters.
    """

    def __init__(self, model: PizaModel, parts: PretrainedModel, digest: str) -> None:
        self._model, self._parts = model, parts
        self._digest = hashlib.sha256(f"{parts.digest} {digest}".encode()).hexdigest()

    @property
    def digest(self) -> str:
        """Sha256 of the digests of base and adapters."""
        return self._digest

    @torch.inference_mode()
    def look(
        self,
        crops: Sequence[RgbImage],
        expressions: Sequence[str],
        histories: Sequence[FloatArray],
    ) -> list[FoundBoxes]:
        """Find what each expression describes in a crop; see `ZoomModel.look`."""
        found: dict[int, FoundBoxes] = {}
        for rows, pixels in self._batches(crops):
            captions = captions_of(
                self._parts.tokenizer, [expressions[row] for row in rows], self._model.max_tokens
            ).to(self._parts.device)
            output = self._model(
                pixels,
                None,
                captions.input_ids,
                captions.attention_mask,
                *self._padded([histories[row] for row in rows]),
            )
            boxes = found_boxes(output.logits, output.pred_boxes, captions.is_word)
            found.update(zip(rows, boxes, strict=True))
        return [found[row] for row in range(len(crops))]

    @torch.inference_mode()
    def end_probabilities(self, histories: Sequence[FloatArray]) -> list[float]:
        """Return how sure the history encoder is; 1 without one, since such a model looks once."""
        if self._model.history is None or not histories:
            return [1.0] * len(histories)
        output = self._model.read_history(*self._padded(histories))
        probabilities: list[float] = output.end_logits.sigmoid().tolist()
        return probabilities

    def _batches(self, crops: Sequence[RgbImage]) -> Iterator[tuple[list[int], Tensor]]:
        """Yield rows of at most `BATCH` crops, and these as (B, 3, h, w), until all were yielded.

        A crop that is given again is prepared only once.
        """
        # By the prepared shape: crops of many sizes are resized to a few shapes. Padding different
        # shapes to one would change the results.
        rows: list[int] = []
        pixels: list[Tensor] = []
        for row in _by_aspect_ratio(crops):
            if not (rows and crops[row] is crops[rows[-1]]):
                prepared = self._parts.pixels([stretched(crops[row])])["pixel_values"][0]
            if rows and (len(rows) == BATCH or prepared.shape != pixels[0].shape):
                yield rows, torch.stack(pixels)
                rows, pixels = [], []
            rows.append(row)
            pixels.append(prepared)
        if rows:
            yield rows, torch.stack(pixels)

    def _padded(self, histories: Sequence[FloatArray]) -> tuple[Tensor, Tensor]:
        """Return (B, T, 4) boxes, with zeros where padded, and (B, T) which ones are boxes."""
        longest = max(map(len, histories))
        boxes_BT4 = np.zeros((len(histories), longest, 4), dtype=np.float32)
        for row, history in enumerate(histories):
            boxes_BT4[row, : len(history)] = history
        valid_BT = np.arange(longest) < np.array([[len(each)] for each in histories])
        device = self._parts.device
        return torch.from_numpy(boxes_BT4).to(device), torch.from_numpy(valid_BT).to(device)


def _by_aspect_ratio(crops: Sequence[RgbImage]) -> list[int]:
    """Return the rows of crops in an order in which equal crops follow one another.

    So do crops of one prepared shape, which depends on the aspect ratio. Then no more of them have
    to be prepared at the same time than are looked at together: at the published size, each takes
    13 MB.
    """
    first: dict[int, int] = {}
    for row, crop in enumerate(crops):
        first.setdefault(id(crop), row)

    def place(row: int) -> tuple[float, int]:
        height, width = crops[row].shape[:2]
        return height / width, first[id(crops[row])]

    return sorted(range(len(crops)), key=place)
