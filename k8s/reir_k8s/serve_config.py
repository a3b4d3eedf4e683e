"""Writes the patches that set `serveConfigV2` of the RayService: `python -m reir_k8s.serve_config`.

Each overlay has the settings of serving in `serve.yaml`. What Ray Serve reads is written from them
by the same function as in `reir serve --build`, so that the two cannot differ.
"""

from __future__ import annotations

import sys
from pathlib import Path

import yaml

from reir.config import load_config
from reir_serving.cli.serve import serve_file
from reir_serving.config import ServeConfig

OVERLAYS = Path(__file__).parents[1] / "overlays"
SETTINGS, PATCH = "serve.yaml", "serve-config.yaml"
HEADER = f"# Written by `python -m reir_k8s.serve_config` from {SETTINGS}; do not edit.\n"


def patches() -> dict[Path, str]:
    """Return the path and the text of the patch of each overlay."""
    return {
        settings.with_name(PATCH): HEADER + _patch(settings)
        for settings in sorted(OVERLAYS.glob(f"*/{SETTINGS}"))
    }


def _patch(settings: Path) -> str:
    """Return a JSON patch of the RayService, as YAML."""
    operation = {
        "op": "replace",
        "path": "/spec/serveConfigV2",
        "value": serve_file(load_config(ServeConfig, settings)),
    }
    # As a block, so that a person can read the difference between two versions.
    return yaml.dump([operation], Dumper=_BlockDumper, sort_keys=False, width=1000)


class _BlockDumper(yaml.SafeDumper):
    """Writes texts of several lines as blocks."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_BlockDumper.add_representer(str, _represent_text)


def main() -> int:
    """Write the patches of all overlays."""
    for path, text in patches().items():
        path.write_text(text, encoding="utf-8")
        sys.stdout.write(f"wrote {path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
