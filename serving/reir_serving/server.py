"""The process that holds Ray for `reir serve`: `python -m reir_serving.server FOLDER REPORT`.

It is told what to do on standard input, a line of JSON each: first the settings, then other live
settings, should there be any. The end of the input means to stop; it comes as well when whoever
started it is gone. What it has to say goes to the file descriptor REPORT, a line of JSON each.

`supervisor.py` starts it, and says why it is a process of its own. Knows no Ray.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TextIO

from reir.errors import ReirError
from reir_serving import environment
from reir_serving.config import LiveSettings, ServeConfig

READY, SAID, REFUSED, MISSING = "ready", "said", "refused", "missing"
"""What a line of the report tells: the address, once all replicas are ready; a line for the user;
why it does not start; a package that is not installed."""


def main(arguments: list[str]) -> int:
    """Serve until the input ends; returns the exit status."""
    folder, descriptor = arguments
    with os.fdopen(int(descriptor), "w", buffering=1, encoding="utf-8") as report:
        try:
            config = ServeConfig.model_validate_json(sys.stdin.readline())
            _serve(config, Path(folder), sys.stdin, report)
        except ReirError as error:
            _report(report, REFUSED, str(error))
            return 1
        except ModuleNotFoundError as error:
            _report(report, MISSING, str(error))
            return 1
    return 0


def _serve(config: ServeConfig, folder: Path, orders: Iterable[str], report: TextIO) -> None:
    environment.apply(folder)
    from reir_serving.jobs import reconfigure, serving

    with serving(config, folder) as address:
        _report(report, READY, address)
        for order in orders:
            reconfigure(config, LiveSettings.model_validate_json(order))
            _report(report, SAID, "live settings read again")


def _report(report: TextIO, what: str, text: str) -> None:
    report.write(json.dumps([what, text]) + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
