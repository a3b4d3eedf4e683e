"""The search planner: its parts cover every id exactly once."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reir.images.decode import image_id
from reir.records import IndexedImage
from reir.store import VersionSpec, planner
from reir.store.memory import MemoryStore
from reir.store.milvus_server import MilvusServerStore
from reir.store.planner import GRAPH_SHARE, PART_SHARE, REMEMBER_S, SearchPlanner, split

DIM = 8

MakeImage = Callable[..., IndexedImage]


def meets(condition: str, image: str) -> bool:
    """Whether an image id lies in the range that a part names."""
    return all(
        image < bound if sign == "<" else image >= bound
        for sign, bound in re.findall(r'image_id (<|>=) "(\w+)"', condition)
    )


@given(share=st.floats(0, 1), ids=st.lists(st.text(min_size=1), max_size=20))
def test_each_id_is_in_exactly_one_part(share: float, ids: list[str]) -> None:
    parts = split("area > 0.5", share)
    for each in (*ids, "0000", "ffff", "8000", image_id("file:///a"), "~"):
        assert sum(meets(part, each) for part in parts) == 1


@pytest.mark.parametrize(
    ("share", "count"),
    [(0, 1), (0.001, 1), (PART_SHARE, 1), (0.051, 2), (0.1, 2), (0.3, 6), (GRAPH_SHARE, 1), (1, 1)],
)
def test_parts_are_small_enough_to_be_scanned(share: float, count: int) -> None:
    parts = split("area > 0.5", share)
    assert len(parts) == count
    if count == 1:
        assert parts == ["area > 0.5"]
        return
    ids = [image_id(f"file:///{number}") for number in range(20_000)]
    for part in parts:
        kept = share * sum(meets(part, each) for each in ids) / len(ids)
        assert kept < 0.07


def test_a_share_is_cached_for_a_while() -> None:
    asked: list[str] = []
    now_s = 0.0

    def count(condition: str) -> int:
        asked.append(condition)
        return 200 if condition else 1000

    searches = SearchPlanner(lambda: now_s)
    assert searches.parts("v", "", count) == [""]
    assert asked == []
    for _ in range(3):
        assert len(searches.parts("v", "a > 1", count)) == 4
    assert asked == ["a > 1", ""]
    searches.parts("other", "a > 1", count)
    assert len(asked) == 4
    now_s += REMEMBER_S
    searches.parts("v", "a > 1", count)
    assert len(asked) == 6


def test_an_empty_version_is_one_part() -> None:
    assert SearchPlanner().parts("v", "a > 1", lambda _: 0) == ["a > 1"]


def test_the_size_of_the_cache_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "_MAX_KNOWN", 5)
    searches = SearchPlanner()
    for number in range(40):
        searches.parts("v", f"a > {number}", lambda _: 1)
        assert len(searches._known) <= 5


@pytest.mark.milvus
def test_parts_together_give_the_results_of_one_search(
    server_store: MilvusServerStore, make_image: MakeImage
) -> None:
    """Filters that keep a tenth to a third, over images whose ids are hashes, and over others."""
    spec = VersionSpec(dim=DIM, digest="d")
    twin = MemoryStore()
    names = [image_id(f"file:///{number}") for number in range(60)] + ["a", "zz", "~"]
    images = [make_image(name, 4, attributes={"n": i % 10}) for i, name in enumerate(names)]
    for store in (server_store, twin):
        store.create_version("planned", "v1", spec)
        store.upsert_images("planned", "v1", images)
    queries = np.random.default_rng(0).standard_normal((3, DIM)).astype(np.float32)
    for where in ("attr.n < 1", "attr.n < 2", "attr.n < 3"):
        found = server_store.search("planned", "v1", queries, 9, where=where)
        wanted = twin.search("planned", "v1", queries, 9, where=where)
        for hits, other in zip(found, wanted, strict=True):
            assert [hit.instance_id for hit in hits] == [hit.instance_id for hit in other]
    known = [name for name, _ in server_store._planner._known if name.startswith("planned__")]
    assert len(known) == 3, "of the other tests with this store there are more"
    server_store.drop_gallery("planned")
