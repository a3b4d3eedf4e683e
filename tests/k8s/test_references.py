"""Whatever one object names exists in another one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from reir_k8s.manifests import (
    NODE_TYPE,
    Manifest,
    PodTemplate,
    named,
    pod_templates,
    render,
    secrets_of,
)
from reir_testing.k8s import NEEDS_KUBECTL
from reir_testing.k8s.network_policies import matches

pytestmark = NEEDS_KUBECTL

DOCS = Path(__file__).parents[2] / "docs" / "kubernetes.md"
OF_OPERATORS = (
    {
        "app.kubernetes.io/instance": "reir",
        "app.kubernetes.io/name": "milvus",
        "app.kubernetes.io/part-of": "reir-store",
    },
    {"app.kubernetes.io/instance": "reir-etcd"},
    {"app": "minio", "release": "reir-minio"},
    {"gateway.networking.k8s.io/gateway-name": "reir-serve-gateway"},
)
"""Labels of pods that operators make; the first include the `podLabels` of the Milvus object."""


def names(manifests: Sequence[Manifest], kind: str) -> set[str]:
    return {each["metadata"]["name"] for each in manifests if each["kind"] == kind}


def documented_secrets() -> dict[str, set[str]]:
    """Return the keys of each secret that docs/kubernetes.md tells the operator to create."""
    rows = re.findall(
        r"^\| `(reir-[a-z-]+)` \| ((?:`\w[\w.]*`(?:, )?)+) \|", DOCS.read_text(), re.M
    )
    return {name: set(re.findall(r"`([^`]+)`", keys)) for name, keys in rows}


def references(value: Any, key: str) -> Iterator[Any]:
    """Yield the value of a key wherever it occurs below a value."""
    if isinstance(value, dict):
        for name, below in value.items():
            if name == key:
                yield below
            yield from references(below, key)
    elif isinstance(value, list | tuple):
        for below in value:
            yield from references(below, key)


def test_config_maps_exist_and_are_used(manifests: Sequence[Manifest]) -> None:
    used = {each["name"] for each in references(manifests, "configMapRef")}
    used |= {each["name"] for each in references(manifests, "configMap")}
    dashboards = {
        each["metadata"]["name"]
        for each in manifests
        if "grafana_dashboard" in each["metadata"].get("labels", {})
    }
    assert len(dashboards) == 5
    assert used == names(manifests, "ConfigMap") - dashboards


def test_every_dashboard_is_a_config_map(manifests: Sequence[Manifest]) -> None:
    folder = DOCS.parents[1] / "k8s" / "monitoring" / "dashboards"
    held = {
        file
        for each in manifests
        if each["kind"] == "ConfigMap"
        for file in each["data"]
        if file.endswith(".json")
    }
    assert held == {file.name for file in folder.glob("*.json")}


def test_secrets_are_documented_with_their_keys(manifests: Sequence[Manifest]) -> None:
    documented = documented_secrets()
    assert names(manifests, "Secret") == set(), "no secret is in the repository"
    used = {each["secretName"] for each in references(manifests, "secret")}
    used |= {each["name"] for each in references(manifests, "secretRef") if isinstance(each, dict)}
    used |= {each for each in references(manifests, "secretRef") if isinstance(each, str)}
    for each in references(manifests, "secretKeyRef"):
        assert each["key"] in documented[each["name"]], each
        used.add(each["name"])
    assert used <= set(documented)
    if manifests is not render("dev"):
        assert used == set(documented)
    settings = named(manifests, "RayService", "reir-serve")["spec"]["serveConfigV2"]
    assert "/etc/reir/keys/" + "".join(documented["reir-api-keys"]) in settings


def test_pods_that_read_photos_can_read_the_bucket(manifests: Sequence[Manifest]) -> None:
    """All pods of the jobs that index, and of the service: it shows photos and looks into them."""
    readers = ("RayService/reir-serve", "RayJob/reir-index", "RayCronJob/reir-re")
    pods = [
        each
        for each in pod_templates(manifests)
        if each.owner.startswith(readers) and NODE_TYPE in each.labels
    ]
    assert len(pods) == 2 * 4
    for each in pods:
        assert "reir-bucket" in secrets_of(each), each.owner


def test_service_accounts_exist(manifests: Sequence[Manifest]) -> None:
    used = {each.spec["serviceAccountName"] for each in pod_templates(manifests)}
    assert used == names(manifests, "ServiceAccount")


def test_only_the_head_that_scales_has_a_token(manifests: Sequence[Manifest]) -> None:
    holders = [
        each.owner for each in pod_templates(manifests) if each.spec["automountServiceAccountToken"]
    ]
    assert holders == ["RayService/reir-serve head"]
    scaling = [each for each in references(manifests, "enableInTreeAutoscaling") if each]
    assert len(scaling) == 1


def test_claims_exist(manifests: Sequence[Manifest]) -> None:
    used = {each["claimName"] for each in references(manifests, "persistentVolumeClaim")}
    assert used == names(manifests, "PersistentVolumeClaim")


def test_volumes_are_mounted_and_mounts_have_volumes(manifests: Sequence[Manifest]) -> None:
    extra = {"StatefulSet/reir-redis": {"data"}}  # from `volumeClaimTemplates`
    for template in pod_templates(manifests):
        volumes = {each["name"] for each in template.spec.get("volumes", ())}
        mounted = {
            mount["name"] for each in template.containers for mount in each.get("volumeMounts", ())
        }
        assert mounted == volumes | extra.get(template.owner, set()), template.owner


def test_keys_of_mounted_config_maps_exist(manifests: Sequence[Manifest]) -> None:
    for template in pod_templates(manifests):
        sources = {
            each["name"]: each["configMap"]["name"]
            for each in template.spec.get("volumes", ())
            if "configMap" in each
        }
        for container in template.containers:
            for mount in container.get("volumeMounts", ()):
                if "subPath" in mount:
                    config = named(manifests, "ConfigMap", sources[mount["name"]])
                    assert mount["subPath"] in config["data"]


def test_selectors_select_pods(manifests: Sequence[Manifest]) -> None:
    labels = [each.labels for each in pod_templates(manifests)]
    labels += OF_OPERATORS
    everything = references(manifests, "podSelector")
    for each in manifests:
        if each["kind"] in ("PodDisruptionBudget", "PodMonitor", "Deployment", "StatefulSet"):
            everything = iter([*everything, each["spec"]["selector"]])
    spread = references(manifests, "topologySpreadConstraints")
    inside = [each["labelSelector"] for constraints in spread for each in constraints]
    # Pods in other namespaces, and pods whose labels their operator chooses.
    outside = re.compile("kuberay-operator|prometheus|querynode")
    for selector in [*everything, *inside]:
        if not outside.search(str(selector)):
            assert any(matches(selector, each) for each in labels), selector


def test_ports_have_names_that_pods_declare(manifests: Sequence[Manifest]) -> None:
    templates = list(pod_templates(manifests))
    for each in manifests:
        if each["kind"] == "PodMonitor":
            selected = [it for it in templates if matches(each["spec"]["selector"], it.labels)]
            assert selected
            for endpoint in each["spec"]["podMetricsEndpoints"]:
                for template in selected:
                    assert endpoint["port"] in _ports(template), (each["metadata"], template.owner)
        if each["kind"] == "Service":
            selector = {"matchLabels": each["spec"]["selector"]}
            selected = [it for it in templates if matches(selector, it.labels)]
            assert selected
            for port in each["spec"]["ports"]:
                for template in selected:
                    assert _ports(template)[port["targetPort"]] == port["port"]
        if each["kind"] == "ServiceMonitor":
            services = [
                it
                for it in manifests
                if it["kind"] == "Service"
                and matches(each["spec"]["selector"], it["metadata"]["labels"])
            ]
            assert services
            declared = {port["name"] for it in services for port in it["spec"]["ports"]}
            assert {endpoint["port"] for endpoint in each["spec"]["endpoints"]} <= declared


def _ports(template: PodTemplate) -> dict[str, int]:
    return {
        port["name"]: port["containerPort"]
        for container in template.containers
        for port in container.get("ports", ())
    }


def test_named_services_exist(manifests: Sequence[Manifest]) -> None:
    """Addresses in settings are those of Services in the manifests, or of the Milvus operator."""
    services = names(manifests, "Service") | {
        f"{name}-milvus" for name in names(manifests, "Milvus")
    }
    texts = [str(each) for each in manifests]
    used = {
        host for text in texts for host in re.findall(r"(?:http|redis)://(reir-[a-z-]+):\d+", text)
    }
    assert used == {"reir-milvus", "reir-redis"}
    assert used <= services
