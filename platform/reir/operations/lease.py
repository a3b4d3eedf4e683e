"""A lease on a job: of all processes that use a store, at most one does the job at a time.

Milvus has no locks. So each process that wants a job first writes a claim, and then reads all
claims. A read sees every write that returned before it: of two processes that do this at the same
time, at least one sees the claim of the other, and whoever sees one withdraws its own. A claim
counts as long as its process lives. On the same machine that can be looked up; on another one, the
process has to renew its claim.
"""

from __future__ import annotations

import os
import random
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from reir.errors import JobRunning, LeaseLost, StoreError
from reir.store.contract import InstanceStore

KIND = "lease"
RENEWAL_S = 10.0
EXPIRY_S = 60.0
"""A claim of another machine that was not renewed for so long is void. Six renewals fit in, so that
a busy store or a clock that differs by some seconds does not end a job."""

_ATTEMPTS = 4
_LONGEST_PAUSE_S = 0.5
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_PID_NAMESPACE = Path("/proc/self/ns/pid")


@dataclass(frozen=True, kw_only=True)
class Claim:
    """The claim of one process to a job.

    Attributes:
        claim_id: unique.
        host: name of the machine, for people.
        machine: identifies the machine and, in a container, its process ids.
        pid: process id.
        process_start: start time of the process, since process ids are used again.
        since_s: Unix time of the claim.
        renewed_s: Unix time of its last renewal.
    """

    claim_id: str
    host: str
    machine: str
    pid: int
    process_start: str
    since_s: float
    renewed_s: float

    def is_held(self) -> bool:
        """Whether the process may still do the job."""
        if self.machine == _machine():
            return _process_start(self.pid) == self.process_start
        return time.time() - self.renewed_s < EXPIRY_S


class Lease:
    """A lease that this process holds."""

    def __init__(self, store: InstanceStore, job: str, claim: Claim) -> None:
        """Use `hold_lease` instead."""
        self._store, self._job, self._claim = store, job, claim

    def check(self) -> None:
        """Raise `LeaseLost` if another process has taken the job over.

        That happens to a process that stood still for longer than `EXPIRY_S`. Call this before
        steps that must not happen twice.
        """
        if self._claim.claim_id not in _claims(self._store, self._job):
            raise LeaseLost(
                f"another process has taken over {self._job}, because this one did not renew its "
                f"lease for {EXPIRY_S:g} s; it stops here, and nothing is lost"
            )

    def renew(self) -> None:
        """Renew the claim, unless it was removed by another process."""
        if self._claim.claim_id in _claims(self._store, self._job):
            self._claim = replace(self._claim, renewed_s=time.time())
            _write(self._store, self._job, self._claim)


@contextmanager
def hold_lease(store: InstanceStore, job: str) -> Iterator[Lease]:
    """Hold the lease on a job during a block.

    Args:
        store: the store that all processes use.
        job: name of the job, e.g. "reindex/photos".

    Raises:
        JobRunning: another process holds it; the message says which.
    """
    claim = _acquire(store, job)
    lease, stop = Lease(store, job, claim), threading.Event()

    def renew() -> None:
        while not stop.wait(RENEWAL_S):
            with suppress(StoreError):  # the next renewal may succeed
                lease.renew()

    thread = threading.Thread(target=renew, name="reir-lease", daemon=True)
    thread.start()
    try:
        yield lease
    finally:
        stop.set()
        thread.join()
        # Without this, the claim is void as soon as this process ends, or expires.
        with suppress(StoreError):
            _delete(store, job, claim.claim_id)


def holder_of(store: InstanceStore, job: str) -> Claim | None:
    """Return the claim of the process that does a job now; None if there is none."""
    held = [claim for claim in _claims(store, job).values() if claim.is_held()]
    return min(held, key=lambda claim: claim.since_s, default=None)


def _acquire(store: InstanceStore, job: str) -> Claim:
    for attempt in range(_ATTEMPTS):
        if attempt:
            # Two processes that withdrew at the same time must not try again at the same time.
            time.sleep(random.uniform(0, _LONGEST_PAUSE_S))
        claim = _new_claim()
        _write(store, job, claim)
        others = [each for each in _claims(store, job).values() if each.claim_id != claim.claim_id]
        held = [each for each in others if each.is_held()]
        if not held:
            for each in others:  # of processes that were killed
                _delete(store, job, each.claim_id)
            return claim
        _delete(store, job, claim.claim_id)
    first = min(held, key=lambda each: each.since_s)
    raise JobRunning(job, first.host, first.pid, first.since_s)


def _new_claim() -> Claim:
    now_s = time.time()
    return Claim(
        claim_id=uuid.uuid4().hex,
        host=socket.gethostname(),
        machine=_machine(),
        pid=os.getpid(),
        process_start=_process_start(os.getpid()),
        since_s=now_s,
        renewed_s=now_s,
    )


def _machine() -> str:
    """Identify the machine, and the namespace in which its process ids are valid."""
    try:
        namespace = os.readlink(_PID_NAMESPACE)
        return f"{_BOOT_ID.read_text().strip()} {namespace} {socket.gethostname()}"
    except OSError:
        # Not Linux. Claims are then judged by their renewal alone.
        return uuid.uuid4().hex


def _process_start(pid: int) -> str:
    """Start time of a process in clock ticks since the boot; empty if there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    # The second field, the name of the program, is in parentheses and may contain spaces.
    state, *fields = text.rpartition(")")[2].split()
    # A zombie does nothing any more; its parent just has not noticed its end yet.
    return "" if state in "ZX" else fields[18]


def _claims(store: InstanceStore, job: str) -> dict[str, Claim]:
    found = store.find_documents(KIND, f"{job}/")
    claims = (_claim(values) for values in found.values())
    return {claim.claim_id: claim for claim in claims}


def _claim(values: Mapping[str, Any]) -> Claim:
    return Claim(**values)


def _write(store: InstanceStore, job: str, claim: Claim) -> None:
    store.put_document(KIND, f"{job}/{claim.claim_id}", asdict(claim))


def _delete(store: InstanceStore, job: str, claim_id: str) -> None:
    store.delete_documents(KIND, [f"{job}/{claim_id}"])
