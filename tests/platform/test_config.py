"""Strict configuration: what is accepted, and what each mistake says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, ValidationError, model_validator

from reir.config import StrictConfig, dump_config, load_config, reir_home
from reir.errors import ConfigError


class Graph(StrictConfig):
    kind: Literal["HNSW", "FLAT"] = "HNSW"
    num_links: int = Field(default=16, ge=2, le=64)
    ef_build: int = 200


class Source(StrictConfig):
    path: str
    weight: float = Field(default=1.0, gt=0)


class Index(StrictConfig):
    graph: Graph = Graph()
    sources: tuple[Source, ...] = ()
    spare: Graph | None = None
    num_candidates: int = Field(default=30, ge=1, le=900)
    batch_rows: int = 64

    @model_validator(mode="after")
    def _fits(self) -> Index:
        if self.batch_rows > 1000 * self.num_candidates:
            raise ValueError(
                f"batch_rows ({self.batch_rows}) must be at most 1000 x num_candidates "
                f"({self.num_candidates})"
            )
        return self


def message_of(
    source: Path | Mapping[str, Any] | None = None, overrides: Sequence[str] = ()
) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(Index, source, overrides)
    return str(caught.value)


def test_defaults() -> None:
    assert load_config(Index) == Index()
    assert load_config(Index, {}).graph.num_links == 16


def test_yaml_file_and_overrides(tmp_path: Path) -> None:
    path = tmp_path / "index.yaml"
    path.write_text("graph:\n  ef_build: 100\nnum_candidates: 10\nsources:\n- {path: a}\n")
    config = load_config(
        Index, path, overrides=["graph.num_links=32", "num_candidates=5", "num_candidates=7"]
    )
    assert config.graph == Graph(num_links=32, ef_build=100)
    assert config.num_candidates == 7
    assert config.sources == (Source(path="a"),)
    assert load_config(Index, str(path)).num_candidates == 10


def test_the_source_mapping_is_left_alone() -> None:
    values = {"graph": {"ef_build": 100}}
    load_config(Index, values, overrides=["graph.ef_build=7"])
    assert values == {"graph": {"ef_build": 100}}


def test_an_override_may_hold_a_list_or_a_section() -> None:
    config = load_config(
        Index, overrides=["sources=[{path: x, weight: 2}]", "spare={ef_build: 3}", "graph={}"]
    )
    assert config.sources == (Source(path="x", weight=2),)
    assert config.spare == Graph(ef_build=3)


def test_empty_file_means_defaults(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("# nothing\n")
    assert load_config(Index, path) == Index()


def test_unknown_key_names_the_nearest_the_section_and_the_file(tmp_path: Path) -> None:
    path = tmp_path / "index.yaml"
    path.write_text("graph:\n  ef_bulid: 100\n")
    assert message_of(path) == (
        "unknown key 'ef_bulid' in section 'graph'; did you mean 'ef_build'? "
        f"allowed: ef_build, kind, num_links (file {path})"
    )


def test_unknown_key_at_the_top_and_without_a_near_one() -> None:
    assert message_of({"zzz": 1}) == (
        "unknown key 'zzz'; allowed: batch_rows, graph, num_candidates, sources, spare"
    )


def test_unknown_key_within_a_list_and_an_optional_section() -> None:
    assert message_of({"sources": [{"path": "a"}, {"path": "b", "wieght": 2}]}) == (
        "unknown key 'wieght' in section 'sources.1'; did you mean 'weight'? allowed: path, weight"
    )
    assert message_of({"spare": {"knd": "FLAT"}}) == (
        "unknown key 'knd' in section 'spare'; did you mean 'kind'? "
        "allowed: ef_build, kind, num_links"
    )


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("num_candidates=0", "'num_candidates': got 0; input should be greater than or equal to 1"),
        ("graph.num_links=99", "'graph.num_links': got 99; input should be less than or"),
        ("graph.kind=IVF", "'graph.kind': got 'IVF'; input should be 'HNSW' or 'FLAT'"),
        ("num_candidates=many", "'num_candidates': got 'many'; input should be a valid integer"),
        ("graph=3", "'graph': got 3; input should be a valid dictionary or instance of Graph"),
        ("sources=[{weight: 1}]", "'sources.0.path' is required and has no default"),
        ("sources=[{path: a, weight: .inf}]", "'sources.0.weight': got inf; input should be"),
        ("batch_rows=900000", "the configuration: batch_rows (900000) must be at most 1000 x"),
        ("batch_rows", "override 'batch_rows' must have the form section.key=value"),
        ("=3", "override '=3' must have the form section.key=value"),
        ("graph..x=3", "override 'graph..x=3' must have the form section.key=value"),
        ("batch_rows=[", "override 'batch_rows=[': the value is not YAML"),
        ("a=2026-02-30", "override 'a=2026-02-30': the value is not YAML: day is out of range"),
    ],
)  # fmt: skip
def test_wrong_values_name_key_value_and_allowed(override: str, expected: str) -> None:
    assert message_of(overrides=[override]).startswith(expected)


def test_override_below_a_plain_value_is_refused() -> None:
    assert message_of({"batch_rows": 3}, overrides=["batch_rows.x=1"]) == (
        "override 'batch_rows.x=1': 'batch_rows' is a value (3), not a section"
    )


def test_all_mistakes_are_named_at_once() -> None:
    lines = message_of({"zzz": 1, "num_candidates": 0}).splitlines()
    assert len(lines) == 2


def test_unreadable_files(tmp_path: Path) -> None:
    assert "No such file" in message_of(tmp_path / "none.yaml")
    assert "Is a directory" in message_of(tmp_path)
    for text, said in (
        (b"a: [", "is not YAML"),
        (b"\xff\xfe\xfa", "is not YAML"),
        (b"created: 2026-02-30", "is not YAML: day is out of range"),
        (b"a: !!bool x", "is not YAML"),
        (b"a: !!int ''", "is not YAML"),
        (b"a: !!timestamp x", "is not YAML"),
        (b"[" * 2000, "is not YAML"),
        (b"- a", "got a list"),
    ):
        path = tmp_path / "bad.yaml"
        path.write_bytes(text)
        assert said in message_of(path)


def test_yaml_builds_no_python_objects(tmp_path: Path) -> None:
    path = tmp_path / "evil.yaml"
    path.write_text("graph: !!python/object/apply:os.getcwd []\n")
    assert "is not YAML" in message_of(path)


def test_configurations_are_frozen() -> None:
    config = load_config(Index)
    with pytest.raises(ValidationError, match="frozen"):
        setattr(config, "batch_rows", 3)  # noqa: B010


@given(
    st.builds(
        Index,
        graph=st.builds(Graph, num_links=st.integers(2, 64), ef_build=st.integers()),
        num_candidates=st.integers(1, 900),
        sources=st.lists(
            st.builds(Source, path=st.text(), weight=st.floats(0.1, 1e6)), max_size=3
        ).map(tuple),
    )
)
def test_dumped_configurations_read_back_equal(config: Index) -> None:
    assert load_config(Index, yaml.safe_load(dump_config(config))) == config


def test_reir_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("REIR_HOME", raising=False)
    assert reir_home() == tmp_path / ".reir"
    monkeypatch.setenv("REIR_HOME", "")
    assert reir_home() == tmp_path / ".reir"
    monkeypatch.setenv("REIR_HOME", "~/kept")
    assert reir_home() == tmp_path / "kept"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REIR_HOME", "here")
    assert reir_home() == tmp_path / "here"
