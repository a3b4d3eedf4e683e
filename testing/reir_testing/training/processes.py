"""Runs a function in several processes that communicate, as the workers of a training do.

The module imports little, because every process imports it anew.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

# The number of threads changes how sums are rounded, so it must be the same for all workers.
THREADS = 1


def run_workers(folder: Path, job: Any, num_workers: int = 2) -> None:
    """Run `job(rank, world_size)` in processes that communicate through gloo.

    Args:
        folder: folder for the file through which the processes connect.
        job: function to run, which must be picklable.
        num_workers: number of processes.
    """
    os.environ["DS_ACCELERATOR"] = "cpu"
    # The file of an earlier call would connect the processes to workers that no longer exist.
    meeting = folder / "meeting"
    meeting.unlink(missing_ok=True)
    start_processes(  # type: ignore[no-untyped-call]
        _join, args=(num_workers, meeting, job), nprocs=num_workers, start_method="spawn"
    )


def _join(rank: int, world_size: int, meeting: Path, job: Any) -> None:
    torch.set_num_threads(THREADS)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=world_size
    )
    job(rank, world_size)
    dist.barrier()
    dist.destroy_process_group()
    # DeepSpeed keeps its groups, and with them gloo's threads. If such a thread asks for Python's
    # lock while the interpreter shuts down, the process aborts, so skip the shutdown.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
