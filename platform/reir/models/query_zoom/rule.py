"""`ZoomRule`: zooms in on the best instance as long as its score rises."""

from __future__ import annotations

import numpy as np

from reir.models.query_zoom.frames import WHOLE
from reir.models.query_zoom.looks import Look, PhotoLooks, as_box
from reir.models.zoom_steps import ZoomSearch, ZoomStep
from reir.records import FloatArray


class ZoomRule:
    """Looks at the surroundings of the best instance, closer and closer.

    The search ends when a look shows no instance with a higher score than the look before, or at
    the last level of the grid. The answer is the instance with the highest score.
    """

    def search(self, photo: PhotoLooks, expression_D: FloatArray) -> ZoomSearch:
        """Search a photo for the (D,) vector of an expression."""
        best = _step(photo.at(WHOLE), expression_D)
        steps = [best]
        for level in range(len(photo.grid.sides_px)):
            x1, y1, x2, y2 = best.box
            center = np.array([[(x1 + x2) / 2, (y1 + y2) / 2]], dtype=np.float32)
            steps.append(_step(photo.at(photo.grid.around(level, center)[0]), expression_D))
            if steps[-1].rank <= best.rank:
                break
            best = steps[-1]
        return ZoomSearch(steps=tuple(steps), box=best.box, score=best.score)


def _step(look: Look, expression_D: FloatArray) -> ZoomStep:
    """Return the best instance of a look."""
    frame = as_box(look.frame)
    if not len(look.boxes):
        return ZoomStep(frame=frame, box=frame, score=0.0, end=0.0)
    scores = look.vectors @ expression_D
    best = int(scores.argmax())
    return ZoomStep(frame=frame, box=as_box(look.boxes[best]), score=float(scores[best]), end=0.0)
