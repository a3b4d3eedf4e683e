"""Reads pickles of plain data only, since opening an arbitrary pickle can run any code."""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any, NoReturn

from reir.errors import DataError

# Lists, tuples, dicts, text, bytes and numbers have opcodes of their own; other types are loaded by
# their name. Python 2 calls the module of built-in types __builtin__.
_ALLOWED = {
    ("__builtin__", "set"): set,
    ("__builtin__", "frozenset"): frozenset,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("collections", "OrderedDict"): OrderedDict,
}

# Exceptions of the unpickler for damaged data, by Python's documentation and by trial.
_DAMAGE = (
    pickle.UnpicklingError,
    EOFError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    OverflowError,
    MemoryError,
)


class _PlainUnpickler(pickle.Unpickler):
    """Refuses every type that is not a plain container."""

    def find_class(self, module: str, name: str) -> Any:
        """Return an allowed container type, or raise an error with its name."""
        if (module, name) not in _ALLOWED:
            raise _ForbiddenGlobalError(f"{module}.{name}")
        return _ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> NoReturn:
        """Refuse references to objects outside the file."""
        raise _ForbiddenGlobalError(f"persistent id {pid!r}")


class _ForbiddenGlobalError(Exception):
    """Ends unpickling; its message is the name of the refused type."""


def read_plain_pickle(path: str | Path) -> Any:
    """Return the lists, dicts, sets, text and numbers of a pickle file.

    Files written by Python 2 are read; their byte strings become text (Latin-1).

    Raises:
        DataError: the file cannot be read, is damaged, or refers to other types or functions, which
            are not loaded.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    try:
        return _PlainUnpickler(io.BytesIO(data), encoding="latin1").load()
    except _ForbiddenGlobalError as error:
        raise DataError(
            f"{path} must contain only lists, dicts, text and numbers, but refers to {error}; it "
            f"was not loaded, since that could run code"
        ) from error
    except _DAMAGE as error:
        raise DataError(f"{path} is not a pickle file, or is damaged: {error}") from error
