"""Functions that the core offers on behalf of the apps, such as `reir.index`.

The core does not import apps. It finds their functions by entry points. If a function is missing,
the error says how to install its app.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

from reir.errors import ConfigError

FUNCTIONS = "reir.functions"
"""Name of the group of entry points, which has one entry for each function."""

_EXTRA = {"cluster": "ingestion", "index": "ingestion"}


def app_function(name: str) -> Callable[..., Any]:
    """Return the function of that name.

    Raises:
        ConfigError: its app is not installed, or one of the app's packages is missing.
    """
    install = f"pip install 'reir-platform[{_EXTRA[name]}]'"
    offered = list(entry_points(group=FUNCTIONS, name=name))
    if not offered:
        raise ConfigError(f"reir.{name} is not installed; {install}")
    try:
        function: Callable[..., Any] = offered[0].load()
    # The apps are in the same wheel as the core, but what they import comes with an extra.
    except ImportError as error:
        raise ConfigError(f"reir.{name} cannot run: {error}; {install}") from error
    return function
