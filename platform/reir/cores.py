"""How many processors this process may use."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def num_cores() -> int:
    """Return the number of processors by affinity and by the container's quota, 1 or more."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with suppress(OSError, ValueError):  # no cgroup, or no quota ("max")
        quota, period = map(int, CPU_QUOTA.read_text().split())
        return max(1, min(allowed or 1, -(-quota // period)))
    return allowed or 1
