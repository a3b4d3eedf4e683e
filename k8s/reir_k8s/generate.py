"""Writes all generated files of the repository: `python -m reir_k8s.generate`.

These are the dashboards and rules in k8s/monitoring/, docs/metrics.md, docs/configuration.md and
the list of alerts in docs/runbooks/. With `--check`, nothing is written, and the exit status is 1
if a file differs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from reir_k8s.monitoring.dashboards.pages import dashboard_files
from reir_k8s.monitoring.declared_metrics import metrics_page
from reir_k8s.monitoring.rules.files import alerts_page, rule_files
from reir_k8s.settings_page import settings_page

ROOT = Path(__file__).resolve().parents[2]


def generated_files() -> dict[Path, str]:
    """Return the path, relative to the repository, and the text of each generated file."""
    monitoring = Path("k8s/monitoring")
    return {
        Path("docs/configuration.md"): settings_page(),
        Path("docs/metrics.md"): metrics_page(),
        Path("docs/runbooks/README.md"): alerts_page(),
        **{monitoring / "dashboards" / name: text for name, text in dashboard_files().items()},
        **{monitoring / "rules" / name: text for name, text in rule_files().items()},
    }


def differing_files(root: Path = ROOT) -> list[Path]:
    """Return the generated files that are missing, differ, or are no longer generated."""
    files = generated_files()
    wrong = [path for path, text in files.items() if _read(root / path) != text]
    folders = {path.parent for path in files if path.parts[0] == "k8s"}
    held = (path.relative_to(root) for folder in folders for path in (root / folder).glob("*"))
    return sorted({*wrong, *(path for path in held if path not in files)})


def write_files(root: Path = ROOT) -> list[Path]:
    """Write the files that differ, delete those that are no longer generated, and return both."""
    files = generated_files()
    wrong = differing_files(root)
    for path in wrong:
        if path in files:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text(files[path], encoding="utf-8")
        else:
            (root / path).unlink()
    return wrong


def main() -> None:
    """Write or check the files."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m reir_k8s.generate")
    parser.add_argument(
        "--check", action="store_true", help="Write nothing; exit with 1 if not up to date."
    )
    check = parser.parse_args().check
    changed = differing_files() if check else write_files()
    for path in changed:
        sys.stdout.write(f"{'differs' if check else 'written'}: {path}\n")
    if check and changed:
        sys.exit("run `python -m reir_k8s.generate` and commit what it writes")


def _read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.exists() else None


if __name__ == "__main__":
    main()
