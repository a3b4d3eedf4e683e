"""Unpickle plain data and nothing else: a pickle may otherwise run any code when it is opened."""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any, NoReturn

from reir.errors import DataError

# Lists, tuples, dicts, text, bytes and numbers have opcodes of their own and name no global.
# Python 2 calls the module of the others __builtin__.
_ALLOWED = {
    ("__builtin__", "set"): set,
    ("__builtin__", "frozenset"): frozenset,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("collections", "OrderedDict"): OrderedDict,
}

# What a damaged stream makes the unpickler raise, by Python's documentation and by trial.
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
    """Refuses every global that is not a plain container."""

    def find_class(self, module: str, name: str) -> Any:
        """Return an allowed container type, or refuse by name."""
        if (module, name) not in _ALLOWED:
            raise _ForbiddenGlobalError(f"{module}.{name}")
        return _ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> NoReturn:
        """Refuse references to objects outside the file."""
        raise _ForbiddenGlobalError(f"persistent id {pid!r}")


class _ForbiddenGlobalError(Exception):
    """Ends unpickling; carries the name."""


def read_plain_pickle(path: str | Path) -> Any:
    """Return the lists, dicts, sets, text and numbers of a pickle file.

    Files written by Python 2 are read; their byte strings become text (Latin-1).

    Raises:
        DataError: the file cannot be read, is damaged, or names a global: then nothing of it was
            run, and the message gives the name.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        return _PlainUnpickler(io.BytesIO(data), encoding="latin1").load()
    except _ForbiddenGlobalError as error:
        raise DataError(
            f"{path}: expected plain lists, dicts, text and numbers, but the pickle wants to "
            f"load {error}; refused, since that could run code"
        ) from error
    except _DAMAGE as error:
        raise DataError(f"{path}: expected a pickle file, it is damaged: {error}") from error
