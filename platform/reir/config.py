"""Configuration: pydantic models that are read from YAML files and overridden on the command line.

Each component declares its own `StrictConfig`. Every mistake becomes a `ConfigError` that names the
key, the file, the value and what is allowed.
"""

from __future__ import annotations

import os
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from reir.errors import ConfigError, nearest_name

Config = TypeVar("Config", bound="StrictConfig")

YAML_ERRORS = (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError)
"""What `yaml.safe_load` raises: `YAMLError` for most mistakes, but others for an impossible date, a
value that does not fit its tag, and deep nesting."""


class StrictConfig(BaseModel):
    """Base class of all configurations: frozen, without unknown keys, defaults validated too."""

    # Unknown keys are errors, because a misspelled key would otherwise leave a setting at its
    # default without notice. YAML can write NaN and infinity, which no setting has a use for.
    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False
    )


def load_config(
    model: type[Config],
    source: str | Path | Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
) -> Config:
    """Build a configuration from a YAML file or a mapping, and override single values.

    Args:
        model: the class of the configuration.
        source: path of a YAML file, or values; None for the defaults.
        overrides: `"section.key=value"`, the value in YAML; the last one of a key counts.

    Raises:
        ConfigError: the file cannot be read, or keys or values are wrong; all of them are named.
    """
    if source is None or isinstance(source, Mapping):
        values, origin = dict(source or {}), ""
    else:
        values, origin = read_yaml(Path(source)), f" (file {source})"
    for override in overrides:
        values = apply_override(values, override)
    return validate_config(model, values, lambda _: origin)


def validate_config(
    model: type[Config], values: Mapping[str, Any], origin_of: Callable[[str], str]
) -> Config:
    """Build a configuration from values.

    Args:
        model: the class of the configuration.
        values: of the file, the environment or the command line.
        origin_of: returns, for the dotted key of a wrong value, where the value is from; that is
            put at the end of the message.

    Raises:
        ConfigError: keys or values are wrong; all of them are named.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        # All mistakes at once, so that a file does not have to be corrected one run at a time.
        lines = [_explain(model, each) + origin_of(_dotted(each["loc"])) for each in error.errors()]
        raise ConfigError("\n".join(lines)) from error


def dump_config(config: StrictConfig) -> str:
    """Return the configuration as YAML, all defaults included; inverse of `load_config`."""
    # In JSON mode, paths and enums become text: `safe_dump` refuses anything but plain values.
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def reir_home() -> Path:
    """Return the folder for files of the platform: `$REIR_HOME`, or `~/.reir`."""
    return Path(os.environ.get("REIR_HOME") or Path.home() / ".reir").expanduser().absolute()


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the keys and values of a YAML file.

    Raises:
        ConfigError: the file cannot be read, or is not a mapping in YAML.
    """
    try:
        # `yaml.load` would also build Python objects that a file names, and so run code.
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except YAML_ERRORS as error:  # also if the file is not UTF-8
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must contain 'key: value' lines, got a {type(values).__name__}")
    return values


def apply_override(values: Mapping[str, Any], override: str) -> dict[str, Any]:
    """Return a copy of `values` with one "section.key=value" applied."""
    dotted, equals, text = override.partition("=")
    keys = [key.strip() for key in dotted.split(".")]
    if not equals or not all(keys):
        raise ConfigError(f"override {override!r} must have the form section.key=value")
    try:
        value = yaml.safe_load(text)  # as in a file: numbers, lists and sections work, too
    except YAML_ERRORS as error:
        raise ConfigError(f"override {override!r}: the value is not YAML: {error}") from error
    return _put(values, keys, value, override)


def _put(values: Mapping[str, Any], keys: list[str], value: Any, override: str) -> dict[str, Any]:
    key, *rest = keys
    if not rest:
        return {**values, key: value}
    below = values.get(key) or {}
    if not isinstance(below, Mapping):
        raise ConfigError(f"override {override!r}: {key!r} is a value ({below!r}), not a section")
    return {**values, key: _put(below, rest, value, override)}


def _explain(model: type[BaseModel], error: ErrorDetails) -> str:
    """Return one line that explains an error of pydantic."""
    # `loc` is empty if a validator of the whole model has raised the error.
    *path, key = error["loc"] or ("",)
    section = _dotted(path)
    if error["type"] == "extra_forbidden":
        known = sorted(_keys_at(model, path))
        where = f" in section '{section}'" if section else ""
        hint = nearest_name(str(key), known)
        return f"unknown key '{key}'{where}{hint or ';'} allowed: {', '.join(known)}"
    dotted = _dotted([*path, key])
    if error["type"] == "missing":
        return f"'{dotted}' is required and has no default; set it in the file or as {dotted}=..."
    message = error["msg"].removeprefix("Value error, ")
    # A validator of a whole section: its input would fill the message with unrelated values.
    if isinstance(error["input"], Mapping) and error["type"] == "value_error":
        return f"{_quoted_key(dotted)}: {message}"
    return f"{_quoted_key(dotted)}: got {error['input']!r}; {message[:1].lower()}{message[1:]}"


def _quoted_key(dotted: str) -> str:
    return f"'{dotted}'" if dotted else "the configuration"


def _dotted(path: Sequence[int | str]) -> str:
    return ".".join(str(part) for part in path)


def _keys_at(model: type[BaseModel], path: Sequence[int | str]) -> set[str]:
    """Return the keys that are allowed at `path`."""
    candidates = [model]
    for part in path:
        deeper = [
            section
            for candidate in candidates
            if part in candidate.model_fields
            for section in _sections(candidate.model_fields[str(part)].annotation)
        ]
        # A list index, and the tag that pydantic inserts for a union, are not fields.
        candidates = deeper or candidates
    return {name for candidate in candidates for name in candidate.model_fields}


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """Return the configuration classes within a type such as `list[A] | None`."""
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [found for part in typing.get_args(annotation) for found in _sections(part)]
