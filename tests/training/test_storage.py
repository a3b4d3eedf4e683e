"""A run's second home: a folder, and a bucket on an S3 server of this machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from reir.errors import ConfigError
from reir_training.storage import checked_storage, open_storage


@pytest.fixture(params=["folder", "file URI", "bucket"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A storage of each kind."""
    if request.param == "bucket":
        return f"s3://runs-of-reir/{tmp_path.name}/run{request.getfixturevalue('s3_options')}"
    home = tmp_path / "home"
    return str(home) if request.param == "folder" else f"file://{home}"


def test_what_is_pushed_is_pulled_elsewhere(uri: str, tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    (here / "checkpoint").mkdir(parents=True)
    there.mkdir()
    (here / "metrics.jsonl").write_text("one\n")
    (here / "checkpoint" / "config.json").write_text("{}")
    storage = checked_storage(uri)
    for name in ("metrics.jsonl", "checkpoint"):
        storage.push(here / name)
        open_storage(uri).pull(there / name)
    assert (there / "metrics.jsonl").read_text() == "one\n"
    assert (there / "checkpoint" / "config.json").read_text() == "{}"


def test_the_longer_file_stays(uri: str, tmp_path: Path) -> None:
    lines = tmp_path / "metrics.jsonl"
    storage = checked_storage(uri)
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
def test_a_storage_that_cannot_be_used_is_named(uri: str, said: str) -> None:
    with pytest.raises(ConfigError, match="cannot be used") as caught:
        checked_storage(uri)
    assert said in str(caught.value)


def test_a_bucket_that_is_not_there_is_named(s3_options: str) -> None:
    with pytest.raises(ConfigError, match="'s3://no-such-bucket/run' cannot be used"):
        checked_storage(f"s3://no-such-bucket/run{s3_options}")


def test_secrets_in_a_uri_are_not_shown(s3_options: str) -> None:
    with pytest.raises(ConfigError) as caught:
        checked_storage(f"s3://me:secret@no-such-bucket/run{s3_options}")
    assert "'s3://no-such-bucket/run'" in str(caught.value)
    assert "secret" not in str(caught.value)
