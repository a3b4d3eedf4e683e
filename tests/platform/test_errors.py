"""The error tree: as drawn, picklable, and with messages that carry what they were given."""

from __future__ import annotations

import importlib
import inspect
import pickle
import pkgutil
import re
import typing
from collections.abc import Iterator

import pytest

import reir
from reir import errors
from reir.errors import (
    FilterError,
    ImageError,
    ImageFailure,
    QueryError,
    ReirError,
    StoreError,
    StoreUnavailable,
    nearest_name,
)


def subclasses(cls: type[ReirError]) -> Iterator[type[ReirError]]:
    yield cls
    for below in cls.__subclasses__():
        yield from subclasses(below)


def drawn_tree() -> dict[str, str]:
    """Class name -> parent's name, read from the drawing in the docstring of `reir.errors`."""
    tree: dict[str, str] = {}
    branch: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        found = re.match(r"^ {4}([\u2502 ]*(?:[\u251c\u2514]\u2500\u2500 )?)(\w+)", line)
        if not found:
            continue
        depth = len(found[1]) // 4
        branch[depth:] = [found[2]]
        tree[found[2]] = branch[depth - 1] if depth else ""
    return tree


def example(cls: type[ReirError]) -> ReirError:
    """An instance with a plausible value for each argument that its constructor declares."""
    if "__init__" not in {name for base in cls.__mro__[:-3] for name in vars(base)}:
        return cls("what went wrong")
    hints = typing.get_type_hints(cls.__init__)
    names = [name for name in inspect.signature(cls).parameters if name != "self"]
    values: dict[type, object] = {ImageFailure: ImageFailure.EMPTY, float: 1.5, int: 2}
    return cls(*(values.get(hints[name], f"some {name}") for name in names))


for module in pkgutil.walk_packages(reir.__path__, "reir."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
# Not those of the apps, which other test modules may have imported.
TREE = [cls for cls in subclasses(ReirError) if cls.__module__.split(".")[0] == "reir"]


def test_the_docstring_draws_the_real_tree() -> None:
    real = {cls.__name__: cls.__bases__[0].__name__ for cls in TREE[1:]} | {"ReirError": ""}
    assert drawn_tree() == real


def test_every_error_lives_in_the_one_module() -> None:
    assert {cls.__module__ for cls in TREE} == {"reir.errors"}


@pytest.mark.parametrize("cls", TREE, ids=lambda cls: cls.__name__)
def test_every_error_survives_pickling(cls: type[ReirError]) -> None:
    before = example(cls)
    after = pickle.loads(pickle.dumps(before))
    assert type(after) is cls
    assert after.args == before.args
    assert vars(after) == vars(before)
    assert str(after) == str(before) != ""


@pytest.mark.parametrize("cls", TREE, ids=lambda cls: cls.__name__)
def test_every_error_says_what_it_means(cls: type[ReirError]) -> None:
    assert cls.__doc__
    assert cls.__doc__ != cls.__bases__[0].__doc__


def test_messages_carry_the_fields() -> None:
    assert str(ImageError(ImageFailure.TRUNCATED, "cut")) == "truncated: cut"
    assert str(QueryError("k", "must be 1 to 100, got 0")) == "k: must be 1 to 100, got 0"
    assert str(StoreUnavailable("127.0.0.1:19530", "refused")) == (
        "store at 127.0.0.1:19530 is not reachable: refused"
    )


def test_catching_by_branch() -> None:
    with pytest.raises(QueryError):
        raise FilterError("filter", "unknown field 'x'")
    with pytest.raises(StoreError):
        raise StoreUnavailable("a", "b")


def test_nearest_name() -> None:
    known = ["ef_build", "num_links"]
    assert nearest_name("ef_bulid", known) == "; did you mean 'ef_build'?"
    assert nearest_name("num_link", dict.fromkeys(known)) == "; did you mean 'num_links'?"
    assert nearest_name("zzz", known) == ""
    assert nearest_name("x", []) == ""
