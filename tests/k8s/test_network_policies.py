"""The NetworkPolicies close what is dangerous, and open what the platform needs."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from reir_k8s.manifests import Manifest, pod_templates
from reir_testing.k8s import NEEDS_KUBECTL
from reir_testing.k8s.network_policies import Pod, is_allowed

pytestmark = NEEDS_KUBECTL

NAMESPACE = "reir"
DASHBOARD, RAY_CLIENT, HAPROXY_STATS, HAPROXY_METRICS = 8265, 10001, 8404, 9101
MILVUS, MILVUS_MANAGEMENT = 19530, 9091

MILVUS_POD = Pod(
    "milvus",
    NAMESPACE,
    {"app.kubernetes.io/instance": "reir", "app.kubernetes.io/name": "milvus"},
)
ETCD = Pod("etcd", NAMESPACE, {"app.kubernetes.io/instance": "reir-etcd"})
MINIO = Pod("minio", NAMESPACE, {"app": "minio", "release": "reir-minio"})
CLEANUP = Pod(
    "redis-cleanup",
    NAMESPACE,
    {"app.kubernetes.io/component": "serve", "ray.io/node-type": "redis-cleanup"},
)
GATEWAY = Pod(
    "gateway", NAMESPACE, {"gateway.networking.k8s.io/gateway-name": "reir-serve-gateway"}
)
KUBERAY = Pod("KubeRay", "kuberay-operator", {"app.kubernetes.io/name": "kuberay-operator"})
MILVUS_OPERATOR = Pod("Milvus operator", "milvus-operator", {})
PROMETHEUS = Pod("Prometheus", "monitoring", {"app.kubernetes.io/name": "prometheus"})
GRAFANA = Pod("Grafana", "monitoring", {"app.kubernetes.io/name": "grafana"})
CLIENT = Pod("client", "shop", {}, {"reir.io/client": "true"})
STRANGER = Pod("stranger", "shop", {})
FOREIGN = Pod("foreign pod in the namespace", NAMESPACE, {"app": "anything"})
OTHERS = (
    *(MILVUS_POD, ETCD, MINIO, CLEANUP, KUBERAY, MILVUS_OPERATOR),
    *(PROMETHEUS, GRAFANA, CLIENT, STRANGER, FOREIGN),
)


def own_pods(manifests: Sequence[Manifest]) -> dict[str, Pod]:
    """Return the pods of the manifests by what they are: "serve head", "submitter" ..."""
    found = {}
    for template in pod_templates(manifests):
        component = template.labels["app.kubernetes.io/component"]
        name = f"{component} {template.labels.get('ray.io/node-type', '')}".strip()
        found[name] = Pod(name, NAMESPACE, template.labels)
    return found


def connections(
    manifests: Sequence[Manifest], targets: list[Pod], port: int
) -> set[tuple[str, str]]:
    """Return which pods may connect to a port of which pods, by their names."""
    policies = [each for each in manifests if each["kind"] == "NetworkPolicy"]
    sources = [*own_pods(manifests).values(), *OTHERS]
    return {
        (source.name, target.name)
        for source in sources
        for target in targets
        if is_allowed(policies, source, target, port)
    }


def test_only_kuberay_and_submitters_reach_the_dashboard(manifests: Sequence[Manifest]) -> None:
    targets = [*own_pods(manifests).values(), MILVUS_POD, ETCD, MINIO]
    heads = {"serve head", "index head", "train head"}
    assert connections(manifests, targets, DASHBOARD) == {
        *((KUBERAY.name, head) for head in heads),
        ("submitter", "index head"),
        ("submitter", "train head"),
        # Milvus uses any port among its own pods.
        (MILVUS_POD.name, MILVUS_POD.name),
    }


@pytest.mark.parametrize("port", [RAY_CLIENT, HAPROXY_STATS, HAPROXY_METRICS])
def test_ports_that_run_code_or_show_statistics_are_closed(
    manifests: Sequence[Manifest], port: int
) -> None:
    pods = own_pods(manifests)
    # Of HAProxy, only the serving cluster has one; the others may use these ports for Ray.
    targets = [pod for name, pod in pods.items() if port == RAY_CLIENT or name.startswith("serve")]
    assert connections(manifests, targets, port) == set()


def test_the_management_of_milvus_is_for_prometheus_only(manifests: Sequence[Manifest]) -> None:
    assert connections(manifests, [MILVUS_POD], MILVUS_MANAGEMENT) == {
        (PROMETHEUS.name, MILVUS_POD.name)
    }


def test_the_store_admits_the_platform(manifests: Sequence[Manifest]) -> None:
    users = {source for source, _ in connections(manifests, [MILVUS_POD], MILVUS)}
    assert users == {
        *("serve head", "serve worker", "index head", "index worker", "monitor", "backup"),
        *(MILVUS_POD.name,),
    }
    assert connections(manifests, [ETCD], 2379) == {
        (source.name, ETCD.name) for source in (MILVUS_POD, ETCD, MILVUS_OPERATOR)
    }
    assert connections(manifests, [MINIO], 9000) == {
        (source.name, MINIO.name) for source in (MILVUS_POD, MINIO, MILVUS_OPERATOR)
    }


def test_redis_admits_heads_of_serving(manifests: Sequence[Manifest]) -> None:
    redis = own_pods(manifests)["redis"]
    users = {source for source, _ in connections(manifests, [redis], 6379)}
    assert users == {"serve head", CLEANUP.name}


@pytest.mark.parametrize("port", [6379, 8076, 20_000, 30_000, 52_365])
def test_pods_of_a_ray_cluster_reach_each_other(manifests: Sequence[Manifest], port: int) -> None:
    pods = own_pods(manifests)
    for cluster in ("serve", "index", "train"):
        names = {f"{cluster} head", f"{cluster} worker"}
        found = connections(manifests, [pods[name] for name in names], port)
        own = {(source, target) for source, target in found if source in names}
        assert own == {(source, target) for source in names for target in names}
        allowed = names | ({CLEANUP.name} if cluster == "serve" else set())
        assert {source for source, _ in found} <= allowed


def test_prometheus_scrapes(manifests: Sequence[Manifest]) -> None:
    pods = own_pods(manifests)
    policies = [each for each in manifests if each["kind"] == "NetworkPolicy"]
    wanted = [("serve worker", 9465), ("monitor", 9464), ("index head", 9468)]
    wanted += [(name, 8080) for name in pods if name.split()[-1] in ("head", "worker")]
    for name, port in wanted:
        assert is_allowed(policies, PROMETHEUS, pods[name], port), (name, port)
        assert not is_allowed(policies, GRAFANA, pods[name], port), (name, port)
        assert not is_allowed(policies, STRANGER, pods[name], port), (name, port)


def test_clients_reach_the_service_and_strangers_do_not(manifests: Sequence[Manifest]) -> None:
    worker = own_pods(manifests)["serve worker"]
    policies = [each for each in manifests if each["kind"] == "NetworkPolicy"]
    assert is_allowed(policies, CLIENT, worker, 8000)
    assert not is_allowed(policies, STRANGER, worker, 8000)
    has_gateway = any(each["metadata"]["name"] == "gateway" for each in policies)
    assert is_allowed(policies, GATEWAY, worker, 8000) == has_gateway
    assert is_allowed(policies, STRANGER, GATEWAY, 80) == has_gateway


def test_pods_reach_buckets_and_nothing_else_outside(manifests: Sequence[Manifest]) -> None:
    bucket = Pod("bucket", "outside", {})
    policies = [each for each in manifests if each["kind"] == "NetworkPolicy"]
    for pod in own_pods(manifests).values():
        assert is_allowed(policies, pod, bucket, 443), pod.name
        assert not is_allowed(policies, pod, bucket, 80), pod.name
        assert not is_allowed(policies, pod, bucket, 22), pod.name
