"""The manifests with what differs on a machine without Kubernetes: folders, ports, the store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from reir.config import load_config
from reir_k8s.manifests import (
    Manifest,
    PodTemplate,
    environment,
    named,
    pod_templates,
    secrets_of,
)
from reir_serving.config import ServeConfig
from reir_testing.serving import free_port

STORE, BUCKET_SECRET = "http://reir-milvus:19530", "reir-bucket"
SERVICE, MONITOR, METRICS, INDEX, DASHBOARD, AGENT = 8000, 9464, 9465, 9468, 8265, 52365
"""Ports in the manifests: of the service; metrics of the monitor, replicas and jobs; of Ray."""


@dataclass(frozen=True)
class LocalCopy:
    """The manifests, and what replaces parts of them.

    Attributes:
        manifests: the manifests of an overlay.
        texts: text in a manifest -> what replaces it, such as "/etc/reir" -> "/tmp/x/etc".
        ports: port in a manifest -> free port of this machine.
        secrets: name of a secret whose keys become variables -> these variables.
    """

    manifests: Sequence[Manifest]
    texts: Mapping[str, str]
    ports: Mapping[int, int]
    secrets: Mapping[str, Mapping[str, str]]

    @classmethod
    def make(
        cls,
        manifests: Sequence[Manifest],
        folder: Path,
        programs: Path,
        store: str,
        buckets: Mapping[str, str],
    ) -> LocalCopy:
        """Choose folders and ports.

        Args:
            manifests: the manifests of an overlay.
            folder: an empty folder.
            programs: folder of the programs `reir` and `reir-load-balancer`.
            store: location of the store to use.
            buckets: variables by which programs find the buckets.
        """
        texts = {
            STORE: store,
            "/var/lib/reir": str(folder / "home"),
            "/etc/reir": str(folder / "etc"),
            "/tmp/reir-metrics": str(folder / "metrics"),
            "/opt/reir/bin": str(programs),
        }
        for each in texts.values():
            if Path(each).is_relative_to(folder):
                Path(each).mkdir(exist_ok=True)
        ports = {port: free_port() for port in (SERVICE, MONITOR, METRICS, INDEX, DASHBOARD, AGENT)}
        return cls(manifests, texts, ports, {BUCKET_SECRET: buckets})

    def text(self, value: str) -> str:
        """Return a text of the manifests as it must be on this machine."""
        for before, after in self.texts.items():
            value = value.replace(before, after)
        return value

    def variables(self, owner: str) -> dict[str, str]:
        """Return the variables of a pod, with those of its secrets that are known here."""
        template = self.pod(owner)
        values = environment(template, self.manifests)
        found = {name: self.text(value) for name, value in values.items()}
        for secret in secrets_of(template):
            found |= self.secrets.get(secret, {})
        # The only port in a variable.
        if "REIR_SERVE_METRICS_PORT" in found:
            found["REIR_SERVE_METRICS_PORT"] = str(self.ports[METRICS])
        # Not `HOME`, and not other secrets, which are empty here.
        return {name: value for name, value in found.items() if value and name != "HOME"}

    def pod(self, owner: str) -> PodTemplate:
        """Return the pod template of an owner, such as "RayService/reir-serve head".

        Raises:
            LookupError: there is none.
        """
        for template in pod_templates(self.manifests):
            if template.owner == owner:
                return template
        raise LookupError(f"no pod template belongs to {owner}")

    def serve_config(self) -> str:
        """Return `serveConfigV2` of the RayService."""
        text = named(self.manifests, "RayService", "reir-serve")["spec"]["serveConfigV2"]
        values: dict[str, Any] = yaml.safe_load(self.text(text))
        values["http_options"] |= {"host": "127.0.0.1", "port": self.ports[SERVICE]}
        return yaml.safe_dump(values, sort_keys=False)

    def num_cpus(self) -> int:
        """Return how many CPUs Ray needs for the least number of replicas and a job beside them."""
        text = named(self.manifests, "RayService", "reir-serve")["spec"]["serveConfigV2"]
        args = yaml.safe_load(text)["applications"][0]["args"]
        config = load_config(ServeConfig, args)
        deployments = (
            *(config.ingress, config.text, config.retriever, config.reranker, config.localizer),
        )
        used = deployments if config.layout == "split" else deployments[:1]
        return 4 + int(sum(each.min_replicas * each.num_cpus for each in used) + 0.99)

    def write_settings(self) -> None:
        """Write the settings file to where the variable `REIR_CONFIG` says."""
        monitor = self.pod("Deployment/reir-monitor")
        name = next(
            each["configMap"]["name"] for each in monitor.spec["volumes"] if "configMap" in each
        )
        settings = yaml.safe_load(
            self.text(named(self.manifests, "ConfigMap", name)["data"]["config.yaml"])
        )
        settings["index"] |= {
            "metrics_host": "127.0.0.1",
            "metrics_port": self.ports[INDEX],
            # Replicas share this cluster with the jobs, which would leave them no CPUs by default.
            "num_workers": 1,
        }
        settings["monitor"] |= {"host": "127.0.0.1", "port": self.ports[MONITOR]}
        file = Path(self.text("/etc/reir/config.yaml"))
        file.write_text(yaml.safe_dump(settings), encoding="utf-8")
