"""Draws the panels of a dashboard with matplotlib, in the layout of Grafana."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from PIL import Image

from reir_testing.monitoring.live_panels import LivePanel
from reir_testing.prometheus_server import Series

COLUMN_INCH, ROW_INCH = 0.62, 0.36
MAX_LEGEND = 6
"""More lines are drawn, but not named."""
MAX_NUMBERS = 8
NUM_COLORS = 64
_RED, _GREEN, _TEXT = "#c4162a", "#37872d", "#3d3d3d"
_SIZES = ((1e9, "G"), (1e6, "M"), (1e3, "k"))


def draw_dashboard(panels: Sequence[LivePanel], path: Path) -> None:
    """Draw the panels of one dashboard into a PNG file; folders are created."""
    height = max(place["y"] + place["h"] for place in map(_place, panels))
    width_inch, height_inch = 24 * COLUMN_INCH, height * ROW_INCH
    figure = Figure(figsize=(width_inch, height_inch), dpi=72)
    for panel in panels:
        place = _place(panel)
        box = (
            place["x"] / 24 + 0.035,
            1
            - (place["y"] + place["h"]) / height
            + (0.6 if panel.model["type"] == "stat" else 1.8) / height,
            place["w"] / 24 - 0.05,
            (place["h"] - (2.0 if panel.model["type"] == "stat" else 3.3)) / height,
        )
        axes = figure.add_axes(box)
        axes.set_title(panel.title, fontsize=9, loc="left", color=_TEXT, fontweight="bold")
        (_draw_numbers if panel.model["type"] == "stat" else _draw_lines)(axes, panel)
    for row, y in _headings(panels).items():
        figure.text(0.008, 1 - (y - 0.4) / height, row, fontsize=11, color=_TEXT, va="center")
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    with Image.open(drawn) as picture:  # a palette makes the file a third as large
        picture.convert("RGB").quantize(NUM_COLORS).save(path, optimize=True)


def _headings(panels: Iterable[LivePanel]) -> dict[str, int]:
    """Return each heading, and where its first panel begins."""
    tops: dict[str, int] = {}
    for panel in panels:
        tops[panel.row] = min(tops.get(panel.row, 10**6), _place(panel)["y"])
    return tops


def _draw_lines(axes: Axes, panel: LivePanel) -> None:
    lines = _lines(panel)
    for number, (legend, series) in enumerate(lines.items()):
        label = legend if number < MAX_LEGEND else None
        axes.plot(*_with_gaps(series, panel.start_s), linewidth=1.2, label=label)
    if (limit := _limit(panel)) is not None and _is_near(limit[0], lines.values()):
        axes.axhline(limit[0], color=_RED, linestyle="--", linewidth=0.8)
    unit = panel.model["fieldConfig"]["defaults"]["unit"]
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: formatted(value, unit)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} min"))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.tick_params(labelsize=7, colors=_TEXT, length=2)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.set_xlim(0, (panel.end_s - panel.start_s) / 60)
    low, high = axes.get_ylim()
    axes.set_ylim(min(0.0, low), max(high, 0.0) if low >= 0 or high > -low else 1.0)
    if lines:
        axes.legend(
            fontsize=6.5,
            loc="upper center",
            bbox_to_anchor=(0.5, -0.12),
            ncols=3,
            frameon=False,
            columnspacing=1.0,
            handlelength=1.2,
        )


def _with_gaps(series: Series, start_s: float) -> tuple[list[float], list[float]]:
    """Return the minutes since the start and the values, with a NaN where there was no value."""
    step_s = min((b - a for (a, _), (b, _) in pairwise(series.points)), default=0.0)
    minutes: list[float] = []
    values: list[float] = []
    for at_s, value in series.points:
        minute = (at_s - start_s) / 60
        if minutes and 60 * (minute - minutes[-1]) > 1.5 * step_s:
            minutes.append(minute)
            values.append(math.nan)
        minutes.append(minute)
        values.append(value if math.isfinite(value) else math.nan)
    return minutes, values


def _draw_numbers(axes: Axes, panel: LivePanel) -> None:
    axes.set_axis_off()
    lines = [*_lines(panel).items()][:MAX_NUMBERS]
    unit = panel.model["fieldConfig"]["defaults"]["unit"]
    for number, (legend, series) in enumerate(lines):
        at = (number + 0.5) / len(lines)
        color = _color(series.value, _limit(panel))
        size = 22 if len(lines) == 1 else 13
        axes.text(at, 0.55, formatted(series.value, unit), fontsize=size, color=color, ha="center")
        axes.text(at, 0.1, legend, fontsize=7, color=_TEXT, ha="center")


def _lines(panel: LivePanel) -> Mapping[str, Series]:
    return {legend: series for query in panel.series for legend, series in query.items()}


def _place(panel: LivePanel) -> Mapping[str, int]:
    place: Mapping[str, int] = panel.model["gridPos"]
    return {"x": 0, "y": 0, **place}


def _limit(panel: LivePanel) -> tuple[float, bool] | None:
    """Return the limit of a panel, and whether the values below it are the problem."""
    steps: list[dict[str, Any]] = (
        panel.model["fieldConfig"]["defaults"].get("thresholds", {}).get("steps", [])
    )
    if len(steps) < 2:
        return None
    return float(steps[1]["value"]), steps[0]["color"] == "red"


def _is_near(limit: float, lines: Iterable[Series]) -> bool:
    """Whether a line at the limit would leave the others readable."""
    values = [value for each in lines for _, value in each.points if math.isfinite(value)]
    return bool(values) and limit <= 5 * max(values)


def _color(value: float, limit: tuple[float, bool] | None) -> str:
    if limit is None:
        return _TEXT
    is_bad = value < limit[0] if limit[1] else value >= limit[0]
    return _RED if is_bad else _GREEN


def formatted(value: float, unit: str) -> str:
    """Return a value with its unit, as Grafana writes it."""
    if unit == "percentunit":
        return f"{100 * value:.3g}%"
    if unit == "percent":
        return f"{value:.3g}%"
    if unit == "s":
        return _time(value)
    size, letter = next(((s, name) for s, name in _SIZES if abs(value) >= s), (1.0, ""))
    suffix = letter + {"bytes": "B", "Bps": "B/s", "reqps": "/s", "ops": "/s", "wps": "/s"}.get(
        unit, ""
    )
    return f"{value / size:.3g}{' ' if suffix and suffix[0] != '/' else ''}{suffix}"


def _time(seconds: float) -> str:
    if abs(seconds) >= 3600:
        return f"{seconds / 3600:.3g} h"
    if abs(seconds) >= 60:
        return f"{seconds / 60:.3g} min"
    return f"{seconds:.3g} s" if abs(seconds) >= 1 or not seconds else f"{1e3 * seconds:.3g} ms"
