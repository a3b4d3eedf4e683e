"""docs/configuration.md: every setting, made from the classes of the settings."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from reir.settings import sections

HEAD = Path(__file__).with_name("configuration_head.md")
"""The part of the page that is not made from classes."""

_BOUNDS = {
    "minimum": "at least {}",
    "exclusiveMinimum": "more than {}",
    "maximum": "at most {}",
    "exclusiveMaximum": "less than {}",
}
_TYPES = {
    "integer": "whole number",
    "boolean": "true or false",
    "string": "text",
    "array": "list",
    "object": "keys and values",
}
_PLACE_OF_DEFAULT = "as above"
"""The default of settings whose default depends on the machine."""


def settings_page() -> str:
    """Return the page."""
    parts = [HEAD.read_text(encoding="utf-8")]
    for name, model in sections().items():
        parts.append(f"\n## Section `{name}`\n\n{_about(model)}\n")
        parts += (_table(prefixes, nested) for nested, prefixes in _groups(name, model))
    return "".join(parts)


def _groups(name: str, model: type[BaseModel]) -> list[tuple[type[BaseModel], dict[str, Any]]]:
    """Return the classes within a section, with the dotted keys that have it and their values."""
    # Without validation, which would miss the settings that have no default.
    values = model.model_construct()
    groups: dict[type[BaseModel], dict[str, Any]] = {model: {name: values}}
    for key, field in model.model_fields.items():
        if isinstance(field.default, BaseModel):
            groups.setdefault(type(field.default), {})[f"{name}.{key}"] = field.default
    return list(groups.items())


def _table(values: Mapping[str, Any], model: type[BaseModel]) -> str:
    """Return the settings of one class as a table."""
    described, schema = _attributes(model), model.model_json_schema()
    names = ", ".join(f"`{prefix}.`" for prefix in values)
    lines = [f"\n| key, after {names} | default | allowed | what it is |", "|---|---|---|---|"]
    for key, field in model.model_fields.items():
        if isinstance(field.default, BaseModel):
            continue
        default = _default({prefix: getattr(each, key, None) for prefix, each in values.items()})
        if field.default is PydanticUndefined and key == "store":
            default = _PLACE_OF_DEFAULT
        allowed = _allowed(schema["properties"][key], schema.get("$defs", {}))
        text = described[key].replace("None", "`null`")  # as in YAML
        lines.append(f"| `{key}` | {default} | {allowed} | {text} |")
    return "\n".join(lines) + "\n"


def _default(values: Mapping[str, Any]) -> str:
    """Return the default, and those keys in which it differs."""
    shown = {prefix: _yaml(value) for prefix, value in values.items()}
    first, *_ = shown.values()
    others = [f"`{prefix}`: {text}" for prefix, text in shown.items() if text != first]
    return "; ".join([first, *others])


def _yaml(value: Any) -> str:
    return f"`{json.dumps(value, default=str)}`"


def _allowed(schema: Mapping[str, Any], classes: Mapping[str, Any]) -> str:
    """Return type and limits of a value, in words.

    Args:
        schema: JSON schema of the value.
        classes: name -> schema of the classes that it may refer to.
    """
    options = [each for each in schema.get("anyOf", [schema]) if each.get("type") != "null"]
    found: list[str] = []
    for option in options:
        option = classes.get(option.get("$ref", "").rpartition("/")[2], option)
        if "enum" in option:
            found.append(", ".join(f"`{each}`" for each in option["enum"]))
        else:
            words = [_TYPES.get(option.get("type", ""), option.get("type", "value"))]
            words += [text.format(option[key]) for key, text in _BOUNDS.items() if key in option]
            found.append(", ".join(words))
    return " or ".join(found)


def _about(model: type[BaseModel]) -> str:
    """Return the first paragraph of a class's docstring."""
    return inspect.cleandoc(model.__doc__ or "").split("\n\n")[0].replace("\n", " ")


def _attributes(model: type[BaseModel]) -> dict[str, str]:
    """Return the texts of the section `Attributes` of a class's docstring, by attribute."""
    section = inspect.cleandoc(model.__doc__ or "").partition("Attributes:\n")[2]
    return dict(_entries(inspect.cleandoc(section)))


def _entries(section: str) -> Iterator[tuple[str, str]]:
    # An entry begins at the margin; its further lines are indented.
    for entry in re.split(r"\n(?=\S)", section):
        names, _, text = entry.partition(":")
        for name in names.split(","):
            yield name.strip(), " ".join(text.split())
