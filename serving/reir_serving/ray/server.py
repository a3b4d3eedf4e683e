"""The process that runs Ray for `reir serve`: `python -m reir_serving.ray.server FOLDER STATUS`.

It reads its instructions from standard input, one line of JSON each: first the settings, then any
new live settings. It stops when its input ends, which also happens when the parent process exits.
It writes status messages to the file descriptor STATUS, one line of JSON each.

`supervisor.py` starts this process and explains why it is a separate one. Ray is not imported until
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
from reir_serving.config import LiveSettings, ServeConfig
from reir_serving.ray import environment

READY, MESSAGE, FAILED, MISSING_PACKAGE = "ready", "message", "failed", "missing-package"
"""Kinds of status messages. Their texts are: for `READY`, the address, sent once all replicas are
ready; for `MESSAGE`, a message for the user; for `FAILED`, why the server could not start; for
`MISSING_PACKAGE`, which package is not installed."""


def main(arguments: list[str]) -> int:
    """Serve until standard input ends; return the exit status."""
    folder, descriptor = arguments
    # Line buffering, because the parent process waits for each message.
    with os.fdopen(int(descriptor), "w", buffering=1, encoding="utf-8") as status:
        try:
            config = ServeConfig.model_validate_json(sys.stdin.readline())
            _serve(config, Path(folder), sys.stdin, status)
        except ReirError as error:
            _send(status, FAILED, str(error))
            return 1
        except ModuleNotFoundError as error:
            _send(status, MISSING_PACKAGE, str(error))
            return 1
    return 0


def _serve(config: ServeConfig, folder: Path, updates: Iterable[str], status: TextIO) -> None:
    """Serve until there are no more updates of the live settings, which is when stdin ends."""
    environment.apply(folder)
    from reir_serving.ray.lifecycle import reconfigure, serving  # imports Ray

    with serving(config, folder) as address:
        _send(status, READY, address)
        for update in updates:
            reconfigure(config, LiveSettings.model_validate_json(update))
            _send(status, MESSAGE, "reloaded the live settings")


def _send(status: TextIO, kind: str, text: str) -> None:
    status.write(json.dumps([kind, text]) + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
