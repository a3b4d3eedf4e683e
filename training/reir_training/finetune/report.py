"""The report of a fine-tune: whether it helped, what was forgotten, and what to do next."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from reir.metrics import Interval
from reir_training.finetune.measure import Ranks
from reir_training.finetune.trust import FeedbackSummary

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

Verdict = Literal["helped", "harmed", "unclear"]

MIN_CANARIES = 20
"""Fewer canaries are too few for the gate of `reir reindex` to judge another model."""
MIN_HELD_OUT = 10
"""Of fewer held-out photos, all may be found better or worse by chance, which no interval shows."""
NAMES = {
    "photo_p1": "right photo first",
    "photo_p5": "right photo among 5",
    "photo_p10": "right photo among 10",
    "br1": "right box first (BR@1)",
    "br5": "right box among 5 (BR@5)",
    "br10": "right box among 10 (BR@10)",
}
SENTENCES: Mapping[Verdict, str] = {
    "helped": "It helped: the new checkpoint finds more of what the held-out sentences describe.",
    "harmed": "It did harm: the new checkpoint finds less of what the held-out sentences describe. "
    "It is not recommended.",
    "unclear": "It is not clear that it helped: the difference on the held-out sentences may be "
    "chance. The new checkpoint is not recommended; more sentences may help.",
}
TOO_FEW = (
    "It is not clear that it helped: the number of measured held-out photos is {photos}, and at "
    "least {needed} are needed to tell. The new checkpoint is not recommended; add sentences about "
    "more photos, or hold out more of them with --held-out."
)
TOO_FEW_AHEAD = (
    "It will not be clear whether it helps: the number of held-out photos is {photos}, and at "
    "least {needed} are needed to tell. Add sentences about more photos, or hold out more of them "
    "with --held-out."
)
NO_BOXES = (
    "Nobody drew boxes for the held-out sentences, so it is only known whether the right photo is "
    "found, not whether the box in it is right."
)


@dataclass(frozen=True)
class Comparison:
    """How well one set of sentences is answered before and after.

    Attributes:
        name: of the set.
        before, after: ranks of the right answers to the same sentences.
    """

    name: str
    before: Ranks
    after: Ranks

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values: percentages, and gains in points with 95 % intervals."""
        # Intervals cannot be computed without any sentence.
        gains = self.after.gain_over(self.before) if len(self.before.photos) else {}
        return {
            "name": self.name,
            "sentences": len(self.before.photos),
            "with_box": int(self.before.has_box.sum()),
            "before": self.before.figures(),
            "after": self.after.figures(),
            "gain": {figure: _rounded(gain) for figure, gain in gains.items()},
        }

    def table(self) -> Table:
        """Return a table for the terminal."""
        from reir.cli.common import new_table

        values = self.to_dict()
        title = f"{values['sentences']:,} sentences, {self.name} (%)"
        table = new_table(title, "before", "after", "gain in points", right=("before", "after"))
        for figure, gain in values["gain"].items():
            table.add_row(
                NAMES[figure],
                f"{values['before'][figure]:.1f}",
                f"{values['after'][figure]:.1f}",
                f"{gain['mean']:+.1f} [{gain['low']:+.1f} to {gain['high']:+.1f}]",
            )
        return table


