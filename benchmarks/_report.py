"""Saves the figures of a benchmark to `benchmarks/results/<name>.json`, with their origin.

A report names the command, the commit, the date and the kind of machine, but no host name and no
path outside the repository. It is refused if tracked source has uncommitted changes, because the
commit would not be the code that ran; `REIR_ALLOW_DIRTY=1` overrides this.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
UNKNOWN = "unknown"
DIRTY = "+dirty"
ALLOW_DIRTY = "REIR_ALLOW_DIRTY"


def write_report(name: str, figures: Mapping[str, Any], *, accelerator: str | None = None) -> Path:
    """Write `figures` to `results/<name>.json` and return its path.

    Args:
        name: name of the file, for example "metrics_scale".
        figures: JSON values under dotted keys, for example {"metrics.seconds": 12.5}.
        accelerator: GPU that was used, for example "NVIDIA H100"; None for CPU only.

    Raises:
        SystemExit: tracked source has uncommitted changes, and `REIR_ALLOW_DIRTY` is not 1.
        TypeError: a figure is not a JSON value.
        ValueError: a figure is NaN or infinite, so that JSON cannot hold it.
    """
    measured = commit()
    if measured.endswith(DIRTY) and os.environ.get(ALLOW_DIRTY) != "1":
        raise SystemExit(
            f"results/{name}.json not written: tracked source differs from commit "
            f"{measured.removesuffix(DIRTY)}, so the figures could not be reproduced; commit the "
            f"changes first, or set {ALLOW_DIRTY}=1 to keep the figures, marked {DIRTY}"
        )
    report = {
        "command": command_line(),
        "commit": measured,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine() | ({"accelerator": accelerator} if accelerator else {}),
        "figures": dict(figures),
    }
    text = json.dumps(report, indent=2, allow_nan=False)
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(text + "\n", encoding="utf-8")
    return path


def command_line() -> str:
    """Return the command of this process as one would type it in the repository root."""
    script = Path(sys.argv[0])
    if script.is_absolute():
        resolved = script.resolve()
        script = resolved.relative_to(ROOT) if resolved.is_relative_to(ROOT) else Path(script.name)
    return " ".join(["python", script.as_posix(), *map(_without_root, sys.argv[1:])])


def _without_root(argument: str) -> str:
    """Replace an absolute path in an argument by one relative to the root, or by its last part."""
    flag, equals, value = argument.rpartition("=")
    path = Path(value)
    if not path.is_absolute():
        return argument
    resolved = path.resolve()
    inside = resolved.relative_to(ROOT) if resolved.is_relative_to(ROOT) else Path(path.name)
    return f"{flag}{equals}{inside.as_posix()}"


def commit() -> str:
    """Return the checked-out commit, followed by `DIRTY` if tracked source differs from it."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        # Results are no source: one benchmark must not keep the next one from saving its figures.
        changes = _git(
            "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results"
        )
    except (OSError, subprocess.CalledProcessError):
        return UNKNOWN
    return head + DIRTY if changes else head


def _git(*arguments: str) -> str:
    run = subprocess.run(
        ["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True, timeout=30
    )
    return run.stdout.strip()


def machine() -> dict[str, str | int | float]:
    """Return the CPU model, the cores that this process may use, and the memory in GiB."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "ram_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": ".".join(map(str, sys.version_info[:3])),
    }


def _cpu_model() -> str:
    """Return the name of the CPU model from `/proc/cpuinfo`."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return UNKNOWN
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else UNKNOWN
