"""The output folder of a fine-tune."""

from __future__ import annotations

from pathlib import Path

import pytest

from reir.errors import ConfigError
from reir_training.finetune.work import OutputFolder


def test_a_finished_part_is_not_repeated(tmp_path: Path) -> None:
    calls: list[str] = []

    def make() -> dict[str, object]:
        calls.append("made")
        return {"pair": (1, 2)}

    request = {"gallery": "mine", "epochs": 3}
    folder = OutputFolder(tmp_path / "deep" / "out", request)
    assert folder.part("one", make) == {"pair": [1, 2]}
    with pytest.raises(RuntimeError):
        folder.part("two", lambda: (_ for _ in ()).throw(RuntimeError("stopped")))
    again = OutputFolder(tmp_path / "deep" / "out", request)
    assert again.part("one", make) == {"pair": [1, 2]}
    assert again.part("two", make) == {"pair": [1, 2]}
    assert calls == ["made"] * 2
    assert list(again.minutes()) == ["one", "two"]


def test_another_request_is_refused(tmp_path: Path) -> None:
    OutputFolder(tmp_path, {"gallery": "mine", "epochs": 3})
    with pytest.raises(ConfigError, match=r"another fine-tune \(epochs, fold differ\); choose"):
        OutputFolder(tmp_path, {"gallery": "mine", "epochs": 4, "fold": 0.2})
