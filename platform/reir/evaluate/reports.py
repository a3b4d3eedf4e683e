"""What all reports share: intervals, the data and settings of the evaluation, and tables."""

# Shapes: M queries, S figures

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from reir.evaluate.encoded_gallery import EncodedGallery, view_settings
from reir.evaluate.localized_expressions import LocalizedExpressions
from reir.evaluate.published import PublishedTable
from reir.metrics import Interval, bootstrap_intervals
from reir.metrics.reir import Ints
from reir.models.interfaces import ExpressionLocalizer, InstanceEncoder

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

Figures = Mapping[str, Interval]
Columns = Mapping[str, npt.NDArray[Any]]
"""Name of a figure -> (M,) its value for each query, in [0, 1]."""

NUM_RESAMPLES = 2000
NO_CHOICE = (
    "this encoder gives vectors only of the instances that it keeps, so an expression cannot "
    "choose among the others"
)


@dataclass(frozen=True, kw_only=True)
class EvaluationInfo:
    """The data, model and settings of an evaluation.

    Attributes:
        counts: numbers of photos, unreadable and misshapen photos, and texts; of an encoder, also
            the number of instances.
        digest: digest of the model.
        versions: versions of the software.
        settings: settings of the evaluation.
        left_out: missing part of the report -> reason why it is missing.
        model: kind of the model.
    """

    counts: Mapping[str, int]
    digest: str
    versions: Mapping[str, str]
    settings: Mapping[str, int | float | str | bool]
    left_out: Mapping[str, str]
    model: Literal["encoder", "localizer"] = "encoder"

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
        """Return sentences about the data and about missing parts of the report."""
        counts = self.counts
        instances = f"{counts['instances']:,} instances of " if "instances" in counts else ""
        notes = [
            f"{instances}{counts['photos']:,} photos, {self.model} {self.digest[:12]}. "
            f"Percentages have 95 % bootstrap intervals over photos."
        ]
        if counts["unreadable"]:
            notes.append(
                f"{counts['unreadable']:,} photos could not be decoded; nothing is found in them."
            )
        if counts["misshapen"]:
            notes.append(
                f"{counts['misshapen']:,} photos have another aspect ratio than annotated."
            )
        return notes + [f"No {name}: {reason}." for name, reason in self.left_out.items()]


def evaluation_info(
    encoder: InstanceEncoder,
    gallery: EncodedGallery,
    *,
    counts: Mapping[str, int],
    settings: Mapping[str, int | float | str | bool],
    left_out: Mapping[str, str],
) -> EvaluationInfo:
    """Describe an evaluation; `counts` and `settings` are added to those of the gallery."""
    return EvaluationInfo(
        counts={
            "photos": len(gallery.image_rows) + len(gallery.unreadable),
            "unreadable": len(gallery.unreadable),
            "misshapen": gallery.num_misshapen,
            "instances": len(gallery.arrays),
            **counts,
        },
        digest=encoder.digest,
        versions=software_versions(),
        settings={
            **settings,
            **view_settings(encoder),
            "num_candidates": encoder.num_candidates,
            "num_resamples": NUM_RESAMPLES,
            "threads": gallery.threads,
        },
        left_out=left_out,
    )


def localizer_info(
    localizer: ExpressionLocalizer, found: LocalizedExpressions, left_out: Mapping[str, str]
) -> EvaluationInfo:
    """Describe an evaluation of a localizer."""
    return EvaluationInfo(
        counts={
            "photos": found.num_photos,
            "unreadable": found.num_unreadable,
            "misshapen": found.num_misshapen,
            "expressions": len(found.targets),
        },
        digest=localizer.digest,
        versions=software_versions(),
        settings={"num_resamples": NUM_RESAMPLES, "threads": found.threads},
        left_out=left_out,
        model="localizer",
    )


def software_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that figures depend on."""
    packages = {"reir": "reir-platform", "numpy": "numpy", "torch": "torch"}
    installed = {name: version(package) for name, package in packages.items()}
    return installed | {"python": ".".join(map(str, sys.version_info[:3]))}


def intervals(columns: Columns, images: Ints) -> dict[str, Interval]:
    """Return the mean and interval of each figure in percent, resampled by photo."""
    # Photos are resampled, not expressions. Expressions of one photo often succeed or fail
    # together, so intervals over expressions would be too narrow.
    values = 100.0 * np.stack(list(columns.values()), axis=1)
    found = bootstrap_intervals(values, clusters=images, num_resamples=NUM_RESAMPLES)
    return dict(zip(columns, found, strict=True))


def percent(share: float) -> int:
    """Return a fraction in whole percent, as used in names of figures."""
    return round(100 * share)


def means(figures: Figures) -> dict[str, float]:
    """Return the means as JSON values."""
    return {name: round(interval.mean, 4) for name, interval in figures.items()}


def ranges(figures: Figures) -> dict[str, list[float]]:
    """Return the ends of the intervals as JSON values."""
    return {name: [round(i.low, 4), round(i.high, 4)] for name, i in figures.items()}


def report_values(
    named: Mapping[str, Figures],
    published: PublishedTable | None,
    info: EvaluationInfo,
    more: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return a report as JSON values.

    Args:
        named: figures by the name of their table: means, and below "intervals" their ends.
        published: published figures on the same data.
        info: the data, encoder and settings of the evaluation.
        more: further values.
    """
    return {
        **{name: means(figures) for name, figures in named.items()},
        "intervals": {name: ranges(figures) for name, figures in named.items()},
        **(more or {}),
        "published": published.to_dict() if published else None,
        **info.to_dict(),
    }


def cell(interval: Interval) -> str:
    """Format a figure with its interval for a table."""
    return f"{interval.mean:.1f} [{interval.low:.1f}-{interval.high:.1f}]"


def figure_table(title: str, columns: Sequence[str]) -> Table:
    """Return an empty table with a column for names and columns for figures."""
    from rich.table import Table

    shape: Any = {"box": None, "pad_edge": False, "padding": (0, 1, 0, 0)}
    table = Table(title=title, title_style="bold", title_justify="left", **shape)
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def comparison(
    published: PublishedTable, headers: Sequence[str], ours: Mapping[str, Mapping[str, float]]
) -> list[RenderableType]:
    """Return a table of the published rows with our rows below, and a note on comparing them.

    Args:
        published: the published table.
        headers: one header for each column.
        ours: name of each of our rows -> its figures.
    """
    table = figure_table(published.title, headers)
    theirs = {row.system: row.figures for row in published.rows}
    for rows, style in ((theirs, ""), (ours, "bold")):
        for name, figures in rows.items():
            cells = (f"{figures[c]:.2f}" if c in figures else "-" for c in published.columns)
            table.add_row(name, *cells, style=style)
        table.add_row()
    return [
        table,
        f"Our figures are in bold. Source of the others: {published.source}. {published.note}",
    ]


def with_notes(parts: Sequence[RenderableType], notes: Sequence[str]) -> RenderableType:
    """Return tables with notes below them."""
    from rich.console import Group

    return Group(*parts, "", *notes)
