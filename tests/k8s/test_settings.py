"""Every setting and variable in the manifests is one that the code reads."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from reir.config import load_config
from reir.settings import sections
from reir_k8s.derived_manifests import derived_manifests
from reir_k8s.manifests import (
    Manifest,
    environment,
    named,
    pod_templates,
)
from reir_serving.config import LiveSettings, ServeConfig
from reir_serving.middleware.access import check_bind
from reir_serving.ray.environment import VARIABLES
from reir_testing.k8s import NEEDS_KUBECTL
from reir_testing.repository import ROOT, SOURCE_ROOTS
from reir_training.presets import PRESETS

pytestmark = NEEDS_KUBECTL

OF_LIBRARIES = {"HOME", "OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM", "PROMETHEUS_MULTIPROC_DIR"}
"""Variables of the operating system, OpenMP, the tokenizers and the Prometheus client."""


def serve_file(manifests: Sequence[Manifest]) -> dict[str, Any]:
    text = named(manifests, "RayService", "reir-serve")["spec"]["serveConfigV2"]
    found: dict[str, Any] = yaml.safe_load(text)
    return found


def files_named(text: str) -> Iterator[Path]:
    for root, package in SOURCE_ROOTS.items():
        yield from (
            file for file in (ROOT / root / package).rglob("*.py") if text in file.read_text()
        )


def test_derived_manifests_are_up_to_date() -> None:
    for path, text in derived_manifests().items():
        assert path.read_text() == text, f"{path}: run `python -m reir_k8s.derived_manifests`"


def test_serve_config_names_the_application(manifests: Sequence[Manifest]) -> None:
    (application,) = serve_file(manifests)["applications"]
    module, _, function = application["import_path"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))
    config = load_config(ServeConfig, application["args"])
    check_bind(config.host, config.keys_file)
    (ingress,) = application["deployments"]
    assert load_config(LiveSettings, ingress["user_config"]) == config.live
    assert serve_file(manifests)["http_options"] == {"host": config.host, "port": config.port}


def test_the_service_port_is_that_of_the_settings(manifests: Sequence[Manifest]) -> None:
    cluster = named(manifests, "RayService", "reir-serve")["spec"]["rayClusterConfig"]
    (container,) = cluster["workerGroupSpecs"][0]["template"]["spec"]["containers"]
    ports = {each["name"]: each["containerPort"] for each in container["ports"]}
    assert ports["serve"] == serve_file(manifests)["http_options"]["port"]
    assert container["readinessProbe"]["httpGet"]["port"] == ports["serve"]
    metrics = environment_of(manifests, "RayService/reir-serve replicas")["REIR_SERVE_METRICS_PORT"]
    assert ports["reir-metrics"] == int(metrics)


def test_the_cluster_has_room_for_all_replicas(manifests: Sequence[Manifest]) -> None:
    config = load_config(ServeConfig, serve_file(manifests)["applications"][0]["args"])
    (group,) = named(manifests, "RayService", "reir-serve")["spec"]["rayClusterConfig"][
        "workerGroupSpecs"
    ]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    deployments = (config.ingress, config.text, config.retriever, config.reranker, config.localizer)
    used = deployments if config.layout == "split" else deployments[:1]
    for count in ("min_replicas", "max_replicas"):
        pods = group["minReplicas" if count == "min_replicas" else "maxReplicas"]
        cpus = sum(getattr(each, count) * each.num_cpus for each in used)
        gpus = sum(getattr(each, count) * each.num_gpus for each in used)
        assert cpus <= pods * float(limits["cpu"]), count
        assert gpus <= pods * float(limits.get("nvidia.com/gpu", 0)), count


def environment_of(manifests: Sequence[Manifest], owner: str) -> dict[str, str]:
    (template,) = [each for each in pod_templates(manifests) if each.owner == owner]
    return environment(template, manifests)


def test_serving_has_the_variables_of_reir_serve(manifests: Sequence[Manifest]) -> None:
    for pods in ("head", "replicas"):
        found = environment_of(manifests, f"RayService/reir-serve {pods}")
        assert {name: found.get(name) for name in VARIABLES} == dict(VARIABLES)
        binary = Path(found["RAY_SERVE_HAPROXY_BINARY_PATH"])
        assert binary.parent == Path("/opt/reir/bin")
        pyproject = (ROOT / "pyproject.toml").read_text()
        assert re.search(rf"^{binary.name} = ", pyproject, re.M), "a command of the package"


def test_variables_are_read_by_the_code(manifests: Sequence[Manifest]) -> None:
    found = {
        name for template in pod_templates(manifests) for name in environment(template, manifests)
    }
    constants = "".join(
        file.read_text() for file in (Path(ray.__file__).parent / "serve" / "_private").glob("*.py")
    )
    usage = (Path(ray.__file__).parent / "_common" / "usage" / "usage_constants.py").read_text()
    for name in sorted(found - OF_LIBRARIES):
        if name.startswith("REIR_"):
            assert any(files_named(f'"{name}"')), f"no module of the platform reads {name}"
        elif name == "REDIS_PASSWORD":
            redis = named(manifests, "StatefulSet", "reir-redis")["spec"]["template"]["spec"]
            assert f"$({name})" in redis["containers"][0]["command"]
        else:
            assert f'"{name}"' in constants + usage, f"Ray does not read {name}"
    assert any(files_named('"OMP_NUM_THREADS"'))


def test_settings_are_valid(
    manifests: Sequence[Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (name,) = {
        each["metadata"]["name"]
        for each in manifests
        if each["metadata"]["name"].startswith("reir-settings-")
    }
    text = named(manifests, "ConfigMap", name)["data"]["config.yaml"]
    values = yaml.safe_load(text)
    store = values.pop("store")
    assert serve_file(manifests)["applications"][0]["args"]["store"] == store
    assert values, "no section"
    for section, settings in values.items():
        load_config(sections()[section], settings)
    monitor = environment_of(manifests, "Deployment/reir-monitor")
    assert monitor["REIR_CONFIG"] == "/etc/reir/config.yaml"
    monitored, indexing = values["monitor"], values["index"]
    assert _ports(manifests, "Deployment/reir-monitor") == {monitored["port"]}
    assert indexing["metrics_port"] in _ports(manifests, "RayJob/reir-index head")
    # Prometheus is in another pod.
    assert monitored["host"] == indexing["metrics_host"] == "0.0.0.0"


def _ports(manifests: Sequence[Manifest], owner: str) -> set[int]:
    (template,) = [each for each in pod_templates(manifests) if each.owner == owner]
    return {port["containerPort"] for each in template.containers for port in each["ports"]}


def test_the_search_log_is_where_canaries_are_made_from(manifests: Sequence[Manifest]) -> None:
    args = serve_file(manifests)["applications"][0]["args"]
    home = environment_of(manifests, "RayCronJob/reir-canary head")["REIR_HOME"]
    # `reir canary make` and `reir monitor` read $REIR_HOME/searches.
    assert args["search_log"] == os.path.join(home, "searches")


def test_training_settings_are_valid(manifests: Sequence[Manifest]) -> None:
    (config,) = [
        each
        for each in manifests
        if each["kind"] == "ConfigMap" and each["metadata"]["name"].startswith("reir-training-")
    ]
    ((file, text),) = config["data"].items()
    job = named(manifests, "RayJob", "reir-train")["spec"]
    assert f"/etc/reir/training/{file}" in job["entrypoint"]
    preset = re.search(r"--preset (\S+)", job["entrypoint"])
    assert preset is not None
    data = load_config(PRESETS[preset[1]], yaml.safe_load(text))
    mounts = job["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]
    folders = [each["mountPath"] for each in mounts["volumeMounts"]]
    assert all(any(source.path.is_relative_to(each) for each in folders) for source in data.data)
