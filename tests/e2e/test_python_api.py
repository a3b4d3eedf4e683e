"""The Python API as a notebook uses it: index, open, search, and the script in docs/."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

import reir
from reir.demo.gallery import PHOTOS
from reir.errors import ConfigError, SourceError
from reir.images.large_photos import LargePhotos
from reir.store import open_store
from reir_ingestion.pipeline import IndexOptions, index
from reir_testing import FakeEncoder
from reir_testing.ingestion import write_scenes

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def demo_photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a few photos of `reir demo`."""
    folder = tmp_path_factory.mktemp("demo")
    for path in sorted(PHOTOS.glob("*.jpg"))[:8]:
        shutil.copy(path, folder)
    return folder


def test_the_module_lists_its_public_names_alone() -> None:
    assert dir(reir) == sorted(reir.__all__)
    assert {"open", "index", "galleries", "Client", "Gallery"} <= set(dir(reir))
    for name in reir.__all__:
        assert getattr(reir, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'search'"):
        _ = reir.search


def test_importing_the_module_loads_nothing_heavy() -> None:
    heavy = ("torch", "ray", "pymilvus", "numpy")
    code = f"import sys, reir; dir(reir); print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_index_open_and_list(tmp_path: Path) -> None:
    write_scenes(tmp_path / "photos", 4)
    store, encoder = str(tmp_path / "store"), FakeEncoder()
    seen: list[reir.IndexProgress] = []
    report = reir.index(
        tmp_path / "photos", gallery="g", store=store, encoder=encoder, progress=seen.append
    )
    assert (report.new, report.num_failed) == (4, 0)
    assert seen[-1].done == 4
    assert repr(report).startswith(
        "IndexReport(gallery 'g', 4 new, 0 changed, 0 unchanged, 0 failed"
    )
    again = reir.index(
        tmp_path / "photos", gallery="g", store=store, encoder=encoder, progress=False
    )
    assert (again.new, again.unchanged) == (0, 4)
    (info,) = reir.galleries(store)
    assert (info.name, info.num_images, info.num_instances) == ("g", 4, report.num_instances)
    assert info.live == report.version
    with reir.open("g", store=store, encoder=encoder) as gallery:
        assert repr(gallery) == f"Gallery('g', version '{report.version}')"
        result = gallery.search("red", k=3, where="area > 0")
        assert 0 < len(result) <= 3
        assert result[0].open().size == result[0].open().convert("RGB").size


def test_index_keeps_the_way_of_the_gallery_to_encode_large_photos(tmp_path: Path) -> None:
    write_scenes(tmp_path / "photos", 2)
    location, encoder = str(tmp_path / "store"), FakeEncoder()
    with closing(open_store(location)) as store:
        options = IndexOptions(views=LargePhotos.ZOOM.views)
        zoomed = index(tmp_path / "photos", "g", store, encoder, options=options)
    again = reir.index(
        tmp_path / "photos", gallery="g", store=location, encoder=encoder, progress=False
    )
    assert (again.version, again.unchanged, again.kept_versions) == (zoomed.version, 2, {})


def test_what_cannot_be_indexed_is_refused_before_a_model_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="nowhere"):
        reir.index(tmp_path / "nowhere", store=str(tmp_path / "store"))
    with pytest.raises(ConfigError, match="encoder and checkpoint name two models"):
        reir.index(tmp_path, encoder=FakeEncoder(), checkpoint=tmp_path)


def test_similar_and_localize_work_on_photos_and_instances(
    tmp_path: Path, demo_photos: Path
) -> None:
    store = str(tmp_path / "store")
    reir.index(demo_photos, gallery="g", store=store, progress=False)
    with reir.open("g", store=store) as gallery:
        best = gallery.search("a person", k=1)[0]
        by_instance = gallery.similar(best.instance_id, k=2)
        assert best.instance_id not in {hit.instance_id for hit in by_instance}
        by_photo = gallery.similar(best.path, box=best.box, k=2)
        assert by_photo[0].instance_id == best.instance_id
        with pytest.raises(reir.errors.QueryError, match="belongs to a photo"):
            gallery.similar(best.instance_id, box=best.box)
        found = gallery.localize(best.path, "a person", k=2)
        assert found.boxes == gallery.localize(best.path.read_bytes(), "a person", k=2).boxes
        assert len(found.boxes) == 2


def test_the_notebook_in_docs_runs(tmp_path: Path, demo_photos: Path) -> None:
    environment = {**os.environ, "REIR_STORE": str(tmp_path / "store")}
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "notebook.py"), str(demo_photos)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    num_photos = len(list(demo_photos.glob("*.jpg")))
    assert lines[0].startswith(f"{num_photos} new photos, ")
    assert lines[1] == f"0 new, {num_photos} unchanged"
    assert (
        "SearchResult('the man in a light blue shirt holding a frisbee', 5 hits, presence"
        in done.stdout
    )
    assert (tmp_path / "notebook.png").stat().st_size > 10_000
