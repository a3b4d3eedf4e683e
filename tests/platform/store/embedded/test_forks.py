"""A process with an open store can start programs by fork and exec, as Ray does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

FORKING = """
import sys, os
from reir.store import open_store
store = open_store(sys.argv[1])
store.galleries()
for _ in range(5):
    child = os.fork()
    if child == 0:
        os._exit(len(os.listdir("/proc/self/task")))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
store.close()
"""


def test_no_thread_of_grpc_starts_in_a_forked_child(tmp_path: Path) -> None:
    """Such a thread finds its files closed before the child's exec, and aborts the child."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GRPC_")}
    run = subprocess.run(
        [sys.executable, "-c", FORKING, str(tmp_path / "store")],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
        check=True,
    )
    assert run.stdout.split() == ["1"] * 5
