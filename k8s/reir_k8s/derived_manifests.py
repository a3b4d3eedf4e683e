"""Writes the manifests that repeat what is elsewhere: `python -m reir_k8s.derived_manifests`.

* What Ray Serve reads, `serveConfigV2` of the RayService, is written from the settings of serving
  in each overlay, `serve.yaml`, by the same function as in `reir serve --build`.
* The alert rules of Prometheus, `monitoring/rules/`, become objects of the Prometheus operator.
"""

from __future__ import annotations

import sys
from pathlib import Path

import yaml

from reir.config import load_config
from reir_k8s.manifests import K8S
from reir_k8s.monitoring.rules.files import rule_files
from reir_serving.cli.serve import serve_file
from reir_serving.config import ServeConfig

SETTINGS, PATCH, RULES = "serve.yaml", "serve-config.yaml", "prometheus-rules.yaml"
HEADER = "# Written by `python -m reir_k8s.derived_manifests` from {}; do not edit.\n"


def derived_manifests() -> dict[Path, str]:
    """Return the path and the text of each file."""
    found = {
        settings.with_name(PATCH): HEADER.format(SETTINGS) + _serve_patch(settings)
        for settings in sorted((K8S / "overlays").glob(f"*/{SETTINGS}"))
    }
    rules = [_rule_object(name, text) for name, text in sorted(rule_files().items())]
    text = yaml.safe_dump_all(rules, sort_keys=False, width=100)
    return {**found, K8S / "monitoring" / RULES: HEADER.format("rules/") + text}


def _serve_patch(settings: Path) -> str:
    """Return a JSON patch of the RayService, as YAML."""
    operation = {
        "op": "replace",
        "path": "/spec/serveConfigV2",
        "value": serve_file(load_config(ServeConfig, settings)),
    }
    # As a block, so that a person can read the difference between two versions.
    return yaml.dump([operation], Dumper=_BlockDumper, sort_keys=False, width=1000)


def _rule_object(file: str, text: str) -> dict[str, object]:
    """Return a file of rules as an object of the Prometheus operator."""
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {
            "name": f"reir-{Path(file).stem}",
            "labels": {"app.kubernetes.io/part-of": "reir"},
        },
        "spec": yaml.safe_load(text),
    }


class _BlockDumper(yaml.SafeDumper):
    """Writes texts of several lines as blocks."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_BlockDumper.add_representer(str, _represent_text)


def main() -> int:
    """Write the files."""
    for path, text in derived_manifests().items():
        path.write_text(text, encoding="utf-8")
        sys.stdout.write(f"wrote {path.relative_to(K8S)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
