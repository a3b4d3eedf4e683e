"""The filter language: parsing, evaluation in numpy, and translation for Milvus."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from reir.errors import FilterError
from reir.records import Attributes, ImageRecord, IndexedImage, Instances
from reir.store import InstanceStore, VersionSpec, rows
from reir.store.filter_fields import NUMBER_FIELDS
from reir.store.filter_milvus import render_milvus
from reir.store.filter_numpy import Column, evaluate, objects
from reir.store.filters import (
    ADDED_LENGTH,
    MAX_DEPTH,
    MAX_LENGTH,
    And,
    Comparison,
    Field,
    Filter,
    In,
    Not,
    Or,
    StartsWith,
    Value,
    parse,
)
from reir.store.milvus import MilvusStore

AREA = Field("area")
CAMERA = Field("camera", attribute=True)


@pytest.mark.parametrize(
    ("text", "tree"),
    [
        ("area > 0.5", Comparison(AREA, ">", 0.5)),
        ("area>=-1e-3", Comparison(AREA, ">=", -1e-3)),
        ("area != 1", Not(Comparison(AREA, "==", 1))),
        ("attr.camera == 'it\\'s'", Comparison(CAMERA, "==", "it's")),
        ('attr.camera == "a\\n\\"\\\\"', Comparison(CAMERA, "==", 'a\n"\\')),
        ("attr.camera == TRUE", Comparison(CAMERA, "==", True)),
        ("attr.camera in []", In(CAMERA, ())),
        ("attr.camera not in [1, 'a', false]", Not(In(CAMERA, (1, "a", False)))),
        ('uri startswith "file:"', StartsWith(Field("uri"), "file:")),
        ("attr.shot-date == 1", Comparison(Field("shot-date", attribute=True), "==", 1)),
        (
            "area > 1 or area < 0 and not area == 2",
            Or(
                (
                    Comparison(AREA, ">", 1),
                    And((Comparison(AREA, "<", 0), Not(Comparison(AREA, "==", 2)))),
                )
            ),
        ),
        ("((area > 1))", Comparison(AREA, ">", 1)),
        ("area > -9223372036854775807", Comparison(AREA, ">", -(2**63) + 1)),
        ("area > " + "0" * 8000 + "1", Comparison(AREA, ">", 1)),
    ],
)
def test_a_filter_is_parsed_to_a_tree(text: str, tree: Filter) -> None:
    assert parse(text) == tree


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "expected a field name"),
        ("area", "expected ==, !="),
        ("area = 1", "expected ==, !="),
        ("area >", "expected a string in quotes, a number"),
        ("area > 1 1", "expected 'and', 'or'"),
        ("(area > 1", r"expected '\)'"),
        ("area in 1", r"expected '\['"),
        ("area in [1 2]", "expected ','"),
        ("area not 1", "expected 'in' after 'not'"),
        ("area > 'x'", "area must be compared with a number, not with 'x'"),
        ("uri == 3", "uri must be compared with a string, not with 3"),
        ("area == true", "must be compared with a number, not with true"),
        ("attr.a < true", "true and false have no order"),
        ("attr.a startswith 3", "expected a string after startswith"),
        ("areas > 1", "unknown field 'areas'; did you mean 'area'"),
        ("camera == 1", r"unknown field 'camera'.*write an attribute of your images as attr\.NAME"),
        ("attr == 1", "unknown field 'attr'"),
        ("attr.a.b == 1", "unknown field 'attr.a.b'"),
        (r"uri == 'a\q'", r"unknown escape '\\q'"),
        ("uri == 'a", "not part of the filter language"),
        ("uri == 'a\0'", "NUL"),
        ("uri == 'a\ud800'", "surrogate"),
        ("area > 9223372036854775808", "numbers must be between"),
        ("area > 1e39", "numbers must be between"),
        ("area > -" + "1" * 8000, "numbers must be between"),
        ("area > 1e999", "numbers must be between"),
        ("area > 1x", "not part of the filter language"),
        ("area > 1; drop", "not part of the filter language"),
        ("(" * (MAX_DEPTH + 1) + "area > 1", "nested deeper than 16"),
        ("not " * 5000 + "area > 1", "at most 8192 characters are allowed"),
        ("not " * 50 + "area > 1", "nested deeper"),
    ],
)
def test_a_wrong_filter_raises_an_error(text: str, problem: str) -> None:
    with pytest.raises(FilterError, match=problem) as caught:
        parse(text)
    assert caught.value.field == "filter"


def test_longest_filter_is_parsed() -> None:
    text = "area > 1" + " or area > 1" * 600
    assert len(text) <= MAX_LENGTH
    tree = parse(text)
    assert isinstance(tree, Or)
    assert len(tree.operands) == 601


def test_strings_cannot_break_out_of_their_quotes() -> None:
    rendered = render_milvus(parse("""uri == '" or 1 == 1 or uri == "'"""))
    assert rendered == r"""(uri == "\" or 1 == 1 or uri == \"")"""


# --- numpy and Milvus agree --------------------------------------------------------------------

STRINGS = (
    "",
    "a",
    "A",
    "ab",
    "a%",
    "a_",
    "a\nb",
    'q"q',
    "q'q",
    "b\\",
    "é",
    "\ud7ff",
    "😀",
    "\U0010ffff",
)
NUMBERS = (-2, -0.5, 0, 0.1, 0.25, 1, 1.5, 2**40)
COLUMNS: dict[str, tuple[Value, ...]] = {
    "text": STRINGS,
    "number": NUMBERS,
    "flag": (True, False),
    "never": (),
}
VERSION = "v1"


def _images() -> Iterator[IndexedImage]:
    """120 images of one instance; attributes are absent or null now and then.

    Each attribute keeps to one type: Milvus Lite, unlike a server and the reference, holds
    `true == 1` for true.
    """
    rng = np.random.default_rng(11)
    grid = np.array([0, 0.1, 0.25, 0.5, 1], dtype=np.float32)
    for number in range(120):
        attributes: dict[str, Value | None] = {}
        for name, values in COLUMNS.items():
            if values and (draw := rng.integers(len(values) + 2)) < len(values) + 1:
                attributes[name] = values[draw] if draw < len(values) else None
        x, y = np.sort(rng.choice(grid, 2)), np.sort(rng.choice(grid, 2))
        vector = np.array([[1, number]], dtype=np.float32)
        record = ImageRecord(
            image_id=f"{number:03}",
            uri=STRINGS[number % len(STRINGS)],
            status="indexed",
            num_instances=1,
            attributes=attributes,
        )
        boxes = np.array([[x[0], y[0], x[1], y[1]]], dtype=np.float32)
        instances = Instances(boxes, rng.choice(grid, 1), vector, vector[0])
        yield IndexedImage(record, instances)


IMAGES = tuple(_images())


def column(field: Field) -> Column:
    """The images above, one row each."""
    records = [image.record for image in IMAGES]
    instances = [image.instances for image in IMAGES if image.instances is not None]
    if field.attribute:
        return Column(objects([record.attributes.get(field.name) for record in records]))
    if field.name not in NUMBER_FIELDS:
        return Column(objects([getattr(record, field.name) for record in records]))
    if field.name == "area":
        return Column(np.concatenate([each.areas for each in instances]))
    if field.name == "objectness":
        return Column(np.concatenate([each.objectness for each in instances]))
    if field.name == "neighbors":
        return Column(np.zeros(len(instances), dtype=np.float32))
    if field.name in ("cx", "cy", "width", "height"):
        x1, y1, x2, y2 = np.concatenate([each.boxes for each in instances]).T
        values = {"cx": (x1 + x2) / 2, "cy": (y1 + y2) / 2, "width": x2 - x1, "height": y2 - y1}
        return Column(values[field.name])
    corner = ("x1", "y1", "x2", "y2").index(field.name)
    return Column(np.concatenate([each.boxes for each in instances])[:, corner])


def selected(tree: Filter) -> list[str]:
    mask = evaluate(tree, column)
    return [image.record.image_id for image, kept in zip(IMAGES, mask, strict=True) if kept]


def _comparisons() -> st.SearchStrategy[Filter]:
    orders = st.sampled_from(["==", "<", "<=", ">", ">="])
    texts = st.sampled_from(STRINGS) | st.text(
        st.characters(codec="utf-8", exclude_characters="\0")
    )
    numbers = (
        st.sampled_from(NUMBERS)
        | st.integers(-(2**50), 2**50)
        | st.floats(-1e30, 1e30, allow_nan=False)
    )
    text_fields = st.sampled_from([Field("uri"), Field("text", attribute=True)])
    number_fields = st.sampled_from(
        [*(Field(name) for name in NUMBER_FIELDS), Field("number", attribute=True)]
    )
    flag = st.just(Field("flag", attribute=True))
    never = st.just(Field("never", attribute=True))
    return st.one_of(
        st.builds(Comparison, text_fields | never, orders, texts),
        st.builds(Comparison, number_fields | never, orders, numbers),
        st.builds(Comparison, flag | never, st.just("=="), st.booleans()),
        st.builds(In, text_fields | never, st.lists(texts, max_size=3).map(tuple)),
        st.builds(In, number_fields | never, st.lists(numbers, max_size=3).map(tuple)),
        st.builds(StartsWith, text_fields | never, texts),
    )


TREES = st.recursive(
    _comparisons(),
    lambda inner: st.one_of(
        inner.map(Not),
        st.lists(inner, min_size=2, max_size=3).map(lambda each: And(tuple(each))),
        st.lists(inner, min_size=2, max_size=3).map(lambda each: Or(tuple(each))),
    ),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def lite(lite_store: MilvusStore) -> MilvusStore:
    return _filled(lite_store)


@pytest.fixture(scope="module")
def server(server_store: MilvusStore) -> MilvusStore:
    return _filled(server_store)


def _filled(store: MilvusStore) -> MilvusStore:
    if "filters" in store.galleries():
        store.drop_gallery("filters")
    with pytest.MonkeyPatch.context() as patch:  # Lite can filter by these columns too
        patch.setattr(rows, "mask_columns", lambda _: rows.DERIVED_COLUMNS)
        store.create_version("filters", VERSION, VersionSpec(dim=2, digest="d"))
    store.upsert_images("filters", VERSION, IMAGES)
    return store


def _selected_by_milvus(store: MilvusStore, tree: Filter) -> list[str]:
    found = store._catalog.instances("filters", VERSION).pages(render_milvus(tree))
    return [row["image_id"] for row in found]


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(tree=TREES)
@example(tree=In(AREA, (-0.0,)))
def test_milvus_lite_selects_what_numpy_selects(lite: MilvusStore, tree: Filter) -> None:
    assert _selected_by_milvus(lite, tree) == selected(tree)


@pytest.mark.milvus
@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(tree=TREES)
def test_a_server_selects_what_numpy_selects(server: MilvusStore, tree: Filter) -> None:
    assert _selected_by_milvus(server, tree) == selected(tree)


MIXED: tuple[Attributes, ...] = ({}, {"k": None}, {"k": 1}, {"k": 1.0}, {"k": True}, {"k": "1"})


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("attr.k == 1", [2, 3]),
        ("attr.k != 1", [0, 1, 4, 5]),
        ("attr.k == true", [4]),
        ('attr.k == "1"', [5]),
        ("attr.k < 5", [2, 3]),
        ('attr.k < "5"', [5]),
        ('attr.k in [1, "1", true]', [2, 3, 4, 5]),
        ('attr.k startswith ""', [5]),
        ("not (attr.k > 0 or attr.k <= 0)", [0, 1, 4, 5]),
    ],
)
def test_values_of_different_types_are_never_equal(text: str, kept: list[int]) -> None:
    values = Column(objects([attributes.get("k") for attributes in MIXED]))
    mask = evaluate(parse(text), lambda _: values)
    assert np.flatnonzero(mask).tolist() == kept


@pytest.mark.parametrize(
    "values",
    [
        objects([None, *NUMBERS, *STRINGS, True, False, 2**53 + 1]),
        np.array(NUMBERS, dtype=np.float32),
    ],
)
def test_in_selects_what_comparisons_one_by_one_select(values: npt.NDArray[Any]) -> None:
    literals = (0.1, -0.0, 1, 2**53 + 1, float(2**53), *range(-99, 0))
    if values.dtype == object:
        literals += (True, "a", "é", "0.1")
    tree = Or(tuple(Comparison(CAMERA, "==", each) for each in literals))
    wanted = evaluate(tree, lambda _: Column(values))
    assert wanted.any()
    assert not wanted.all()
    assert evaluate(In(CAMERA, literals), lambda _: Column(values)).tolist() == wanted.tolist()


def test_in_compares_each_value_once() -> None:
    """With one pass for each literal, a long list over many photos would take half a minute."""
    names = objects([f"{number:020}" for number in range(100_000)])
    tree = In(Field("image_id"), tuple(names[:400]))
    began = time.process_time()
    mask = evaluate(tree, lambda _: Column(names))
    assert time.process_time() - began < 2
    assert mask.sum() == 400


def test_values_of_images_apply_to_all_their_instances() -> None:
    spread = Column(objects(["a", "b"]), np.array([0, 0, 1, 0]))
    mask = evaluate(parse('image_id == "a"'), lambda _: spread)
    assert mask.tolist() == [True, True, False, True]


def test_every_store_accepts_the_largest_filters(store: InstanceStore, gallery: str) -> None:
    store.create_version(gallery, VERSION, VersionSpec(dim=2, digest="d"))
    store.upsert_images(gallery, VERSION, IMAGES[:5])
    listed = ", ".join(f"{number}" for number in range(1000))
    query = np.ones((1, 2), dtype=np.float32)
    for where in (
        f"attr.number in [{listed}]",
        f"attr.number not in [{listed}]",
        "not " * (MAX_DEPTH - 1) + "attr.flag == true",
        "(attr.flag == true and " * (MAX_DEPTH - 1) + "area >= 0" + ")" * (MAX_DEPTH - 1),
        "area > 2" + " or area >= 0" * 600,
    ):
        # As with the conditions that the platform adds; see `parse`.
        widest = f'image_id >= "" and ({"area >= 0".ljust(ADDED_LENGTH)} and ({where}))'
        wanted = evaluate(parse(where), column)[:5].sum()
        for each in (where, widest):
            assert len(store.search(gallery, VERSION, query, 10, where=each)[0]) == wanted
