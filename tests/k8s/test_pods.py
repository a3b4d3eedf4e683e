"""Every pod is confined, limited, probed, and runs an image of this version."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from pathlib import Path

from reir_k8s.manifests import K8S, Manifest, named, pod_templates, render
from reir_testing.k8s import NEEDS_KUBECTL

pytestmark = NEEDS_KUBECTL

ROOT = Path(__file__).parents[2]
RUN_TO_THEIR_END = ("backup", "submitter")
"""Components that need no probes: they run a command and end."""


def test_containers_are_confined(manifests: Sequence[Manifest]) -> None:
    for template in pod_templates(manifests):
        pod = template.spec["securityContext"]
        assert pod["runAsNonRoot"] is True, template.owner
        assert pod["runAsUser"] > 0, template.owner
        assert pod["seccompProfile"] == {"type": "RuntimeDefault"}, template.owner
        for container in template.containers:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "runAsNonRoot": True,
                "capabilities": {"drop": ["ALL"]},
                "seccompProfile": {"type": "RuntimeDefault"},
            }, (template.owner, container["name"])
        assert not any(template.spec.get(name) for name in ("hostNetwork", "hostPID", "hostIPC")), (
            template.owner
        )
        assert not any("hostPath" in each for each in template.spec.get("volumes", ()))


def test_containers_that_operators_add_are_confined(manifests: Sequence[Manifest]) -> None:
    cluster = named(manifests, "RayService", "reir-serve")["spec"]["rayClusterConfig"]
    head = cluster["headGroupSpec"]["template"]["spec"]["containers"][0]
    assert cluster["autoscalerOptions"]["securityContext"] == head["securityContext"]
    milvus = named(manifests, "Milvus", "reir")["spec"]["components"]
    assert milvus["runAsNonRoot"] is True
    assert milvus["securityContext"]["runAsUser"] > 0


def test_containers_have_requests_and_limits(manifests: Sequence[Manifest]) -> None:
    for template in pod_templates(manifests):
        for container in template.containers:
            resources = container["resources"]
            for name in ("cpu", "memory"):
                assert name in resources["requests"], (template.owner, container["name"])
                assert name in resources["limits"], (template.owner, container["name"])
            # Ray counts on all of its memory; less than that could be taken away.
            if "ray.io/node-type" in template.labels:
                assert resources["requests"]["memory"] == resources["limits"]["memory"]


def test_containers_have_probes(manifests: Sequence[Manifest]) -> None:
    for template in pod_templates(manifests):
        if template.labels["app.kubernetes.io/component"] in RUN_TO_THEIR_END:
            continue
        for container in template.containers:
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                assert probe in container, (template.owner, container["name"], probe)


def test_images_have_the_version_of_the_package(manifests: Sequence[Manifest]) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    stages = re.findall(r"^FROM runtime AS (\w+)$", (K8S / "Dockerfile").read_text(), re.M)
    found = set()
    for template in pod_templates(manifests):
        for container in template.containers:
            repository, _, tag = container["image"].rpartition(":")
            image = repository.rpartition("/")[2]
            if image == "redis":
                assert tag not in ("", "latest")
                continue
            assert tag.removesuffix("-gpu") == version, (template.owner, container["image"])
            found.add(image.removeprefix("reir-"))
    assert found == set(stages)


def test_writable_folders_are_volumes(manifests: Sequence[Manifest]) -> None:
    """HOME, the folder of Ray and the folders of the settings are on volumes."""
    for template in pod_templates(manifests):
        if template.labels["app.kubernetes.io/component"] == "redis":
            continue
        for container in template.containers:
            mounted = {each["mountPath"] for each in container["volumeMounts"]}
            assert "/tmp" in mounted, template.owner
            if template.labels["app.kubernetes.io/component"] != "submitter":
                assert "/var/lib/reir" in mounted, template.owner


def test_ray_is_the_version_of_the_constraints(manifests: Sequence[Manifest]) -> None:
    constraints = (ROOT / "constraints.txt").read_text()
    expected = re.search(r"^ray==(\S+)$", constraints, re.M)
    assert expected is not None
    versions = set(re.findall(r"'rayVersion': '([^']+)'", str(manifests)))
    assert versions == {expected[1]}


def test_gpus_are_only_in_their_overlay() -> None:
    assert "nvidia.com/gpu" not in str(render("prod"))
    with_gpu = [
        each.owner
        for each in pod_templates(render("prod-gpu"))
        if any("nvidia.com/gpu" in it["resources"]["limits"] for it in each.containers)
    ]
    assert with_gpu == [
        "RayCronJob/reir-refresh encoders",
        "RayCronJob/reir-reindex encoders",
        "RayJob/reir-index encoders",
        "RayJob/reir-train trainers",
        "RayService/reir-serve replicas",
    ]
