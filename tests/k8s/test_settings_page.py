"""docs/configuration.md describes every setting."""

from __future__ import annotations

import json
import re

from reir.settings import load_settings, sections
from reir_k8s.settings_page import settings_page


def rows_of_page() -> dict[str, list[str]]:
    """Dotted key -> default, allowed values and description, as the page has them."""
    rows: dict[str, list[str]] = {}
    prefixes: list[str] = []
    for line in settings_page().partition("## Section")[2].splitlines():
        if line.startswith("| key, after"):
            prefixes = re.findall(r"`([^`]+)`", line)
        elif line.startswith("| `"):
            key, *others = [cell.strip() for cell in line.strip("|").split(" | ")]
            rows |= {prefix + key.strip("`"): others for prefix in prefixes}
    return rows


def test_every_setting_has_a_row_with_its_default_and_a_description() -> None:
    rows = rows_of_page()
    expected = {
        f"{name}.{key}": value
        for name, model in sections().items()
        for key, value, _ in load_settings(name, model).rows()
    }
    assert rows.keys() == expected.keys()
    for key, (default, allowed, text) in rows.items():
        assert allowed, key
        assert text, key
        if key not in ("serve.store", "serve.localizer.target_ongoing_requests"):
            assert default.partition(";")[0] == f"`{json.dumps(expected[key])}`", key


def test_a_default_that_differs_between_deployments_is_shown() -> None:
    default, *_ = rows_of_page()["serve.localizer.target_ongoing_requests"]
    assert default == "`4.0`; `serve.localizer`: `1.0`"


def test_limits_and_choices_are_in_words() -> None:
    rows = rows_of_page()
    assert rows["monitor.port"][1] == "whole number, at least 0, at most 65535"
    assert rows["index.runner"][1] == "`auto`, `local`, `ray`"
