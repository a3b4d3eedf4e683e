"""Names of galleries and versions, and of their Milvus collections."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reir.errors import ConfigError
from reir.store.names import (
    MAX_NAME_LENGTH,
    VersionKey,
    images_collection,
    instances_collection,
    live_alias,
    parse_instances_collection,
)

NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_mu-]{0,7}", fullmatch=True)
MILVUS = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,254}")


def test_plain_names_stay_readable() -> None:
    assert instances_collection("my_photos", "v1") == "my_photos__v1__instances"
    assert images_collection("my_photos", "v1") == "my_photos__v1__images"
    assert live_alias("my_photos") == "my_photos__live"


@given(NAMES, NAMES)
def test_encoded_names_are_decoded_again(gallery: str, version: str) -> None:
    collection = instances_collection(gallery, version)
    assert MILVUS.fullmatch(collection)
    assert parse_instances_collection(collection) == VersionKey(gallery, version)


@given(st.tuples(NAMES, NAMES), st.tuples(NAMES, NAMES))
def test_two_versions_never_share_a_collection(
    one: tuple[str, str], other: tuple[str, str]
) -> None:
    assert (one == other) == (instances_collection(*one) == instances_collection(*other))
    assert (one[0] == other[0]) == (live_alias(one[0]) == live_alias(other[0]))


@pytest.mark.parametrize("filler", ["-", "_", "m"])
def test_the_longest_names_fit_into_a_collection_name(filler: str) -> None:
    name = "9" + filler * (MAX_NAME_LENGTH - 1)
    assert MILVUS.fullmatch(instances_collection(name, name))


@pytest.mark.parametrize("name", ["", "a b", "é", "-a", "_a", "a.b", "a/b", "a\n", "x" * 61])
def test_names_that_are_not_allowed_raise_an_error(name: str) -> None:
    with pytest.raises(ConfigError, match="1 to 60 ASCII letters, digits"):
        instances_collection(name, "v1")
    with pytest.raises(ConfigError, match="version name"):
        instances_collection("g", name)


@pytest.mark.parametrize("collection", ["other", "a__b__images", "a__b__c__instances", "a-b"])
def test_other_collections_are_not_parsed(collection: str) -> None:
    assert parse_instances_collection(collection) is None
