"""The filter language: text -> expression tree.

    area > 0.05 and not (uri startswith "file:///raw/") and attr.camera in ["X100", "GR"]
    cx < 0.5 and height >= 0.3 and neighbours > 2

Fields are those of an instance (`FIELDS`) and, written `attr.NAME`, the user's attributes of its
image. The tree is evaluated in numpy by `reir.store.filter_numpy` and written for a Milvus server
by `reir.store.filter_milvus`; both keep the rules here:

* A comparison holds only between values of one type (number, string or boolean), so with an
  attribute that is absent, null or of another type it is false.
* `!=` and `not in` are the negation of `==` and `in`: true for an absent attribute.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, NamedTuple

from reir.errors import FilterError, nearest_name

MAX_LENGTH = 8192
MAX_DEPTH = 16
MAX_INT = 2**63 - 1
MAX_FLOAT = 3.4e38

NEIGHBOURS = "neighbours"
"""Number of other instances in the photo, whatever they are."""

BOX_FIELDS = ("cx", "cy", "height", "width", "x1", "x2", "y1", "y2")
"""Corners, centre and sides, in shares of the photo."""

NUMBER_FIELDS = ("area", "objectness", NEIGHBOURS, *BOX_FIELDS)
STRING_FIELDS = ("image_id", "uri")
FIELDS = (*STRING_FIELDS, *NUMBER_FIELDS)

Value = str | int | float | bool
Operator = Literal["==", "<", "<=", ">", ">="]


@dataclass(frozen=True)
class Field:
    """What is compared: a field of the instance or, with `attribute`, of the user's columns."""

    name: str
    attribute: bool = False

    def __str__(self) -> str:
        """Return the field as it is written in a filter."""
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
    """`operand` does not hold."""

    operand: Filter


@dataclass(frozen=True)
class And:
    """Every operand holds."""

    operands: tuple[Filter, ...]


@dataclass(frozen=True)
class Or:
    """At least one operand holds."""

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


def parse(text: str) -> Filter:
    """Parse a filter.

    Raises:
        FilterError: it cannot be parsed, or names an unknown field; the message says where.
    """
    if len(text) > MAX_LENGTH:
        raise FilterError("filter", f"has {len(text)} characters, at most {MAX_LENGTH} are allowed")
    return _Parser(text).parse()


class _Token(NamedTuple):
    kind: str
    text: str
    position: int


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


def _tokenise(text: str) -> list[_Token]:
    tokens: list[_Token] = []
    position = 0
    while not tokens or tokens[-1].kind != "end":
        match = _TOKENS.match(text, position)
        if match is None:
            raise _error(text, position, "cannot be read here")
        kind = str(match.lastgroup)
        token, start = match[kind], match.start(kind)
        if kind == "name" and token.lower() in _KEYWORDS:
            kind, token = "keyword", token.lower()
        tokens.append(_Token(kind, token, start))
        position = match.end()
    return tokens


def _error(text: str, position: int, problem: str) -> FilterError:
    rest = text[position:].strip()
    near = f"at {rest[:30]!r}" if rest else "at its end"
    return FilterError(
        "filter",
        f"{text[:200]!r} {problem}, {near} (character {position}); "
        f'example: area > 0.05 and attr.camera in ["X100", "GR"]',
    )


class _Parser:
    """Recursive descent over the tokens: or > and > not > comparison."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens = _tokenise(text)
        self._next = 0
        self._depth = 0

    def parse(self) -> Filter:
        """Parse the whole text."""
        result = self._or()
        self._expect("end", "", "expects 'and', 'or' or its end")
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
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise self._error(self._peek(), f"is nested deeper than {MAX_DEPTH} levels")
        if self._accept("keyword", "not"):
            result: Filter = Not(self._not())
        elif self._accept("symbol", "("):
            result = self._or()
            self._expect("symbol", ")", "expects ')'")
        else:
            result = self._comparison()
        self._depth -= 1
        return result

    def _comparison(self) -> Filter:
        field = self._field()
        token = self._take()
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
                self._expect("keyword", "in", "expects 'in' after 'not'")
                return Not(In(field, self._list(field)))
            case "startswith":
                return StartsWith(field, self._prefix(field))
        raise self._error(token, "expects ==, !=, <, <=, >, >=, in, not in or startswith")

    def _field(self) -> Field:
        token = self._take()
        if token.kind != "name":
            raise self._error(token, "expects a field name")
        prefix, _, attribute = token.text.partition(".")
        if prefix == "attr" and attribute and "." not in attribute:
            return Field(attribute, attribute=True)
        if token.text not in FIELDS:
            raise FilterError(
                "filter",
                f"unknown field {token.text!r}{nearest_name(token.text, FIELDS)} (known: "
                f"{', '.join(FIELDS)}; an attribute of your own is written attr.NAME)",
            )
        return Field(token.text)

    def _ordered(self, field: Field) -> Value:
        token = self._peek()
        value = self._value(field)
        if isinstance(value, bool):
            raise self._error(token, "cannot order true and false; use == or !=")
        return value

    def _prefix(self, field: Field) -> str:
        token = self._peek()
        value = self._value(field)
        if not isinstance(value, str):
            raise self._error(token, "expects a string after startswith")
        return value

    def _list(self, field: Field) -> tuple[Value, ...]:
        self._expect("symbol", "[", "expects '['")
        values: list[Value] = []
        while not self._accept("symbol", "]"):
            if values:
                self._expect("symbol", ",", "expects ',' or ']'")
            values.append(self._value(field))
        return tuple(values)

    def _value(self, field: Field) -> Value:
        token = self._take()
        value = self._literal(token)
        if field.attribute:
            return value
        wanted = "a string" if field.name in STRING_FIELDS else "a number"
        if isinstance(value, bool) or isinstance(value, str) != (wanted == "a string"):
            raise self._error(token, f"compares {field} with {token.text}; it needs {wanted}")
        return value

    def _literal(self, token: _Token) -> Value:
        if token.kind == "string":
            return self._string(token)
        if token.kind == "number":
            return self._number(token)
        if token.kind == "keyword" and token.text in ("true", "false"):
            return token.text == "true"
        raise self._error(token, "expects a string in quotes, a number, true or false")

    def _string(self, token: _Token) -> str:
        def unescape(match: re.Match[str]) -> str:
            if match[1] not in _ESCAPED:
                raise self._error(token, rf"has the unknown escape '\{match[1]}'")
            return _ESCAPED[match[1]]

        value = re.sub(r"\\(.)", unescape, token.text[1:-1], flags=re.DOTALL)
        if "\0" in value or any("\ud800" <= char <= "\udfff" for char in value):
            raise self._error(token, "has a NUL or an unpaired surrogate in a string")
        return value

    def _number(self, token: _Token) -> int | float:
        whole = re.fullmatch(r"[+-]?\d+", token.text) is not None
        value = int(token.text) if whole else float(token.text)
        limit = MAX_INT if whole else MAX_FLOAT
        if abs(value) > limit:
            raise self._error(token, f"has a number beyond ±{limit}")
        return value

    def _peek(self) -> _Token:
        return self._tokens[self._next]

    def _take(self) -> _Token:
        token = self._peek()
        self._next += token.kind != "end"
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
