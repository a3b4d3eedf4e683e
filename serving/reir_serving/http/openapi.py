"""The OpenAPI document: FastAPI derives it from the routes, and we add problems and API keys."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

import reir
from reir_serving.http.problems import MEDIA_TYPE
from reir_serving.http.schemas import Problem
from reir_serving.middleware.auth import OPEN_PATHS, PREFIX

_REF = "#/components/schemas/{model}"
_DESCRIPTION = (
    "Describe one object in a sentence, and get the photos and boxes where it is. Boxes are xyxy "
    "in [0, 1] of the upright photo. Every error is a problem as RFC 9457 defines it."
)


def schema_ref(model: type[BaseModel]) -> dict[str, str]:
    """Return the reference to a model in the document."""
    return {"$ref": _REF.format(model=model.__name__)}


_PROBLEM = {"content": {MEDIA_TYPE: {"schema": schema_ref(Problem)}}}
PROBLEM_RESPONSES: dict[int | str, dict[str, Any]] = {
    "4XX": {"description": "The request must be changed.", **_PROBLEM},
    "5XX": {"description": "The server cannot answer at the moment; try again later.", **_PROBLEM},
}
"""The descriptions of errors that every route has in the OpenAPI document."""


def set_openapi(app: FastAPI, extra: tuple[type[BaseModel], ...], *, needs_key: bool) -> None:
    """Have the application publish its document, which is built at the first request.

    Args:
        app: the application with all its routes.
        extra: models that no route names in its signature.
        needs_key: whether the API requires a key.
    """

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app, extra, needs_key)
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]


def _document(app: FastAPI, extra: tuple[type[BaseModel], ...], needs_key: bool) -> dict[str, Any]:
    document = get_openapi(
        title="REIR", version=reir.__version__, description=_DESCRIPTION, routes=app.routes
    )
    components = document.setdefault("components", {})
    models: tuple[type[BaseModel], ...] = (Problem, *extra)
    _, found = models_json_schema([(model, "validation") for model in models], ref_template=_REF)
    components.setdefault("schemas", {}).update(found["$defs"])
    components["securitySchemes"] = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
    }
    # In OpenAPI, an empty entry means that the operation also works without a key.
    keys: list[dict[str, list[str]]] = [{"bearer": []}, {"header": []}]
    security = keys if needs_key else [*keys, {}]
    for path, operations in document["paths"].items():
        if path.startswith(PREFIX) and path not in OPEN_PATHS:
            for operation in operations.values():
                operation["security"] = security
    return document
