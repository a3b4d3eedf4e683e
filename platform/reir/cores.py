"""The number of CPUs that this process may use."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def num_cores() -> int:
    """Return the number of CPUs by affinity and by the quota of the container, at least 1."""
    # macOS has no affinity. Where there is one, `os.cpu_count` would ignore it.
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    # The quota file is missing outside a cgroup, and says "max" where there is no quota. A quota of
    # one and a half CPUs counts as two.
    with suppress(OSError, ValueError):
        quota, period = map(int, CPU_QUOTA.read_text().split())
        return max(1, min(allowed or 1, -(-quota // period)))
    return allowed or 1
