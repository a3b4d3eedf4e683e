"""Remote storage of a run: a folder, and a bucket on a local S3 server."""

from __future__ import annotations

from pathlib import Path

import pytest

from reir.errors import ConfigError
from reir_training.run.storage import open_checked_storage, open_storage


@pytest.fixture(params=["folder", "file URI", "bucket"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URI of a storage of each kind."""
    if request.param == "bucket":
        return f"s3://runs-of-reir/{tmp_path.name}/run{request.getfixturevalue('s3_options')}"
    home = tmp_path / "home"
    return str(home) if request.param == "folder" else f"file://{home}"


def test_pushed_files_can_be_pulled(uri: str, tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    (here / "checkpoint").mkdir(parents=True)
    there.mkdir()
    (here / "metrics.jsonl").write_text("one\n")
    (here / "checkpoint" / "config.json").write_text("{}")
    storage = open_checked_storage(uri)
    for name in ("metrics.jsonl", "checkpoint"):
        storage.push(here / name)
        open_storage(uri).pull(there / name)
    assert (there / "metrics.jsonl").read_text() == "one\n"
    assert (there / "checkpoint" / "config.json").read_text() == "{}"


def test_pull_keeps_the_longer_file(uri: str, tmp_path: Path) -> None:
    lines = tmp_path / "metrics.jsonl"
    storage = open_checked_storage(uri)
    storage.pull(lines)
    assert not lines.exists()  # the storage had none
    lines.write_text("one\n")
    storage.push(lines)
    lines.write_text("one\ntwo\n")
    storage.pull(lines)
    assert lines.read_text() == "one\ntwo\n"
    storage.push(lines)
    lines.write_text("one\n")
    storage.pull(lines)
    assert lines.read_text() == "one\ntwo\n"


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("s4://bucket/run", "s4://bucket/run"),
        ("s3://bucket/run?regoin=x", "regoin"),
        ("/proc/no/such/folder", "/proc/no/such/folder"),
    ],
)
def test_error_names_an_unusable_storage(uri: str, said: str) -> None:
    with pytest.raises(ConfigError, match="cannot be used") as caught:
        open_checked_storage(uri)
    assert said in str(caught.value)


def test_error_names_a_missing_bucket(s3_options: str) -> None:
    with pytest.raises(ConfigError, match="'s3://no-such-bucket/run' cannot be used"):
        open_checked_storage(f"s3://no-such-bucket/run{s3_options}")


def test_secrets_in_a_uri_are_not_shown(s3_options: str) -> None:
    with pytest.raises(ConfigError) as caught:
        open_checked_storage(f"s3://me:secret@no-such-bucket/run{s3_options}")
    assert "'s3://no-such-bucket/run'" in str(caught.value)
    assert "secret" not in str(caught.value)
