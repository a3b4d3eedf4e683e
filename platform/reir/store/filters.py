"""The filter language: text -> expression tree.

    area > 0.05 and not (uri startswith "file:///raw/") and attr.camera in ["X100", "GR"]
    cx < 0.5 and height >= 0.3 and neighbors > 2

Fields are those of an instance (`reir.store.filter_fields`) and, written `attr.NAME`, the user's
attributes of its image. `reir.store.filter_numpy` evaluates the tree in numpy, and
`reir.store.filter_milvus` translates it for a Milvus server. Both follow these rules:

* A comparison is true only between values of one type (number, string or boolean). So it is false
  if an attribute is absent, null or of another type.
* `!=` and `not in` are the negation of `==` and `in`, so they are true for an absent attribute.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal, NamedTuple

from reir.errors import FilterError, nearest_name
from reir.store.filter_fields import FIELDS, STRING_FIELDS

MAX_LENGTH = 8192
# A server refuses 50 nested levels, to which the translation adds its own.
MAX_DEPTH = 16
ADDED_LENGTH = 256
"""Length of a condition that the platform adds to a filter; see `parse`."""
# Integers of JSON columns have 64 bits, and number columns are float32.
MAX_INT = 2**63 - 1
MAX_FLOAT = 3.4e38

Value = str | int | float | bool
Operator = Literal["==", "<", "<=", ">", ">="]


@dataclass(frozen=True)
class Field:
    """What is compared: a field of the instance or, if `attribute`, an attribute of its image."""

    name: str
    attribute: bool = False

    def __str__(self) -> str:
        """Return the field as a filter spells it."""
        return f"attr.{self.name}" if self.attribute else self.name


@dataclass(frozen=True)
class Comparison:
    """`field operator value`; `!=` is parsed as `Not` of `==`."""

    field: Field
    operator: Operator
    value: Value


@dataclass(frozen=True)
class In:
    """The field equals one of `values`."""

    field: Field
    values: tuple[Value, ...]


@dataclass(frozen=True)
class StartsWith:
    """The field is a string that starts with `prefix`."""

    field: Field
    prefix: str


@dataclass(frozen=True)
class Not:
    """`operand` is false."""

    operand: Filter


@dataclass(frozen=True)
class And:
    """All operands are true."""

    operands: tuple[Filter, ...]


@dataclass(frozen=True)
class Or:
    """At least one operand is true."""

    operands: tuple[Filter, ...]


Filter = Comparison | In | StartsWith | Not | And | Or


def fields_of(tree: Filter) -> set[Field]:
    """Return the fields that a filter names."""
    match tree:
        case Not(operand):
            return fields_of(operand)
        case And(operands) | Or(operands):
            return set().union(*map(fields_of, operands))
    return {tree.field}


def parse(text: str, *, added: int = 0) -> Filter:
    """Parse a filter.

    Args:
        text: the filter.
        added: how many conditions the platform may have added to what the user wrote: that on a
            tenant, and a range of image ids. The limits of length and depth leave room for them.

    Raises:
        FilterError: it cannot be parsed, or names an unknown field; the message says where.
    """
    max_length = MAX_LENGTH + added * ADDED_LENGTH
    if len(text) > max_length:
        raise FilterError("filter", f"at most {max_length} characters are allowed, got {len(text)}")
    return _Parser(text, MAX_DEPTH + added).parse()


class _Token(NamedTuple):
    kind: str
    text: str
    position: int


# ASCII, because `\d` and `\w` would also match digits and letters of other scripts.
# A single "=" is a token, too, so that the parser can answer it with the operators that exist.
_TOKENS = re.compile(
    r"""\s*(?:
        (?P<string>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')
      | (?P<number>[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?(?![\w.]))
      | (?P<name>[A-Za-z_][\w-]*(?:\.[A-Za-z_][\w-]*)*)
      | (?P<symbol>==|!=|<=|>=|[<>=()\[\],])
      | (?P<end>\Z)
    )""",
    re.VERBOSE | re.DOTALL | re.ASCII,
)
_KEYWORDS = ("and", "or", "not", "in", "startswith", "true", "false")
_ESCAPED = {"n": "\n", "t": "\t", "r": "\r", '"': '"', "'": "'", "\\": "\\"}


def _tokenize(text: str) -> list[_Token]:
    tokens: list[_Token] = []
    position = 0
    while not tokens or tokens[-1].kind != "end":
        match = _TOKENS.match(text, position)
        if match is None:
            raise _error(text, position, "this is not part of the filter language")
        kind = str(match.lastgroup)
        token, start = match[kind], match.start(kind)
        if kind == "name" and token.lower() in _KEYWORDS:
            kind, token = "keyword", token.lower()
        tokens.append(_Token(kind, token, start))
        position = match.end()
    return tokens


def _error(text: str, position: int, problem: str) -> FilterError:
    rest = text[position:].strip()
    where = f"at {rest[:30]!r}" if rest else "at the end"
    return FilterError(
        "filter",
        f"cannot parse {text[:200]!r} {where} (character {position}): {problem}; "
        f'example of a filter: area > 0.05 and attr.camera in ["X100", "GR"]',
    )


class _Parser:
    """Recursive descent over the tokens: or > and > not > comparison."""

    def __init__(self, text: str, max_depth: int) -> None:
        self._text, self._max_depth = text, max_depth
        self._tokens = _tokenize(text)
        self._next = 0
        self._depth = 0

    def parse(self) -> Filter:
        """Parse the whole text."""
        result = self._or()
        self._expect("end", "", "expected 'and', 'or' or the end of the filter")
        return result

    def _or(self) -> Filter:
        operands = [self._and()]
        while self._accept("keyword", "or"):
            operands.append(self._and())
        return operands[0] if len(operands) == 1 else Or(tuple(operands))

    def _and(self) -> Filter:
        operands = [self._not()]
        while self._accept("keyword", "and"):
            operands.append(self._not())
        return operands[0] if len(operands) == 1 else And(tuple(operands))

    def _not(self) -> Filter:
        # Every recursion passes through here, so Python's stack cannot overflow either.
        self._depth += 1
        if self._depth > self._max_depth:
            raise self._error(self._peek(), f"it is nested deeper than {self._max_depth} levels")
        if self._accept("keyword", "not"):
            result: Filter = Not(self._not())
        elif self._accept("symbol", "("):
            result = self._or()
            self._expect("symbol", ")", "expected ')'")
        else:
            result = self._comparison()
        self._depth -= 1
        return result

    def _comparison(self) -> Filter:
        field = self._field()
        token = self._take()
        # By the text alone: a string keeps its quotes here, so it cannot be mistaken for a keyword.
        match token.text:
            case "==":
                return Comparison(field, "==", self._value(field))
            case "!=":
                return Not(Comparison(field, "==", self._value(field)))
            case "<" | "<=" | ">" | ">=" as operator:
                return Comparison(field, operator, self._ordered(field))
            case "in":
                return In(field, self._list(field))
            case "not":
                self._expect("keyword", "in", "expected 'in' after 'not'")
                return Not(In(field, self._list(field)))
            case "startswith":
                return StartsWith(field, self._prefix(field))
        raise self._error(token, "expected ==, !=, <, <=, >, >=, in, not in or startswith")

    def _field(self) -> Field:
        token = self._take()
        if token.kind != "name":
            raise self._error(token, "expected a field name")
        prefix, _, attribute = token.text.partition(".")
        if prefix == "attr" and attribute and "." not in attribute:
            return Field(attribute, attribute=True)
        if token.text not in FIELDS:
            raise FilterError(
                "filter",
                f"unknown field {token.text!r}{nearest_name(token.text, FIELDS)} (known fields: "
                f"{', '.join(FIELDS)}; write an attribute of your images as attr.NAME)",
            )
        return Field(token.text)

    def _ordered(self, field: Field) -> Value:
        token = self._peek()
        value = self._value(field)
        if isinstance(value, bool):
            raise self._error(token, "true and false have no order; use == or !=")
        return value

    def _prefix(self, field: Field) -> str:
        token = self._peek()
        value = self._value(field)
        if not isinstance(value, str):
            raise self._error(token, "expected a string after startswith")
        return value

    def _list(self, field: Field) -> tuple[Value, ...]:
        self._expect("symbol", "[", "expected '['")
        values: list[Value] = []
        while not self._accept("symbol", "]"):
            if values:
                self._expect("symbol", ",", "expected ',' or ']'")
            values.append(self._value(field))
        return tuple(values)

    def _value(self, field: Field) -> Value:
        token = self._take()
        value = self._literal(token)
        if field.attribute:
            return value
        # Compared with another type, the field would not fit in any photo: surely a mistake. Only
        # attributes may have any type.
        wanted = "a string" if field.name in STRING_FIELDS else "a number"
        if isinstance(value, bool) or isinstance(value, str) != (wanted == "a string"):
            raise self._error(
                token, f"{field} must be compared with {wanted}, not with {token.text}"
            )
        return value

    def _literal(self, token: _Token) -> Value:
        if token.kind == "string":
            return self._string(token)
        if token.kind == "number":
            return self._number(token)
        if token.kind == "keyword" and token.text in ("true", "false"):
            return token.text == "true"
        raise self._error(token, "expected a string in quotes, a number, true or false")

    def _string(self, token: _Token) -> str:
        def unescape(match: re.Match[str]) -> str:
            if match[1] not in _ESCAPED:
                raise self._error(token, rf"unknown escape '\{match[1]}' in a string")
            return _ESCAPED[match[1]]

        value = re.sub(r"\\(.)", unescape, token.text[1:-1], flags=re.DOTALL)
        # A surrogate cannot be sent to Milvus, whose protocol encodes strings in UTF-8.
        if "\0" in value or any("\ud800" <= char <= "\udfff" for char in value):
            raise self._error(token, "a string contains a NUL character or an unpaired surrogate")
        return value

    def _number(self, token: _Token) -> int | float:
        whole = re.fullmatch(r"[+-]?\d+", token.text) is not None
        # `int` refuses a text of thousands of digits, which `Decimal` reads exactly, too.
        value = int(Decimal(token.text)) if whole else float(token.text)
        limit = MAX_INT if whole else MAX_FLOAT
        if abs(value) > limit:
            raise self._error(token, f"numbers must be between -{limit} and {limit}")
        return value

    def _peek(self) -> _Token:
        return self._tokens[self._next]

    def _take(self) -> _Token:
        token = self._peek()
        self._next += token.kind != "end"  # the end stays, so that there is always a next token
        return token

    def _accept(self, kind: str, text: str) -> bool:
        token = self._peek()
        found = token.kind == kind and token.text == text
        self._next += found
        return found

    def _expect(self, kind: str, text: str, problem: str) -> None:
        if not self._accept(kind, text):
            raise self._error(self._peek(), problem)

    def _error(self, token: _Token, problem: str) -> FilterError:
        return _error(self._text, token.position, problem)
