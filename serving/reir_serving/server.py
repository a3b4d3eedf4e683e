"""The process that runs Ray for `reir serve`: `python -m reir_serving.server FOLDER REPORT`.

It reads its instructions from standard input, one line of JSON each: first the settings, then any
new live settings. It stops at the end of the input, which also comes when the parent process
exits. It writes status messages to the file descriptor REPORT, one line of JSON each.

`supervisor.py` starts this process and explains why it is a separate one. Does not import Ray until
the environment is set.
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
"""Kinds of status messages. Their texts are: for `READY`, the address, sent once all replicas are
ready; for `SAID`, a message for the user; for `REFUSED`, why the server could not start; for
`MISSING`, which package is not installed."""


def main(arguments: list[str]) -> int:
    """Serve until standard input ends; return the exit status."""
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
            _report(report, SAID, "live settings reloaded")


def _report(report: TextIO, what: str, text: str) -> None:
    report.write(json.dumps([what, text]) + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
