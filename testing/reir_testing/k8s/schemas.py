"""Validates manifests against the schemas of Kubernetes and of custom resources."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

from reir_testing import data_dir

KUBERNETES = "1.32"
"""Oldest version of Kubernetes whose schemas the manifests are checked against."""


def schema_folder() -> Path | None:
    """Return the folder with the definitions of custom resources, beside the shared photos."""
    data = data_dir()
    folder = None if data is None else data.parent / "schemas"
    return folder if folder is not None and folder.is_dir() else None


def custom_schemas(folder: Path) -> dict[tuple[str, str], Mapping[str, Any]]:
    """Return the schemas of custom resources, by apiVersion and kind."""
    found: dict[tuple[str, str], Mapping[str, Any]] = {}
    for file in sorted(folder.glob("*.yaml")):
        spec = yaml.safe_load(file.read_text(encoding="utf-8"))["spec"]
        for version in spec["versions"]:
            key = f"{spec['group']}/{version['name']}", spec["names"]["kind"]
            found[key] = _without_unknown_fields(version["schema"]["openAPIV3Schema"])
    return found


def check(manifest: Mapping[str, Any], custom: Mapping[tuple[str, str], Mapping[str, Any]]) -> None:
    """Check a manifest; unknown fields are errors, too, since Kubernetes would drop them.

    Raises:
        jsonschema.ValidationError, kubernetes_validate.ValidationError: it is invalid.
    """
    schema = custom.get((manifest["apiVersion"], manifest["kind"]))
    if schema is None:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
    else:
        jsonschema.Draft4Validator(schema).validate(manifest)


def _without_unknown_fields(schema: Any) -> Any:
    """Return a schema in which objects have no fields but the listed ones."""
    if isinstance(schema, list):
        return [_without_unknown_fields(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: _without_unknown_fields(value) for key, value in schema.items()}
    is_open = schema.get("x-kubernetes-preserve-unknown-fields", False)
    if isinstance(schema.get("properties"), dict) and not is_open and schema.get("type"):
        # `metadata` is checked by Kubernetes itself.
        metadata = found["properties"].get("metadata")
        if metadata == {"type": "object"}:
            found["properties"]["metadata"] = {}
        found.setdefault("additionalProperties", False)
    return found
