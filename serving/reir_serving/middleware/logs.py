"""Access log, with one line for each request, and audit log, with one line for each write.

Lines are JSON and never contain an expression. Both logs are Python loggers,
`reir_serving.access` and `reir_serving.audit`, so whoever runs the server decides where they go;
`reir serve` calls `open_logs`.
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
    """Write both logs to a file, or to standard error if `path` is None, and nowhere else."""
    handler = logging.FileHandler(path) if path else logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    for log in (ACCESS, AUDIT):
        for old in list(log.handlers):
            log.removeHandler(old)
            old.close()
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        log.propagate = False  # otherwise the root logger would write each line once more


def log_line(log: logging.Logger, **values: Any) -> None:
    """Write one line, unless the log is off."""
    if log.isEnabledFor(logging.INFO):
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        log.info("%s", json.dumps({"time": now, "log": log.name.rpartition(".")[2], **values}))
