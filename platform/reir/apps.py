"""Functions of the apps that the core offers under its own name, found by entry point.

The core imports no app; an app that is not installed is named with the command that installs it.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

from reir.errors import ConfigError

FUNCTIONS = "reir.functions"
"""Group of the entry points, one for each function."""

_EXTRA = {"index": "ingestion"}


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
    except ImportError as error:
        raise ConfigError(f"reir.{name} cannot run: {error}; {install}") from error
    return function
