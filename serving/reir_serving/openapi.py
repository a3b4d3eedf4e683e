"""The OpenAPI document: what FastAPI derives, plus problems, keys and examples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

import reir
from reir_serving.problems import JSON, MEDIA_TYPE
from reir_serving.schemas import Problem

_PLACE = "#/components/schemas/{model}"
_DESCRIPTION = (
    "Write a sentence about one object; get the photos and boxes where it is. Boxes are xyxy in "
    "[0, 1] of the upright photo. Every error is a problem of RFC 9457."
)


def schema_of(model: type[BaseModel]) -> dict[str, str]:
    """Return the reference to a model."""
    return {"$ref": _PLACE.format(model=model.__name__)}


def body_of(
    model: type[BaseModel],
    example: Mapping[str, Any],
    narrower: Mapping[str, Any] | None = None,
    **forms: Any,
) -> dict[str, Any]:
    """Return the description of the request body, for a route that parses its body itself.

    Args:
        model: model of the JSON body.
        example: an example of the JSON body.
        narrower: more JSON Schema keywords that restrict the JSON body further.
        forms: models for other media types, by media type ("multipart/form-data").
    """
    schema = {**schema_of(model), **(narrower or {})}
    told = {JSON: {"schema": schema, "example": example}}
    told |= {media_type: {"schema": schema_of(form)} for media_type, form in forms.items()}
    return {"requestBody": {"required": True, "content": told}}


def publish(app: FastAPI, extra: tuple[type[BaseModel], ...], *, needs_key: bool) -> None:
    """Have the application publish its document, made at the first request.

    Args:
        app: with all its routes.
        extra: models that no route names in its signature.
        needs_key: whether the API requires a key.
    """

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app, extra, needs_key)
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]


def _document(app: FastAPI, extra: tuple[type[BaseModel], ...], needs_key: bool) -> dict[str, Any]:
    made = get_openapi(
        title="REIR", version=reir.__version__, description=_DESCRIPTION, routes=app.routes
    )
    components = made.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    models: tuple[type[BaseModel], ...] = (Problem, *extra)
    _, found = models_json_schema([(model, "validation") for model in models], ref_template=_PLACE)
    schemas.update(found["$defs"])
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    components["securitySchemes"] = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
    }
    for path, operations in made["paths"].items():
        for operation in operations.values():
            _complete(path, operation, needs_key)
    return made


def _complete(path: str, operation: dict[str, Any], needs_key: bool) -> None:
    """Give an operation its errors, and the keys that it takes."""
    answers = operation["responses"]
    answers.pop("422", None)
    told = {"content": {MEDIA_TYPE: {"schema": schema_of(Problem)}}}
    answers["4XX"] = {"description": "The request has to change.", **told}
    answers["5XX"] = {"description": "Try again later.", **told}
    if path.startswith("/v1/") and path != "/v1/about":
        operation["security"] = [{"bearer": []}, {"header": []}, *([] if needs_key else [{}])]
