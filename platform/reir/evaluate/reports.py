"""What all reports share: intervals, what was measured, and tables for the terminal."""

# Shapes: M queries, S figures

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from reir.evaluate.gallery import EncodedGallery
from reir.evaluate.published import PublishedTable
from reir.metrics import Interval, bootstrap_intervals
from reir.metrics.reir import Ints
from reir.models.seams import InstanceEncoder

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

Figures = Mapping[str, Interval]
Columns = Mapping[str, npt.NDArray[Any]]
"""Figure -> (M,) its value of each query, in [0, 1]."""

NUM_RESAMPLES = 2000
NO_CHOICE = (
    "this encoder computes vectors only of the instances that it keeps, or gives no access to the "
    "others, so no expression can choose among them"
)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a report's figures were measured on, and with.

    Attributes:
        counts: photos, unreadable, misshapen, instances, and numbers of the task's texts.
        digest: of the encoder.
        versions: of the software.
        settings: what was asked for.
        left_out: part of the report that is not there -> why.
    """

    counts: Mapping[str, int]
    digest: str
    versions: Mapping[str, str]
    settings: Mapping[str, int | float | str | bool]
    left_out: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "counts": dict(self.counts),
            "digest": self.digest,
            "versions": dict(self.versions),
            "settings": dict(self.settings),
            "left_out": dict(self.left_out),
        }

    def notes(self) -> list[str]:
        """Return what the figures rest on and what is missing, a sentence each."""
        counts = self.counts
        told = [
            f"{counts['instances']:,} instances of {counts['photos']:,} photos, encoder "
            f"{self.digest[:12]}; percent, 95 % bootstrap intervals over photos."
        ]
        if counts["unreadable"]:
            told.append(f"{counts['unreadable']:,} photos do not decode: they have no instances.")
        if counts["misshapen"]:
            told.append(f"{counts['misshapen']:,} photos have another shape than annotated.")
        return told + [f"Left out, {name}: {reason}." for name, reason in self.left_out.items()]


def measured(
    encoder: InstanceEncoder,
    gallery: EncodedGallery,
    *,
    counts: Mapping[str, int],
    settings: Mapping[str, int | float | str | bool],
    left_out: Mapping[str, str],
) -> Measured:
    """Describe an evaluation of a gallery; `counts` and `settings` are what its task adds."""
    packages = {"reir": "reir-platform", "numpy": "numpy", "torch": "torch"}
    installed = {name: version(package) for name, package in packages.items()}
    return Measured(
        counts={
            "photos": len(gallery.image_rows) + len(gallery.unreadable),
            "unreadable": len(gallery.unreadable),
            "misshapen": gallery.num_misshapen,
            "instances": len(gallery.arrays),
            **counts,
        },
        digest=encoder.digest,
        versions=installed | {"python": ".".join(map(str, sys.version_info[:3]))},
        settings={
            **settings,
            "num_candidates": encoder.num_candidates,
            "num_resamples": NUM_RESAMPLES,
            "threads": gallery.threads,
        },
        left_out=left_out,
    )


def intervals(columns: Columns, images: Ints) -> dict[str, Interval]:
    """Figure -> its mean in percent; queries of one photo are drawn together."""
    values = 100.0 * np.stack(list(columns.values()), axis=1)
    found = bootstrap_intervals(values, clusters=images, num_resamples=NUM_RESAMPLES)
    return dict(zip(columns, found, strict=True))


def percent(share: float) -> int:
    """Return a share in whole percent, as names of figures have it."""
    return round(100 * share)


def means(figures: Figures) -> dict[str, float]:
    """Return the means as JSON values."""
    return {name: round(interval.mean, 4) for name, interval in figures.items()}


def ranges(figures: Figures) -> dict[str, list[float]]:
    """Return the ends of the intervals as JSON values."""
    return {name: [round(i.low, 4), round(i.high, 4)] for name, i in figures.items()}


def cell(interval: Interval) -> str:
    """Return a figure with its interval as a table shows it."""
    return f"{interval.mean:.1f} [{interval.low:.1f}-{interval.high:.1f}]"


def figure_table(title: str, columns: Sequence[str]) -> Table:
    """Return an empty table: a column of names, then columns of figures."""
    from rich.table import Table

    shape: Any = {"box": None, "pad_edge": False, "padding": (0, 1, 0, 0)}
    table = Table(title=title, title_style="bold", title_justify="left", **shape)
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def beside(
    published: PublishedTable, headers: Sequence[str], ours: Mapping[str, Mapping[str, float]]
) -> list[RenderableType]:
    """Return the published rows with ours below them, and what to know before comparing.

    Args:
        published: a table with one figure a header.
        headers: of its columns.
        ours: name of a row -> its figures.
    """
    table = figure_table("Beside published figures", headers)
    theirs = {row.system: row.figures for row in published.rows}
    for rows, style in ((theirs, ""), (ours, "bold")):
        for name, figures in rows.items():
            cells = (f"{figures[c]:.2f}" if c in figures else "-" for c in published.columns)
            table.add_row(name, *cells, style=style)
        table.add_row()
    return [table, f"Below, in bold, ours. Theirs: {published.source}. {published.note}"]


def stacked(parts: Sequence[RenderableType], notes: Sequence[str]) -> RenderableType:
    """Return tables and, below them, notes."""
    from rich.console import Group

    return Group(*parts, "", *notes)
