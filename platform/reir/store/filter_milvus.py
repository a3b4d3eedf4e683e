"""Translates a filter tree into a Milvus boolean expression.

All strings are quoted in this module, so that no user text reaches Milvus as syntax. Prefixes
become ranges, since `like` of Milvus 2.3 has no escape for the `%` of percent-encoded URIs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from reir.store.filters import (
    And,
    Comparison,
    Field,
    Filter,
    In,
    Not,
    Or,
    StartsWith,
    Value,
)

_FALSE = "image_id in []"
_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n", "\r": r"\r", "\t": r"\t"})


def render_milvus(tree: Filter) -> str:
    """Return the Milvus expression that selects the instances for which `tree` is true."""
    match tree:
        case Comparison(field, operator, value):
            return _false_if_absent(
                field, f"{_reference(field)} {operator} {_literal(field, value)}"
            )
        case In(field, values):
            return _render_in(field, values)
        case StartsWith(field, prefix):
            return _render_prefix(field, prefix)
        case Not(operand):
            return f"(not {render_milvus(operand)})"
        case And(operands):
            return _joined("and", [render_milvus(each) for each in operands])
        case Or(operands):
            return _joined("or", [render_milvus(each) for each in operands])


def quote(text: str) -> str:
    """Return `text` as a Milvus string literal; uses only escapes that Lite supports too."""
    return f'"{text.translate(_ESCAPES)}"'


def render_ids(column: str, ids: Iterable[str]) -> str:
    """Return the expression that selects rows whose `column` is one of `ids`."""
    return f"{column} in [{', '.join(map(quote, ids))}]"


def _joined(word: str, parts: Sequence[str]) -> str:
    """Join with `and` or `or`, as a balanced tree: a server refuses 50 nested levels."""
    if len(parts) == 1:
        return parts[0]
    half = len(parts) // 2
    return f"({_joined(word, parts[:half])} {word} {_joined(word, parts[half:])})"


def _render_in(field: Field, values: Sequence[Value]) -> str:
    """A JSON field has no `in` for mixed types, so an attribute gets a chain of comparisons."""
    if not values:
        return f"({_FALSE})"
    if not field.attribute:
        return f"({field.name} in [{', '.join(_literal(field, value) for value in values)}])"
    return _joined("or", [render_milvus(Comparison(field, "==", value)) for value in values])


def _render_prefix(field: Field, prefix: str) -> str:
    reference = _reference(field)
    parts = [f"{reference} >= {quote(prefix)}"]
    after = _successor(prefix)
    if after is not None:
        parts.append(f"{reference} < {quote(after)}")
    return _joined("and", [_false_if_absent(field, part) for part in parts])


def _successor(prefix: str) -> str | None:
    """Return the least string above all strings that start with `prefix`; None if none exists."""
    # The last character cannot be increased, so the one before it is.
    stem = prefix.rstrip("\U0010ffff")
    if not stem:
        return None
    code = ord(stem[-1]) + 1
    # Surrogates, from U+D800 to U+DFFF, cannot be encoded in UTF-8.
    return stem[:-1] + chr(0xE000 if code == 0xD800 else code)


def _false_if_absent(field: Field, comparison: str) -> str:
    """Make the comparison false, and its negation true, if the attribute is absent."""
    if not field.attribute:
        return f"({comparison})"
    return f"((exists {_reference(field)}) and ({comparison}))"


def _reference(field: Field) -> str:
    return f'attributes["{field.name}"]' if field.attribute else field.name


def _literal(field: Field, value: Value) -> str:
    match value:
        case bool():  # before numbers, since a boolean is an int in Python
            return "true" if value else "false"
        case str():
            return quote(value)
        case int() if field.attribute:
            return str(value)  # all digits: JSON columns keep 64-bit integers exactly
        case _ if field.attribute:
            return repr(float(value) + 0.0)
        case _:
            # Number columns are float32, so 0.1 in a filter must be rounded like a stored 0.1.
            # Plus 0.0 turns -0.0 into 0.0: Lite does not find -0.0 in a list that contains 0.0.
            return repr(float(np.float32(value)) + 0.0)
