"""Writes docs/benchmarks.md and the figures in README.md from `benchmarks/results`.

    python benchmarks/tables.py

The text around the figures is in `benchmarks/templates/`. There `{{NAME KEY FORMAT}}` stands for
the figure KEY of `results/NAME.json` in a Python format, e.g. `{{indexing p4.vs_bs1 .2f}}`, and
`{{NAME made}}` for the command and the date that made NAME. Measures nothing.
"""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any

from _pages import replace_section
from _report import RESULTS, ROOT

TEMPLATES = ROOT / "benchmarks" / "templates"
FIGURES_BEGIN, FIGURES_END = "<!-- figures -->", "<!-- end of figures -->"


@cache
def result(name: str) -> dict[str, Any]:
    """Return the report `results/<name>.json`."""
    report: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return report


def render(template: str) -> str:
    """Replace every placeholder by its figure.

    Raises:
        ValueError: a placeholder is malformed, or names a figure that the result does not have.
    """
    return re.sub(r"\{\{(.*?)\}\}", lambda match: _replacement(match.group(1)), template)


def _replacement(placeholder: str) -> str:
    words = placeholder.split(" ")
    if words[1:] == ["made"]:
        report = result(words[0])
        # A reader has none of the folders that the run kept its galleries and checkpoints in.
        command = re.sub(r" --(?:store|runs) \S+", "", report["command"])
        return f"`{command}`, {report['date'][:10]}"
    if len(words) != 3:
        raise ValueError(
            f"{{{{{placeholder}}}}}: write {{{{NAME KEY FORMAT}}}} or {{{{NAME made}}}}"
        )
    name, key, form = words
    figures = result(name)["figures"]
    if key not in figures:
        raise ValueError(f"{{{{{placeholder}}}}}: results/{name}.json has no figure {key!r}")
    return format(figures[key], form)


def benchmarks_page() -> str:
    """Return the text of docs/benchmarks.md."""
    return render((TEMPLATES / "benchmarks.md").read_text(encoding="utf-8"))


def readme() -> str:
    """Return README.md with its table of figures rendered anew."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = render((TEMPLATES / "readme_figures.md").read_text(encoding="utf-8"))
    return replace_section(text, FIGURES_BEGIN, FIGURES_END, table)


def main() -> None:
    for path, text in (("docs/benchmarks.md", benchmarks_page()), ("README.md", readme())):
        (ROOT / path).write_text(text, encoding="utf-8")
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
