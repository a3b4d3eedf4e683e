"""Pictures of dashboards: values with their units, lines with gaps, and the layout."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from reir_testing.monitoring.live_panels import LivePanel
from reir_testing.monitoring.panel_pictures import _with_gaps, draw_dashboard, formatted
from reir_testing.prometheus_server import Series


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.123, "percentunit", "12.3%"),
        (45.0, "percent", "45%"),
        (0.0123, "s", "12.3 ms"),
        (0.0, "s", "0 s"),
        (90.0, "s", "1.5 min"),
        (-7200.0, "s", "-2 h"),
        (1440.0, "short", "1.44 k"),
        (2_500_000.0, "Bps", "2.5 MB/s"),
        (3.0, "reqps", "3/s"),
    ],
)
def test_values_have_units(value: float, unit: str, text: str) -> None:
    assert formatted(value, unit) == text


def test_a_line_ends_where_there_is_no_value() -> None:
    series = Series({}, ((60.0, 1.0), (61.0, 2.0), (65.0, 3.0), (66.0, math.inf)))
    minutes, values = _with_gaps(series, 0.0)
    assert [round(60 * minute) for minute in minutes] == [60, 61, 65, 65, 66]
    assert values[:2] == [1.0, 2.0]
    assert math.isnan(values[2])
    assert values[3] == 3.0
    assert math.isnan(values[4])


def panel(kind: str, place: dict[str, int], series: dict[str, Series]) -> LivePanel:
    steps: list[dict[str, Any]] = [
        {"color": "green", "value": None},
        {"color": "red", "value": 5.0},
    ]
    defaults = {"unit": "short", "thresholds": {"steps": steps}}
    model = {"title": kind, "type": kind, "gridPos": place, "fieldConfig": {"defaults": defaults}}
    return LivePanel(
        dashboard="d", row="Row", model=model, start_s=0.0, end_s=60.0, series=[series]
    )


def test_the_picture_has_the_size_of_the_grid_and_shows_problems_in_red(tmp_path: Path) -> None:
    good, bad = (Series({}, ((60.0, value),)) for value in (1.0, 9.0))
    line = Series({}, ((0.0, 1.0), (30.0, 7.0), (60.0, 2.0)))
    reds = []
    for number in (good, bad):
        panels = [
            panel("stat", {"y": 1, "h": 4, "w": 6}, {"a": number}),
            panel("timeseries", {"x": 6, "y": 1, "h": 8, "w": 8}, {"b": line}),
        ]
        path = tmp_path / "pictures" / "d.png"
        draw_dashboard(panels, path)
        with Image.open(path) as picture:
            assert picture.width > 2 * picture.height
            left = picture.convert("RGB").crop((0, 0, picture.width // 4, picture.height))
            red, green, _ = np.moveaxis(np.asarray(left), 2, 0)
            reds.append(int(((red > 150) & (green < 80)).sum()))
    assert reds[0] == 0
    assert reds[1] > 20