@dataclass(frozen=True, kw_only=True)
class FinetuneReport:
    """What a fine-tune did.

    Attributes:
        gallery: name of the gallery.
        checkpoint: folder of the new checkpoint.
        canaries: file with the held-out sentences for the gate of `reir reindex`; `counts` has
            their number under the same name.
        masks: whether the gallery was indexed with masks.
        counts: numbers of photos and sentences.
        labels: what became of the training sentences; see `PseudoLabels.to_dict`.
        blend: chosen share of the new weights, and why.
        held_out: held-out sentences.
        remembered: sentences that the model was not tuned on, about other photos.
        minutes: time of each part.
        feedback: what became of the feedback, if it was learned from.
        store: where the gallery is; None for the default store.
    """

    gallery: str
    checkpoint: Path
    canaries: Path
    masks: bool
    counts: Mapping[str, int]
    labels: Mapping[str, Any]
    blend: Mapping[str, Any]
    held_out: Comparison
    remembered: Comparison
    minutes: Mapping[str, float]
    feedback: FeedbackSummary | None = None
    store: str | None = None

    @property
    def verdict(self) -> Verdict:
        """Whether more held-out sentences have the right photo first than before."""
        if self._num_measured < MIN_HELD_OUT:
            return "unclear"
        gain = self.held_out.after.gain_over(self.held_out.before)["photo_p1"]
        if gain.low > 0:
            return "helped"
        return "harmed" if gain.high < 0 else "unclear"

    @property
    def explanation(self) -> str:
        """The verdict in words."""
        if self._num_measured < MIN_HELD_OUT:
            return TOO_FEW.format(photos=self._num_measured, needed=MIN_HELD_OUT)
        return SENTENCES[self.verdict]

    @property
    def _num_measured(self) -> int:
        return len(np.unique(self.held_out.before.photos))

    @property
    def command(self) -> str:
        """The command that checks the new checkpoint and makes it live."""
        model = ["--checkpoint", str(self.checkpoint)]
        # `--checkpoint` means an encoder without masks, and excludes `--encoder`.
        if self.masks:
            model = ["--encoder", f"clare-masks:{self.checkpoint}"]
        words = ["reir", "reindex", self.gallery, *model, "--canary", str(self.canaries)]
        if self.counts["canaries"] < MIN_CANARIES:
            words += ["--limit", f"min_canaries={self.counts['canaries']}"]
        if self.store is not None:
            words += ["--store", self.store]
        return shlex.join(words)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "gallery": self.gallery,
            "verdict": self.verdict,
            "explanation": self.explanation,
            "recommended": self.verdict == "helped",
            "checkpoint": str(self.checkpoint),
            "canaries": str(self.canaries),
            "command": self.command,
            "counts": dict(self.counts),
            **({"feedback": self.feedback.to_dict()} if self.feedback else {}),
            "labels": dict(self.labels),
            "blend": dict(self.blend),
            "held_out": self.held_out.to_dict(),
            "remembered": self.remembered.to_dict(),
            "minutes": {**self.minutes, "all": round(sum(self.minutes.values()), 2)},
        }

    def table(self) -> RenderableType:
        """Return the report for the terminal."""
        from rich.console import Group
        from rich.text import Text

        values = self.to_dict()
        counts, labels = self.counts, self.labels
        lines = [
            f"{counts['sentences']:,} sentences about {counts['photos']:,} photos; those about "
            f"{counts['held_out_photos']:,} photos were held out."
        ]
        found, left_out = labels["kept"] - labels["drawn"], labels["sentences"] - labels["kept"]
        lines += [
            f"Boxes for training: {labels['drawn']:,} drawn, {found:,} found, {left_out:,} "
            f"sentences left out.",
            f"Share of the new weights: {self.blend['share']:g}",
        ]
        if problem := self.blend.get("not_calibrated"):
            lines.append(f"Presence is not calibrated: {problem}.")
        minutes = ", ".join(f"{name} {value:.1f}" for name, value in values["minutes"].items())
        parts: list[RenderableType] = [
            *([self.feedback.table(), ""] if self.feedback else []),
            Text("\n".join(lines)),
            "",
            self.held_out.table(),
            *([] if self.held_out.before.has_box.any() else [Text(NO_BOXES, style="dim")]),
            "",
            self.remembered.table(),
            "",
            Text(self.explanation, style="bold"),
            Text(f"Minutes: {minutes}", style="dim"),
            "",
            Text("To check the new checkpoint and make it live:"),
            Text(self.command),
        ]
        return Group(*parts)


def _rounded(interval: Interval) -> dict[str, float]:
    return {name: round(value, 2) for name, value in vars(interval).items()}
