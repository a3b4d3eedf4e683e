"""`reir index` as a user types it."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from reir.cli import main
from reir.records import Instances, RgbImage
from reir.store import open_store
from reir_ingestion.pipeline import index
from reir_testing import FakeEncoder
from reir_testing.ingestion import random_scene, write_scenes


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REIR_STORE", str(tmp_path / "store"))
    monkeypatch.setattr("reir.checkpoint.load_encoder", lambda _: FakeEncoder())


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    write_scenes(tmp_path / "photos", 6)
    (tmp_path / "photos" / "bad.jpg").write_bytes(b"no image")
    return tmp_path / "photos"


def test_the_summary_and_the_next_steps(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["index", str(photos), "--gallery", "pets"]) == 0
    shown = capsys.readouterr()
    assert "gallery pets" in shown.out
    assert "not_an_image" in shown.out
    assert "reir failures pets" in shown.out
    assert 'reir search "the red mug left of the laptop" --gallery pets' in shown.out
    assert "also keeps" not in shown.out
    assert "7/7" in shown.err
    assert "1 failed" in shown.err


def test_the_suggested_commands_work(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["index", str(photos), "--gallery", "pets"]) == 0
    capsys.readouterr()
    assert main.run(["failures", "pets", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["reasons"] == {"not_an_image": 1}
    assert main.run(["galleries", "--json"]) == 0
    (gallery,) = json.loads(capsys.readouterr().out)
    assert main.run(["promote", "pets", gallery["live"]]) == 0


def test_json_and_options(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["index", str(photos / "*.png"), "--json", "--batch-size", "2"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert (first["gallery"], first["new"], first["num_failed"]) == ("default", 3, 0)
    (photos / "000.png").unlink()
    assert main.run(["index", str(photos), "--json", "--prune"]) == 0
    second = json.loads(capsys.readouterr().out)
    assert (second["new"], second["unchanged"], second["removed"]) == (3, 2, 1)
    assert main.run(["index", str(photos), "--json", "--retry-failed"]) == 0
    third = json.loads(capsys.readouterr().out)
    assert (third["failed"], third["failed_before"], third["read"]) == ({"not_an_image": 1}, 0, 1)


def test_the_summary_names_the_version_of_the_previous_model(
    photos: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main.run(["index", str(photos), "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    monkeypatch.setattr("reir.checkpoint.load_encoder", lambda _: FakeEncoder(num_candidates=1))
    assert main.run(["index", str(photos)]) == 0
    shown = capsys.readouterr().out
    assert f"The gallery also keeps {first['version']} (7 photos)" in shown
    assert "reir rollback default" in shown


def test_a_wrong_source_is_reported_before_the_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reir.checkpoint.load_encoder", lambda _: pytest.fail("not needed"))
    assert main.run(["index", str(tmp_path / "none"), "--gallery", "pets"]) == 1
    assert "does not exist" in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


def test_the_runner_is_printed_and_gets_the_options(
    photos: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ray_runner = pytest.importorskip("reir_ingestion.ray.runner")
    given: list[Any] = []

    def instead(source: Any, gallery: str, location: Any, load: Any, **options: Any) -> Any:
        given.append((location, options["pool"], options["options"].batch_size))
        with closing(open_store(location)) as store:
            return index(source, gallery, store, load(), progress=options["progress"])

    monkeypatch.setattr(ray_runner, "index_on_ray", instead)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert main.run(["index", str(photos), "--runner", "local"]) == 0
    assert "Runner: threads of this process (as requested)" in capsys.readouterr().err
    assert given == []
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    typed = ["--num-workers", "3", "--num-gpus", "0.5", "--batch-size", "9", "--json"]
    assert main.run(["index", str(photos), *typed]) == 0
    shown = capsys.readouterr()
    assert "Runner: Ray Data (RAY_ADDRESS is head:6379)" in shown.err
    assert json.loads(shown.out)["unchanged"] == 6
    assert given == [
        (os.environ["REIR_STORE"], ray_runner.EncoderPoolOptions(max_encoders=3, num_gpus=0.5), 9)
    ]


@pytest.mark.ray
@pytest.mark.slow
def test_the_shipped_model_indexes_on_ray(photos: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from reir.cli.main import main; main()", "index", str(photos)]
    done = subprocess.run(
        [*command, "--gallery", "ray", "--runner", "ray", "--json"],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["new"], report["failed"]) == (6, {"not_an_image": 1})
    assert report["instances"] > 0
    here = subprocess.run(
        [*command, "--gallery", "ray", "--runner", "local", "--json"],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    second = json.loads(here.stdout)
    assert (second["version"], second["unchanged"], second["read"]) == (report["version"], 6, 0)


CHILD = """
import os, reir.checkpoint, signal, sys, time
from reir.cli import main
from reir_testing import FakeEncoder
class SlowEncoder(FakeEncoder):
    def encode_images(self, images):
        time.sleep(0.2)
        os.write(1, b"encoding\\n")  # at once: photos are encoded side by side
        return super().encode_images(images)
