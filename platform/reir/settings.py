"""The settings of the commands: from a file, the environment and the command line.

A value on the command line counts more than one in the environment, which counts more than one in
the file, which counts more than the default:

    reir monitor --port 9500               command line
    REIR_MONITOR__PORT=9500                environment: section, two underscores, key
    monitor: {port: 9500}                  file: $REIR_CONFIG, or config.yaml in $REIR_HOME
    9464                                   default

In the environment, values are YAML, and two underscores separate the keys of a nested setting:
`REIR_SERVE__LIMITS__BODY_BYTES=2000000`. Each app declares the class of its section through the
entry-point group `reir.settings`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Generic, TypeVar

import yaml

from reir.config import YAML_ERRORS, StrictConfig, read_yaml, reir_home, validate_config
from reir.errors import ConfigError, nearest_name

GROUP = "reir.settings"
STORE = "store"
"""The one key of the file that is not in a section: the store that all commands use by default."""

DEFAULT = "default"
_SEPARATOR = "__"
# It does not match REIR_HOME and other variables without two underscores, which belong to no
# section.
_SECTION_OF_VARIABLE = re.compile(rf"REIR_([A-Z]+){_SEPARATOR}")

Section = TypeVar("Section", bound=StrictConfig)
Values = Mapping[str, Any]


@dataclass(frozen=True)
class Settings(Generic[Section]):
    """The settings of one section.

    Attributes:
        values: the settings.
        origins: dotted key -> where its value is from, for values that are not the default.
    """

    values: Section
    origins: Mapping[str, str]

    def rows(self) -> Iterator[tuple[str, Any, str]]:
        """Yield the dotted key, the value and the origin of every setting."""
        for key, value in _leaves(self.values.model_dump(mode="json")):
            yield key, value, _origin(self.origins, key) or DEFAULT


def settings_file() -> Path:
    """Return the path of the settings file: `$REIR_CONFIG`, or `config.yaml` in `$REIR_HOME`."""
    named = os.environ.get("REIR_CONFIG")
    return Path(named).expanduser().absolute() if named else reir_home() / "config.yaml"


def sections() -> dict[str, type[StrictConfig]]:
    """Return the classes of all sections whose apps are installed, by name."""
    found: dict[str, type[StrictConfig]] = {}
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
        try:
            found[entry.name] = entry.load()
        except ImportError:  # a package of the app is missing, so its command cannot run either
            continue
    return found


def load_settings(
    section: str,
    model: type[Section],
    options: Values | None = None,
    extra_file: Path | None = None,
) -> Settings[Section]:
    """Return the settings of a section.

    Args:
        section: name of the section.
        model: class of the section.
        options: values of the command line, by key; nested settings as nested mappings. None is a
            value, too: leave out options that were not given.
        extra_file: another file, which contains the keys of this section only; it counts more than
            the settings file and less than the environment.

    Raises:
        ConfigError: a file cannot be read, or keys or values are wrong; the message says where
            they are from.
    """
    layers: list[tuple[Values, str]] = [(_section_of_file(section), f"file {settings_file()}")]
    if extra_file is not None:
        layers.append((read_yaml(extra_file), f"file {extra_file}"))
    layers += [(values, f"environment {name}") for name, values in _environment(section)]
    layers.append((options or {}, "command line"))
    merged: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for values, origin in layers:
        merged = _merge(merged, values)
        origins |= {key: origin for key, _ in _leaves(values)}

    def origin_of(key: str) -> str:
        origin = _origin(origins, key)
        return f" ({origin})" if origin else ""

    return Settings(validate_config(model, merged, origin_of), origins)


def command_defaults(section: str) -> dict[str, Any]:
    """Return the values of a section that the file or the environment give.

    Raises:
        ConfigError: a file cannot be read, or keys or values are wrong.
    """
    # Whoever has no settings must not wait for the import of the section's class.
    if not _section_of_file(section) and not any(_environment(section)):
        return {}
    model = sections().get(section)
    if model is None:
        return {}
    found = load_settings(section, model)
    given = {key.partition(".")[0] for key in found.origins}
    return found.values.model_dump(mode="json", include=given)


def store_setting() -> tuple[str, str] | None:
    """Return the store that the settings name, and where it is named; None if nowhere.

    Raises:
        ConfigError: the settings file cannot be read.
    """
    if named := os.environ.get("REIR_STORE"):
        return named, "environment REIR_STORE"
    named = _file().get(STORE)
    return None if named is None else (str(named), f"file {settings_file()}")


def _section_of_file(section: str) -> Values:
    # YAML reads a section without any keys as None.
    values = _file().get(section) or {}
    if not isinstance(values, Mapping):
        raise ConfigError(
            f"section '{section}' of {settings_file()} must contain 'key: value' lines, got "
            f"{values!r}"
        )
    return values


def _file() -> dict[str, Any]:
    path = settings_file()
    if not path.exists():
        if os.environ.get("REIR_CONFIG"):
            raise ConfigError(f"REIR_CONFIG names {path}, which does not exist; create it or unset")
        return {}
    values = read_yaml(path)
    for name in values:
        if name != STORE:
            _check_section(name, str(path), STORE)
    return values


def _check_section(name: str, origin: str, *others: str) -> None:
    # The names only: loading the classes of all apps would make every command slow.
    known = [*others, *sorted(entry.name for entry in entry_points(group=GROUP))]
    if name not in known:
        raise ConfigError(
            f"unknown section '{name}' in {origin}{nearest_name(name, known) or ';'} allowed: "
            f"{', '.join(known)}"
        )


def _environment(section: str) -> Iterator[tuple[str, Values]]:
    """Yield the variables of a section with their values as nested mappings."""
    prefix = f"REIR_{section.upper()}{_SEPARATOR}"
    # Sorted, so that a variable for a whole nested setting (`..__LIMITS`) comes before those for
    # its keys (`..__LIMITS__LOW`), which count more because they are merged later.
    for name in sorted(os.environ):
        if not name.startswith(prefix):
            if found := _SECTION_OF_VARIABLE.match(name):
                _check_section(found[1].lower(), f"environment {name}")
            continue
        keys = name.removeprefix(prefix).lower().split(_SEPARATOR)
        try:
            value = yaml.safe_load(os.environ[name])
        except YAML_ERRORS as error:
            raise ConfigError(f"{name}={os.environ[name]!r} is not YAML: {error}") from error
        for key in reversed(keys):
            value = {key: value}
        yield name, value


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of both; where both have a value, that of `above`."""
    merged = dict(below)
    for key, value in above.items():
        known = merged.get(key)
        both_nested = isinstance(known, Mapping) and isinstance(value, Mapping)
        merged[key] = _merge(known, value) if both_nested else value  # type: ignore[arg-type]
    return merged


def _leaves(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted key and the value of every setting; an empty mapping is a value."""
    for key, value in values.items():
        dotted = f"{above}.{key}" if above else key
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, dotted)
        else:
            yield dotted, value


def _origin(origins: Mapping[str, str], key: str) -> str:
    """Return the origin of a key, of what is above it, or of something below it."""
    parts = key.split(".")
    for length in range(len(parts), 0, -1):
        if origin := origins.get(".".join(parts[:length])):
            return origin
    return next((origins[each] for each in origins if each.startswith(f"{key}.")), "")
