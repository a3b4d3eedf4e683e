"""Starting Ray and joining a cluster, and the errors of both."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest
import ray
from ray.exceptions import NodeDiedError, RayTaskError

from reir.cli.doctor.remote import check_cluster
from reir.errors import WorkersUnavailable
from reir_ingestion.ray import cluster
from reir_ingestion.ray.cluster import IDLE_MS, start_or_join_ray, translate_ray_errors
from reir_ingestion.ray.runner import EncoderPoolOptions, fit_pool, index_on_ray
from reir_testing import FakeEncoder
from reir_testing.ingestion import write_scenes

pytestmark = [pytest.mark.ray]


@pytest.mark.parametrize(
    ("address", "options"),
    [
        (
            "",
            {
                "address": "local",
                "num_cpus": 64,
                "include_dashboard": False,
                "_system_config": {"idle_worker_killing_time_threshold_ms": IDLE_MS},
            },
        ),
        ("cluster:6379", {"address": "cluster:6379"}),
    ],
    ids=["this machine", "cluster"],
)
def test_ray_joins_only_the_cluster_that_ray_address_names(
    monkeypatch: pytest.MonkeyPatch, address: str, options: dict[str, object]
) -> None:
    class StopHereError(BaseException):
        pass

    def init(**given: object) -> None:
        assert given == options | {"log_to_driver": False}
        raise StopHereError

    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(cluster, "_check_listens", lambda _: None)
    with pytest.raises(StopHereError), start_or_join_ray(64):
        pass


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("", "could not start on this machine: no room. It needs .* --runner local"),
        ("cluster:1", "at RAY_ADDRESS cluster:1 does not answer: no room. .* unset RAY_ADDRESS"),
    ],
    ids=["this machine", "cluster"],
)
def test_the_error_says_what_to_do_when_ray_cannot_start(
    monkeypatch: pytest.MonkeyPatch, address: str, message: str
) -> None:
    def init(**_: object) -> None:
        raise RuntimeError("no room\nand a page of C++")

    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(cluster, "_check_listens", lambda _: None)
    with pytest.raises(WorkersUnavailable, match=message) as caught, start_or_join_ray(2):
        pass
    assert "C++" not in str(caught.value)


def test_a_cluster_address_that_refuses_connections_is_reported_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ray itself would retry for a quarter of an hour."""
    with socket.socket() as held:  # bound but not listening, so that no other process listens there
        held.bind(("0.0.0.0", 0))
        address = f"127.0.0.1:{held.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        monkeypatch.setattr(ray, "is_initialized", lambda: False)
        monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray was started"))
        message = f"{address} does not answer: .*refused.* unset RAY_ADDRESS"
        with pytest.raises(WorkersUnavailable, match=message), start_or_join_ray(2):
            pass


def test_an_error_of_ray_becomes_one_line() -> None:
    lost = pytest.raises(
        WorkersUnavailable,
        match=r"Ray lost a worker, a machine or data of this job: .*died\. Everything",
    )
    with lost as caught, translate_ray_errors():
        raise NodeDiedError("the node died.\nand a page of C++")
    assert "C++" not in str(caught.value)
    bug = RayTaskError("read_batch", "trace", ValueError("a bug"))
    with pytest.raises(RayTaskError), translate_ray_errors():
        raise bug


def test_doctor_counts_nodes_and_free_cpus_of_a_real_cluster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    context = ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False)
    try:
        monkeypatch.setenv("RAY_ADDRESS", context.address_info["address"])
        (found,) = check_cluster()
    finally:
        ray.shutdown()
    assert found.status == "ok", found
    assert f"1 node, 3 of 3 CPUs free; Ray {ray.__version__}" in found.detail


class Replica:
    """Another user of the cluster."""

    def ready(self) -> bool:
        """Return once the replica runs."""
        return True


@pytest.mark.timeout(120)
def test_encoders_leave_readers_room_beside_other_work_on_the_cluster(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_scenes(tmp_path / "photos", 20)
    store = str(tmp_path / "store")
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    try:
        replica = ray.remote(num_cpus=0.5)(Replica).remote()
        assert ray.get(replica.ready.remote())
        assert index_on_ray(tmp_path / "photos", "photos", store, FakeEncoder).new == 20
        assert "CPUs" not in caplog.text
        busy = [ray.remote(num_cpus=1)(Replica).remote() for _ in range(2)]
        assert all(ray.get([each.ready.remote() for each in busy]))
        # Ray tells the free resources with some delay.
        while ray.available_resources()["CPU"] != 1.5:
            time.sleep(0.1)
        assert fit_pool(EncoderPoolOptions()).max_size == 1
    finally:
        ray.shutdown()
    assert "needs 2 CPUs of the cluster" in caplog.text
    assert "1.5 are free" in caplog.text
