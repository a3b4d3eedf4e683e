"""Tests every route of a running `reir serve` against its OpenAPI document with schemathesis.

    python benchmarks/serve_schemathesis.py

Runs all checks of schemathesis in all its phases (examples, coverage, fuzzing, stateful), with
valid and invalid requests. The server requires an API key, so requests without one are tested too.
The gallery holds real photos, indexed with `reir index`.

    serve.schemathesis_failures   number of distinct failures and errors
    serve.schemathesis_cases      number of test cases
    serve.schemathesis_routes     number of operations tested
    serve.schemathesis_exceptions reasons for which some requests are not sent (`_openapi_hooks.py`)
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

from _indexing import copy_photos, parser_of
from _report import write_report
from _served import Server, served

from reir_serving.middleware.keys import new_key
from reir_testing.serving import free_port

GALLERY, KNOWN_PHOTOS = "photos", 8
_REIR = [sys.executable, "-c", "from reir.cli.main import main; main()"]
_TESTER = [sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()"]
_HERE = Path(__file__).resolve().parent


def main() -> None:
    """Measure, print the figures, and write them to a report."""
    parser = parser_of(__doc__)
    parser.add_argument("--examples", type=int, default=300, help="Maximum per route.")
    parser.add_argument("--photos", type=int, default=24)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        figures = measured(arguments, Path(name))
    for key, value in figures.items():
        print(f"{key:32} {value}")
    print(f"figures in {write_report('serve_schemathesis', figures).name}")


def measured(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Index photos, start a server, and test it."""
    store = str(folder / "store")
    photos = copy_photos(folder / "photos", arguments.photos)
    index = [*_REIR, "index", str(photos), "--gallery", GALLERY, "--store", store]
    subprocess.run(index, check=True)
    keys = folder / "keys.yaml"
    key = new_key(keys, read=(), write=("*",))
    options = {
        "galleries": [GALLERY],
        "keys_file": str(keys),
        "uploads": str(folder / "uploads"),
        "search_log": str(folder / "searches"),  # without it, feedback is answered with 501
        "limits": {"feedback_rate_per_s": None},
    }
    with served(store, folder, free_port(), options) as server:
        return tested(server, key, arguments.examples, folder)


def tested(server: Server, key: str, examples: int, folder: Path) -> dict[str, Any]:
    """Run schemathesis against a server, print its output, and return the figures."""
    known, report = folder / "known.json", folder / "report.json"
    known.write_text(json.dumps(_known(server, key)), encoding="utf-8")
    os.environ["REIR_SCHEMATHESIS"] = str(known)
    from _openapi_hooks import KEPT, LENIENT, UNSAID

    environment = {
        **os.environ,
        "SCHEMATHESIS_HOOKS": "_openapi_hooks",
        "PYTHONPATH": os.pathsep.join([str(_HERE), os.environ.get("PYTHONPATH", "")]),
    }
    options = {
        "--checks": "all",
        "--max-examples": examples,
        "--header": f"Authorization: Bearer {key}",
        # Health checks judge how inputs are generated, not the server.
        "--suppress-health-check": "all",
        "--report": "json",
        "--report-json-path": report,
        "--request-timeout": 60,
    }
    told = [str(each) for option in options.items() for each in option]
    # Deterministic, so that a failure can be reproduced.
    more = ["--continue-on-failure", "--generation-deterministic"]
    command = [*_TESTER, "run", f"{server.url}/openapi.json", *told, *more]
    subprocess.run(command, check=False, env=environment, cwd=folder)
    found = json.loads(report.read_text(encoding="utf-8"))
    exceptions = [*UNSAID, *LENIENT, KEPT]
    print(f"not sent: {'; '.join(exceptions)}")
    return {**_figures(found), "serve.schemathesis_exceptions": exceptions}


def _figures(report: dict[str, Any]) -> dict[str, Any]:
    """Return the figures from a report of schemathesis."""
    if not report["complete"]:
        raise RuntimeError(f"schemathesis stopped early: {report['stop_reason']}")
    failures = report["test_cases"]["unique_failures"]
    return {
        "serve.schemathesis_failures": failures + sum(each["count"] for each in report["errors"]),
        "serve.schemathesis_cases": report["test_cases"]["generated"],
        "serve.schemathesis_routes": report["operations"]["tested"],
    }


def _known(server: Server, key: str) -> dict[str, Any]:
    """Return the gallery's name, instances of photos to keep, and photos that may be deleted."""
    asked = {"gallery": GALLERY, "expression": "a person", "k": 100}
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    request = urllib.request.Request(f"{server.url}/v1/search", json.dumps(asked).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        hits = json.load(answer)["hits"]
    stay = {hit["image_id"] for hit in hits[:KNOWN_PHOTOS]}
    return {
        "gallery": GALLERY,
        "instances": [hit["instance_id"] for hit in hits if hit["image_id"] in stay],
        "images": [hit["image_id"] for hit in hits if hit["image_id"] not in stay],
    }


if __name__ == "__main__":
    main()
