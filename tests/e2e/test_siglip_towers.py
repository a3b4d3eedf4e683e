"""From public SigLIP towers to search hits, with the commands of the documentation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from reir.checkpoint import read_config, read_tokenizer
from reir.cli import main
from reir.datasets.coco_classes import COCO_CLASSES
from reir_testing.pretrained import save_siglip_towers
from reir_testing.tiny_clare import tiny_clare_config, tiny_training


@pytest.mark.slow
@pytest.mark.ray
def test_towers_with_a_sentencepiece_model_can_be_trained_and_used_for_indexing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("REIR_STORE", str(tmp_path / "store"))
    values = tiny_training(tmp_path)
    said = [f"the {color} {name}" for name in COCO_CLASSES for color in ("red", "blue", "green")]
    towers = save_siglip_towers(tmp_path / "towers", tiny_clare_config(), said)
    values["shape"]["vocabulary"] = tiny_clare_config().vocabulary
    data, output = tmp_path / "grounding.yaml", tmp_path / "run"
    data.write_text(yaml.safe_dump({**values, "towers": str(towers)}))

    command = ["train", "--preset", "clare-base", "--stage", "grounding", "--data", str(data)]
    assert main.run([*command, "--output", str(output)]) == 0
    checkpoint = output / "checkpoint"
    assert read_config(checkpoint)["training"]["towers"] == "towers"
    marked = read_tokenizer(checkpoint / "tokenizer.json").encode("the red dog").ids
    assert marked[-1] == tiny_clare_config().pad_token  # SigLIP pads with its end mark

    photos = str(tmp_path / "scenes" / "images")
    with_it = ["--gallery", "scenes", "--checkpoint", str(checkpoint)]
    assert main.run(["index", photos, *with_it]) == 0
    capsys.readouterr()
    assert main.run(["search", "the red circle", *with_it, "--json", "-k", "2"]) == 0
    assert len(json.loads(capsys.readouterr().out)["hits"]) == 2
