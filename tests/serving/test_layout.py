"""Which deployments there are on which machines, and what Ray is told of this one."""

from __future__ import annotations

import pytest

from reir_serving.config import Layout, Replicas, ServeConfig
from reir_serving.deployments import layout_of
from reir_serving.jobs import num_cpus


@pytest.mark.parametrize(
    ("resources", "expected"),
    [({"CPU": 2}, "fused"), ({"CPU": 8}, "split"), ({"CPU": 2, "GPU": 1}, "split")],
    ids=["laptop", "server", "gpu"],
)
def test_small_machines_fuse(resources: dict[str, float], expected: Layout) -> None:
    assert layout_of(ServeConfig(), resources) == expected


@pytest.mark.parametrize("layout", ["fused", "split"])
def test_a_layout_that_is_named_is_taken(layout: Layout) -> None:
    assert layout_of(ServeConfig(layout=layout), {"CPU": 64, "GPU": 8}) == layout


def test_ray_is_told_of_as_many_cpus_as_replicas_need() -> None:
    many = ServeConfig(ingress=Replicas(least=1, most=200))
    assert num_cpus(many) >= 200 * many.ingress.num_cpus
