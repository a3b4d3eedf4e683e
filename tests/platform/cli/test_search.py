"""Pictures of `--draw`: every suffix that is accepted can be written."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from reir.cli.search import check_picture
from reir.errors import ConfigError


@pytest.mark.parametrize("suffix", sorted(Image.registered_extensions()))
def test_a_picture_is_accepted_if_it_can_be_written(tmp_path: Path, suffix: str) -> None:
    try:
        check_picture(tmp_path / f"hits{suffix}")
    except ConfigError:
        with pytest.raises((KeyError, OSError, ValueError)):
            Image.new("RGB", (320, 240)).save(tmp_path / f"hits{suffix}")
    else:
        Image.new("RGB", (320, 240)).save(tmp_path / f"hits{suffix}")


@pytest.mark.parametrize("name", ["hits.png", "hits.JPG", "hits.jpeg", "hits.webp", "hits.pdf"])
def test_usual_pictures_are_accepted(tmp_path: Path, name: str) -> None:
    check_picture(tmp_path / name)


@pytest.mark.parametrize("suffix", [".emf", ".xbm", ".psd"])
def test_the_message_names_suffixes_that_work(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"^--draw .*: cannot write \{suffix}; use \.png, \.jpg or \.webp"
    ):
        check_picture(tmp_path / f"hits{suffix}")
