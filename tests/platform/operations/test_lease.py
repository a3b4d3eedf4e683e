"""A lease has one holder, whatever happens to the processes that want it."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from reir.errors import JobRunning, LeaseLost
from reir.operations import lease
from reir.operations.lease import KIND, Claim, hold_lease, holder_of
from reir.store import InstanceStore, open_store
from reir.store.memory import MemoryStore

JOB = "reindex/photos"


@pytest.fixture(params=["memory", "embedded"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[InstanceStore]:
    location = "memory:" if request.param == "memory" else str(tmp_path / "store")
    with closing(open_store(location)) as opened:
        yield opened


def claim_of(store: InstanceStore) -> Claim:
    (values,) = store.find_documents(KIND, JOB).values()
    return Claim(**values)


def write(store: InstanceStore, claim: Claim) -> None:
    store.put_document(KIND, f"{JOB}/{claim.claim_id}", asdict(claim))


def test_a_second_process_is_refused_until_the_first_has_ended(store: InstanceStore) -> None:
    with hold_lease(store, JOB), pytest.raises(JobRunning) as refused, hold_lease(store, JOB):
        pass
    assert f"process {os.getpid()} on" in str(refused.value)
    assert str(pickle.loads(pickle.dumps(refused.value))) == str(refused.value)
    with hold_lease(store, JOB):  # the refused one has left no claim
        assert holder_of(store, JOB) == claim_of(store)
    assert holder_of(store, JOB) is None
    assert store.find_documents(KIND) == {}


def test_other_jobs_are_not_affected(store: InstanceStore) -> None:
    with hold_lease(store, JOB), hold_lease(store, "reindex/photos2"), hold_lease(store, "backup"):
        pass


def test_the_claim_of_a_killed_process_is_void_at_once(tmp_path: Path) -> None:
    script = (
        "import time; from reir.store import open_store; "
        "from reir.operations.lease import hold_lease\n"
        f"with hold_lease(open_store({str(tmp_path)!r}), {JOB!r}):\n"
        "    print('held', flush=True); time.sleep(60)"
    )
    with (
        closing(open_store(str(tmp_path))) as store,
        subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process,
    ):
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(JobRunning, match=f"process {process.pid} "), hold_lease(store, JOB):
            pass
        process.kill()
        process.wait()
        with hold_lease(store, JOB):
            assert claim_of(store).pid == os.getpid()


def test_a_process_id_that_was_used_again_is_not_the_holder(store: InstanceStore) -> None:
    with hold_lease(store, JOB):
        ours = claim_of(store)
    write(store, replace(ours, process_start="1"))
    with hold_lease(store, JOB):
        assert claim_of(store).process_start == ours.process_start


@pytest.mark.parametrize(("age_s", "is_held"), [(1.0, True), (lease.EXPIRY_S + 1, False)])
def test_another_machine_has_to_renew_its_claim(
    store: InstanceStore, age_s: float, is_held: bool
) -> None:
    with hold_lease(store, JOB):
        ours = claim_of(store)
    elsewhere = replace(ours, machine="another", host="far", renewed_s=time.time() - age_s)
    write(store, elsewhere)
    assert (holder_of(store, JOB) is not None) is is_held
    if is_held:
        with pytest.raises(JobRunning, match="on far"), hold_lease(store, JOB):
            pass
    else:
        with hold_lease(store, JOB):
            assert claim_of(store).machine == ours.machine


def test_a_holder_that_was_replaced_notices(store: InstanceStore) -> None:
    with hold_lease(store, JOB) as held:
        held.check()
        store.delete_documents(KIND, [f"{JOB}/{claim_of(store).claim_id}"])
        held.renew()  # must not bring the claim back
        with pytest.raises(LeaseLost, match=f"taken over {JOB}"):
            held.check()


def test_claims_are_renewed(store: InstanceStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEWAL_S", 0.01)
    with hold_lease(store, JOB):
        first_s = claim_of(store).renewed_s
        deadline_s = time.monotonic() + 20
        while claim_of(store).renewed_s == first_s:
            assert time.monotonic() < deadline_s
            time.sleep(0.01)


def test_many_that_want_it_at_once_never_hold_it_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pauses between attempts are short here, so that claims meet often."""
    monkeypatch.setattr(lease, "_LONGEST_PAUSE_S", 0.002)
    store, holders, overlaps, successes = MemoryStore(), [0], [0], [0]
    gate = threading.Barrier(6)

    def work() -> None:
        gate.wait()
        for _ in range(60):
            try:
                with hold_lease(store, JOB):
                    holders[0] += 1
                    overlaps[0] += holders[0] > 1
                    time.sleep(0.0002)
                    holders[0] -= 1
                    successes[0] += 1
            except JobRunning:
                continue

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert overlaps == [0]
    assert successes[0] > 10
