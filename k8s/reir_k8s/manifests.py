"""Reads the manifests as `kubectl apply -k` would send them, and finds the pods in them."""

from __future__ import annotations

import functools
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from reir.errors import ReirError

K8S = Path(__file__).parents[1]
OVERLAYS = ("dev", "prod", "prod-gpu")

Manifest = Mapping[str, Any]

_POD_TEMPLATES = {
    "Deployment": ("spec.template",),
    "StatefulSet": ("spec.template",),
    "CronJob": ("spec.jobTemplate.spec.template",),
    "RayService": ("spec.rayClusterConfig",),
    "RayJob": ("spec.rayClusterSpec", "spec.submitterPodTemplate"),
    "RayCronJob": ("spec.jobTemplate.rayClusterSpec", "spec.jobTemplate.submitterPodTemplate"),
}
"""Kind -> where it has pod templates, or the specification of a Ray cluster."""

HEAD, WORKER = "head", "worker"
NODE_TYPE = "ray.io/node-type"
"""Label that KubeRay gives to the pods of a Ray cluster; its values are `HEAD` and `WORKER`."""


@dataclass(frozen=True)
class PodTemplate:
    """A pod template of a manifest.

    Attributes:
        owner: kind and name of the manifest, and the group of pods for Ray.
        labels: labels of the pods, including those that KubeRay adds.
        spec: specification of the pod.
    """

    owner: str
    labels: Mapping[str, str]
    spec: Mapping[str, Any]

    @property
    def containers(self) -> Sequence[Mapping[str, Any]]:
        """All containers, also those that run before the others."""
        return [*self.spec.get("initContainers", ()), *self.spec["containers"]]


@functools.cache
def render(overlay: str) -> Sequence[Manifest]:
    """Return the manifests of an overlay, which the caller must not change.

    Raises:
        ReirError: kubectl is missing, or kustomize rejects the overlay.
    """
    if shutil.which("kubectl") is None:
        raise ReirError("kubectl is not installed; its command `kubectl kustomize` is needed")
    folder = K8S / "overlays" / overlay
    found = subprocess.run(
        ["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=False
    )
    if found.returncode:
        raise ReirError(f"kustomize rejects {folder}: {found.stderr.strip()}")
    # Documents without content are None.
    return tuple(each for each in yaml.safe_load_all(found.stdout) if each)


def named(manifests: Sequence[Manifest], kind: str, name: str) -> Manifest:
    """Return the manifest of a kind with a name.

    Raises:
        LookupError: there is none.
    """
    for each in manifests:
        if (each["kind"], each["metadata"]["name"]) == (kind, name):
            return each
    raise LookupError(f"no {kind} is named {name}")


def pod_templates(manifests: Sequence[Manifest]) -> Iterator[PodTemplate]:
    """Yield the pod templates of all manifests, in their order."""
    for each in manifests:
        owner = f"{each['kind']}/{each['metadata']['name']}"
        for path in _POD_TEMPLATES.get(each["kind"], ()):
            found: Any = each
            for key in path.split("."):
                found = found[key]
            if "headGroupSpec" in found:
                yield from _ray_pods(owner, found)
            else:
                yield PodTemplate(owner, found["metadata"]["labels"], found["spec"])


def _ray_pods(owner: str, cluster: Mapping[str, Any]) -> Iterator[PodTemplate]:
    head = cluster["headGroupSpec"]["template"]
    yield PodTemplate(f"{owner} {HEAD}", _ray_labels(head, HEAD), head["spec"])
    for group in cluster.get("workerGroupSpecs", ()):
        template = group["template"]
        labels = _ray_labels(template, WORKER)
        yield PodTemplate(f"{owner} {group['groupName']}", labels, template["spec"])


def _ray_labels(template: Mapping[str, Any], node_type: str) -> Mapping[str, str]:
    return {**template["metadata"]["labels"], NODE_TYPE: node_type}


def environment(template: PodTemplate, manifests: Sequence[Manifest]) -> dict[str, str]:
    """Return the variables of the first container of a pod; secrets have the value "".

    As in Kubernetes, `env` counts more than `envFrom`, and later sources more than earlier ones.
    """
    container = template.spec["containers"][0]
    values: dict[str, str] = {}
    for source in container.get("envFrom", ()):
        if reference := source.get("configMapRef"):
            values |= named(manifests, "ConfigMap", reference["name"])["data"]
    for variable in container.get("env", ()):
        values[variable["name"]] = variable.get("value", "")
    return values


def secrets_of(template: PodTemplate) -> set[str]:
    """Return the names of the secrets whose keys become variables of a pod's first container."""
    sources = template.spec["containers"][0].get("envFrom", ())
    return {each["secretRef"]["name"] for each in sources if "secretRef" in each}


def commands(manifests: Sequence[Manifest]) -> dict[str, list[str]]:
    """Return the command line of `reir` in each manifest that has one, by kind and name."""
    found = {}
    for each in manifests:
        owner = f"{each['kind']}/{each['metadata']['name']}"
        spec = each.get("spec", {})
        # A RayCronJob has its entrypoint in the template, a RayJob has it directly.
        job = spec.get("jobTemplate", spec)
        if "entrypoint" in job:
            found[owner] = shlex.split(job["entrypoint"])
    for template in pod_templates(manifests):
        for container in template.containers:
            if container.get("command", [""])[0] == "reir":
                found[template.owner] = list(container["command"])
    return found
