"""Access log and audit log: one JSON line a request, one a write. Never an expression.

Both are Python loggers, `reir_serving.access` and `reir_serving.audit`, so that who runs the server
decides where they go; `open_logs` is what `reir serve` does.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ACCESS = logging.getLogger("reir_serving.access")
AUDIT = logging.getLogger("reir_serving.audit")


def open_logs(path: Path | None) -> None:
    """Write the lines to a file, None being standard error; calling it again changes the place."""
    handler = logging.FileHandler(path) if path else logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    for log in (ACCESS, AUDIT):
        for old in list(log.handlers):
            log.removeHandler(old)
            old.close()
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        log.propagate = False


def log_line(log: logging.Logger, **values: Any) -> None:
    """Write one line, if anybody reads this log."""
    if log.isEnabledFor(logging.INFO):
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        log.info("%s", json.dumps({"time": now, "log": log.name.rpartition(".")[2], **values}))
