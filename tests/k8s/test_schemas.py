"""Every manifest has the form that Kubernetes and the operators demand."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import jsonschema
import pytest

from reir_k8s.manifests import OVERLAYS, named, render
from reir_testing.k8s import NEEDS_KUBECTL
from reir_testing.k8s.schemas import check, custom_schemas, schema_folder

pytestmark = NEEDS_KUBECTL


@pytest.fixture(scope="module")
def schemas() -> Mapping[tuple[str, str], Mapping[str, Any]]:
    folder = schema_folder()
    if folder is None:
        pytest.skip("the schemas of custom resources are beside the shared photos: set REIR_DATA")
    return custom_schemas(folder)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_manifests_are_valid(
    overlay: str, schemas: Mapping[tuple[str, str], Mapping[str, Any]]
) -> None:
    manifests = render(overlay)
    for manifest in manifests:
        check(manifest, schemas)
    kinds = {each["kind"] for each in manifests}
    assert {kind for _, kind in schemas} - kinds == {"RayCluster"}, "each custom resource is used"


def test_unknown_fields_are_errors(
    schemas: Mapping[tuple[str, str], Mapping[str, Any]],
) -> None:
    service: Any = copy.deepcopy(named(render("prod"), "RayService", "reir-serve"))
    service["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["volume"] = []
    with pytest.raises(jsonschema.ValidationError, match="volume"):
        check(service, schemas)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_no_object_is_defined_twice(overlay: str) -> None:
    names = [(each["kind"], each["metadata"]["name"]) for each in render(overlay)]
    assert len(names) == len(set(names))