reir.checkpoint.load_encoder = lambda _: SlowEncoder()
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(main.run(["index", sys.argv[1], "--gallery", "pets", "--batch-size", "1"]))
"""


def test_ctrl_c_says_that_nothing_is_lost(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_scenes(tmp_path / "photos", 40)
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(photos)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a shell starts what runs in its background with Ctrl-C ignored, and children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert child.stdout is not None
    for _ in range(6):
        assert child.stdout.readline() == "encoding\n"
    child.send_signal(signal.SIGINT)
    _, error = child.communicate(timeout=60)
    assert child.returncode == 130, error
    assert "run the same command again to continue" in " ".join(error.split())
    assert "Traceback" not in error
    assert main.run(["index", str(photos), "--gallery", "pets", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["unchanged"] >= 1
    assert report["new"] >= 1
    assert report["num_listed"] == 41


def test_a_large_embedded_gallery_gets_the_hint_to_use_a_server(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(["index", str(photos), "--gallery", "pets"]) == 0
    assert "Milvus server" not in capsys.readouterr().out
    monkeypatch.setattr("reir_ingestion.cli.SERVER_FROM_INSTANCES", 5)
    assert main.run(["index", str(photos), "--gallery", "pets"]) == 0
    assert "--store http://HOST:19530" in capsys.readouterr().out


def test_large_photos_get_the_hint_to_zoom(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(["index", str(photos), "--gallery", "pets"]) == 0
    assert "--large-photos" not in capsys.readouterr().out
    Image.new("RGB", (2600, 40)).save(photos / "wide.png")
    assert main.run(["index", str(photos), "--gallery", "pets"]) == 0
    said = capsys.readouterr().out
    assert "1 photo is far larger than" in said
    assert "--large-photos zoom" in said


def test_a_gallery_keeps_its_way_to_encode_large_photos_by_default(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(random_scene(random.Random(1))).resize((1800, 1350)).save(photos / "big.png")
    shapes: list[tuple[int, ...]] = []

    class RecordingEncoder(FakeEncoder):
        def encode_images(self, images: Sequence[RgbImage]) -> list[Instances]:
            shapes.extend(image.shape for image in images)
            return super().encode_images(images)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("reir.checkpoint.load_encoder", lambda _: RecordingEncoder())
        reports = []
        for way in ("tiles", "", "whole", "", "zoom", ""):
            option = ["--large-photos", way] if way else []
            assert main.run(["index", str(photos), "--gallery", "pets", "--json", *option]) == 0
            reports.append(json.loads(capsys.readouterr().out))
    tiled, again, plain, plain_again, zoomed, zoomed_again = reports
    assert (832, 832, 3) in shapes
    assert (again["version"], again["unchanged"]) == (tiled["version"], 7)
    assert plain["version"] != tiled["version"]
    assert (plain_again["version"], plain_again["unchanged"]) == (plain["version"], 7)
    assert (540, 540, 3) in shapes
    assert zoomed["version"] not in (tiled["version"], plain["version"])
    assert (zoomed_again["version"], zoomed_again["unchanged"]) == (zoomed["version"], 7)
    assert tiled["sizes"]["1281 to 2560"]["images"] == 1


def test_a_list_with_columns_and_a_bad_line(
    photos: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    path = photos / "list.jsonl"
    path.write_text('{"photo": "000.png", "shelf": 1}\n{"photo": "https://example.org/1.jpg"}\n')
    command = ["index", str(path), "--gallery", "pets", "--image-column", "photo", "--json"]
    assert main.run(command) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["new"], report["unlisted"]) == (1, 1)
    assert "line 2' cannot be listed" in caplog.text
    assert "--allow-http" in caplog.text
    for shelf, hits in ((1, 1), (2, 0)):
        where = ["--where", f"attr.shelf == {shelf}", "--json"]
        assert main.run(["search", "the red box", "--gallery", "pets", *where]) == 0
        assert len(json.loads(capsys.readouterr().out)["hits"]) == hits
