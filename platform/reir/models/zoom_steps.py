"""`ZoomSearch`: how a search of one photo zoomed in, and what it found."""

from __future__ import annotations

from dataclasses import dataclass

from reir.records import Box


@dataclass(frozen=True, kw_only=True)
class ZoomStep:
    """One look at a part of a photo.

    Attributes:
        frame: the part that was looked at, xyxy in [0, 1] of the upright photo.
        box: the best instance of this look, xyxy in [0, 1] of the photo; the frame itself if the
            look showed no instance.
        score: of that instance; higher is better. 0 if there is none.
        end: probability in [0, 1] that the search was over after this look.
    """

    frame: Box
    box: Box
    score: float
    end: float

    @property
    def rank(self) -> tuple[bool, float]:
        """Orders the looks of a search: one without an instance comes after all others."""
        return self.box != self.frame or self.score != 0, self.score


@dataclass(frozen=True, kw_only=True)
class ZoomSearch:
    """The search of one photo for one expression.

    Attributes:
        steps: in order; the first one looks at the whole photo.
        box: the found instance, xyxy in [0, 1] of the upright photo.
        score: of the found instance; scores of one zoomer can be compared between photos. 0 if no
            look showed an instance.
    """

    steps: tuple[ZoomStep, ...]
    box: Box
    score: float

    @property
    def frames(self) -> tuple[Box, ...]:
        """The parts of the photo that were looked at, in order."""
        return tuple(step.frame for step in self.steps)

    @property
    def found(self) -> bool:
        """Whether any look showed an instance; if none did, the box is that of a whole look."""
        return self.score != 0 or self.box not in self.frames

    @property
    def rank(self) -> tuple[bool, float]:
        """Orders the searches of photos: one that found no instance comes after all others."""
        return self.found, self.score
