"""A folder indexed with a public model and searched, as a user types it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from reir.checkpoint import save_checkpoint
from reir.cli import main
from reir.encoders import load_encoder_spec
from reir.images.decode import canonical_uri
from reir_testing.ingestion import write_scenes
from reir_testing.pretrained import save_tiny_owlv2
from reir_testing.tiny import tiny_model, tiny_tokenizer

Run = Callable[..., dict[str, Any]]
EXPRESSION = "the red one left of the bus"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny_owlv2(tmp_path / "model")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    write_scenes(tmp_path / "photos", 4)
    return tmp_path / "photos"


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("REIR_STORE", str(tmp_path / "store"))

    def run(*arguments: str, expect: int = 0) -> dict[str, Any]:
        """The JSON answer, or for a failure {"error": what was said}."""
        assert main.run([*arguments, "--gallery", "pets", "--json"]) == expect
        shown = capsys.readouterr()
        if expect:
            return {"error": " ".join(shown.err.split())}
        return dict(json.loads(shown.out))

    return run


def test_index_and_search_with_owlv2(
    run: Run, model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    report = run("index", "photos", "--encoder", "owlv2:model")
    assert (report["new"], report["num_failed"]) == (4, 0)

    monkeypatch.chdir(photos)  # the model is found from anywhere
    found = run("search", EXPRESSION, "-k", "3", "--per-image", "2")
    assert [(hit["uri"], hit["score"]) for hit in found["hits"]] == best_of(model, photos, 3, 2)

    again = run("index", str(photos))  # and stays the gallery's own
    assert (again["unchanged"], again["version"]) == (4, report["version"])


def best_of(model: Path, photos: Path, k: int, per_image: int) -> list[tuple[str, Any]]:
    """What the encoder says of the photos, sorted by Python."""
    encoder = load_encoder_spec(f"owlv2:{model}")
    (query,) = encoder.encode_expressions([EXPRESSION])
    rows: list[tuple[float, str]] = []
    for path in sorted(photos.iterdir()):
        image = np.asarray(Image.open(path).convert("RGB"))
        scores = encoder.encode_images([image])[0].vectors @ query
        best = sorted(scores.tolist(), reverse=True)[:per_image]
        rows += [(score, canonical_uri(path)) for score in best]
    return [(uri, pytest.approx(score, abs=1e-4)) for score, uri in sorted(rows)[::-1][:k]]


def test_a_model_that_has_moved_is_named_and_can_be_named_anew(
    run: Run, model: Path, photos: Path, tmp_path: Path
) -> None:
    run("index", str(photos), "--encoder", f"owlv2:{model}")
    shutil.move(model, tmp_path / "elsewhere")
    said = run("search", EXPRESSION, expect=1)["error"]
    assert f"gallery 'pets' was indexed with owlv2:{model}" in said
    assert "name its new place with --encoder" in said
    found = run("search", EXPRESSION, "--encoder", f"owlv2:{tmp_path / 'elsewhere'}")
    assert found["hits"]


def test_another_model_than_the_gallerys_is_refused(
    run: Run, model: Path, photos: Path, tmp_path: Path
) -> None:
    run("index", str(photos), "--encoder", f"owlv2:{model}")
    other = save_tiny_owlv2(tmp_path / "other", seed=1)
    said = run("search", EXPRESSION, "--encoder", f"owlv2:{other}", expect=1)["error"]
    assert "was built with checkpoint" in said


@pytest.mark.slow
def test_a_gallery_of_a_trained_checkpoint_is_searched_with_it(
    run: Run, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path / "trained", tiny_model(), tiny_tokenizer(), {})
    monkeypatch.chdir(tmp_path)
    first = run("index", "photos", "--checkpoint", "trained")
    monkeypatch.chdir(photos)
    assert run("search", EXPRESSION)["version"] == first["version"]
    assert run("index", ".", "--encoder", f"clare:{tmp_path / 'trained'}")["unchanged"] == 4
    back = run("index", ".", "--encoder", "clare-nano")
    assert (back["new"], list(back["kept_versions"])) == (4, [first["version"]])
    assert run("search", EXPRESSION)["version"] == back["version"]


@pytest.mark.parametrize("command", ["index", "search"])
def test_wrong_options_are_told_before_anything_is_loaded(
    command: str, run: Run, photos: Path, tmp_path: Path
) -> None:
    first = str(photos) if command == "index" else EXPRESSION
    said = run(command, first, "--encoder", "owlv:acme/owl", expect=2)["error"]
    assert "did you mean 'owlv2'?" in said
    both = ("--encoder", "clare-nano", "--checkpoint", "runs/1")
    assert "give only one" in run(command, first, *both, expect=2)["error"]
    assert not (tmp_path / "store").exists()
