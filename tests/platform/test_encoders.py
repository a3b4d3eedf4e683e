"""Encoders by name: what a spec may be, what it loads, and what is said when it cannot."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from reir.checkpoint import SHIPPED, save_checkpoint, weights_digest
from reir.encoders import EncoderSpec, load_encoder_spec, parse_encoder_spec, stored_spec
from reir.errors import CheckpointError, ConfigError
from reir.models.interfaces import InstanceEncoder
from reir.store import VersionSpec
from reir.store.memory import MemoryStore
from reir_testing import FakeEncoder, draw_scene
from reir_testing.pretrained import save_tiny_owlv2, save_tiny_siglip
from reir_testing.tiny import tiny_model, tiny_tokenizer

IMAGE = draw_scene((120, 80), [("red", (10, 10, 50, 70)), ("blue", (70, 20, 110, 60))])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One directory of each kind, named after it."""
    top = tmp_path_factory.mktemp("encoders")
    save_checkpoint(top / "clare", tiny_model(), tiny_tokenizer(), {})
    save_tiny_owlv2(top / "owlv2")
    save_tiny_siglip(top / "siglip-crops")
    return top


# ---------------------------------------------------------------------------------------- parsing


@pytest.mark.parametrize(
    ("text", "kind", "source"),
    [
        ("", "clare-nano", ""),
        ("clare-nano", "clare-nano", ""),
        (
            " owlv2:google/owlv2-base-patch16-ensemble ",
            "owlv2",
            "google/owlv2-base-patch16-ensemble",
        ),
        ("owlv2:acme/owl@main", "owlv2", "acme/owl@main"),
        (
            "siglip-crops:google/siglip2-base-patch16-224",
            "siglip-crops",
            "google/siglip2-base-patch16-224",
        ),
        ("clare:runs/1", "clare", "runs/1"),
        ("clare-masks:runs/1", "clare-masks", "runs/1"),
        ("owlv2:a:b", "owlv2", "a:b"),
    ],
)
def test_specs_are_a_kind_and_a_source(text: str, kind: str, source: str) -> None:
    spec = parse_encoder_spec(text)
    assert spec == EncoderSpec(kind, source)
    assert parse_encoder_spec(str(spec)) == spec


def test_directories_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "owlv2").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    wanted = EncoderSpec("clare", str(tmp_path.resolve() / "runs"))
    for text in ("runs", "./runs", "clare:runs", "~/runs", str(tmp_path / "runs")):
        assert parse_encoder_spec(text) == wanted, text
    assert parse_encoder_spec("owlv2:runs") == EncoderSpec("owlv2", wanted.source)
    assert parse_encoder_spec("owlv2").kind == "clare", "a folder may be called so"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "owlv:google/x",
            r"unknown kind of encoder 'owlv' in 'owlv:google/x'; did you mean 'owlv2'",
        ),
        (
            "siglip_crops:x",
            r"did you mean 'siglip-crops'\? use one of clare-nano, clare, clare-masks",
        ),
        ("clip:x", r"unknown kind of encoder 'clip'"),
        ("owlv2", r"'owlv2' must have the form owlv2:NAME_OR_DIR"),
        ("siglip-crops:", r"must have the form siglip-crops:NAME_OR_DIR"),
        ("clare-nano:x", r"'clare-nano:x' must have the form clare-nano; use one of"),
        ("no/such/folder", r"'no/such/folder' is neither a directory nor a kind; use one of"),
        (":x", r"unknown kind of encoder ''"),
    ],
)
def test_what_is_no_spec_says_what_is(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_encoder_spec(text)


# ---------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize(("kind", "dim"), [("clare", 33), ("owlv2", 34), ("siglip-crops", 32)])
def test_each_kind_loads_and_keeps_the_contract(folders: Path, kind: str, dim: int) -> None:
    encoder: InstanceEncoder = load_encoder_spec(f"{kind}:{folders / kind}")
    assert encoder.dim == dim
    assert len(encoder.digest) == 64
    queries = encoder.encode_expressions(["the red dog", "a blue cat"])
    assert queries.shape == (2, dim)
    assert queries.dtype == np.float32
    (found,) = encoder.encode_images([IMAGE])
    assert len(found) <= encoder.num_candidates
    assert found.dim == dim
    for vectors in (queries, found.vectors, found.image_vector[None]):
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert load_encoder_spec(f"{kind}:{folders / kind}").digest == encoder.digest


def test_relations_change_the_vectors_of_siglip_crops_only(folders: Path) -> None:
    plain, related = (
        load_encoder_spec(f"{kind}:{folders / 'siglip-crops'}")
        for kind in ("siglip-crops", "siglip-relations")
    )
    (one,), (other,) = (each.encode_images([IMAGE]) for each in (plain, related))
    np.testing.assert_array_equal(one.boxes, other.boxes)
    assert np.abs(one.vectors - other.vectors).max() > 1e-3
    assert plain.digest != related.digest


def test_a_bare_directory_is_a_checkpoint(folders: Path) -> None:
    assert load_encoder_spec(str(folders / "clare")).digest == weights_digest(folders / "clare")


def test_the_empty_spec_is_the_shipped_checkpoint() -> None:
    assert load_encoder_spec("").digest == weights_digest(SHIPPED)


@pytest.mark.parametrize("kind", ["clare", "owlv2", "siglip-crops"])
def test_an_empty_directory_is_no_model(kind: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        load_encoder_spec(f"{kind}:{tmp_path}")


@pytest.mark.parametrize("missing", ["transformers", "scipy"])
def test_a_missing_package_names_the_extra(
    missing: str, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [name for name in sys.modules if name.startswith("reir.models.owlv2")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.delitem(sys.modules, "reir.models.pretrained", raising=False)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ConfigError) as caught:
        load_encoder_spec(f"owlv2:{folders / 'owlv2'}")
    assert missing in str(caught.value)
    assert "pip install 'reir-platform[clare]'" in str(caught.value)


def test_naming_an_encoder_is_light() -> None:
    code = (
        "import sys; from reir.encoders import parse_encoder_spec as p; p('owlv2:acme/owl')\n"
        "print(sorted({'numpy', 'torch', 'transformers', 'PIL'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# --------------------------------------------------------------------------- kept with a version


def test_a_gallery_knows_the_encoder_of_its_live_version() -> None:
    store, fake = MemoryStore(), FakeEncoder()
    assert stored_spec(store, "pets") == ""
    for version in ("owlv2:acme/owl", "clare-nano"):
        spec = VersionSpec(dim=fake.dim, digest=fake.digest, encoder=version)
        store.create_version("pets", version.partition(":")[0], spec)
    assert stored_spec(store, "pets") == ""
    store.promote("pets", "owlv2")
    assert stored_spec(store, "pets") == "owlv2:acme/owl"


def test_the_place_of_equal_weights_makes_no_other_version() -> None:
    first, second = (VersionSpec(dim=3, digest="d", encoder=f"clare:{name}") for name in "ab")
    assert first == second
    store = MemoryStore()
    store.create_version("pets", "v1", first)
    store.create_version("pets", "v1", second)
    assert store.versions("pets")[0].spec.encoder == "clare:a"
