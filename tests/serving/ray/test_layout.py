"""The layout of the deployments on a machine, and the CPUs that Ray is given."""

from __future__ import annotations

import pytest

from reir_serving.config import Layout, Replicas, ServeConfig
from reir_serving.ray.deployments import layout_of
from reir_serving.ray.lifecycle import num_cpus


@pytest.mark.parametrize(
    ("resources", "expected"),
    [({"CPU": 2}, "fused"), ({"CPU": 8}, "split"), ({"CPU": 2, "GPU": 1}, "split")],
    ids=["laptop", "server", "gpu"],
)
def test_auto_is_fused_on_small_machines(resources: dict[str, float], expected: Layout) -> None:
    assert layout_of(ServeConfig(), resources) == expected


@pytest.mark.parametrize("layout", ["fused", "split"])
def test_an_explicit_layout_is_used_on_any_machine(layout: Layout) -> None:
    assert layout_of(ServeConfig(layout=layout), {"CPU": 64, "GPU": 8}) == layout


def test_ray_gets_enough_cpus_for_all_replicas() -> None:
    many = ServeConfig(ingress=Replicas(min_replicas=1, max_replicas=200))
    assert num_cpus(many) >= 200 * many.ingress.num_cpus
