"""Photos by their URI: from this machine, from buckets, and from places that cannot be read."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from reir.errors import ImageError, ImageFailure
from reir.images.decode import canonical_uri
from reir.images.photo_files import file_state, photo_at
from reir_testing import draw_scene
from reir_testing.s3 import local_s3

SCENE = draw_scene((40, 30), [("red", (5, 5, 20, 20))])


def test_photos_are_read_from_files_and_from_buckets(tmp_path: Path) -> None:
    Image.fromarray(SCENE).save(tmp_path / "a b.png")
    np.testing.assert_array_equal(photo_at(canonical_uri(tmp_path / "a b.png")), SCENE)
    from reir.object_storage import open_filesystem

    data = io.BytesIO()
    Image.fromarray(SCENE).save(data, "PNG")
    with local_s3("seen") as bucket:
        uri = f"s3://{bucket.name}/a.png{bucket.options}"
        filesystem, path = open_filesystem(uri)
        with filesystem.open_output_stream(path) as file:
            file.write(data.getvalue())
        np.testing.assert_array_equal(photo_at(uri), SCENE)


@pytest.mark.parametrize(
    "uri", ["tar+file:///photos.tar#a.png", "https://example.org/a.png", "s3://?x", "/a.png", ""]
)
def test_a_photo_of_another_place_is_one_that_cannot_be_read(uri: str) -> None:
    with pytest.raises(ImageError) as caught:
        photo_at(uri)
    assert caught.value.reason == ImageFailure.UNREACHABLE


def test_the_state_of_a_file_changes_with_its_content(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    uri = canonical_uri(path)
    assert file_state(uri) is None
    path.write_bytes(b"one")
    before = os.stat(path)
    first = file_state(uri)
    assert first is not None
    assert file_state(uri) == first
    # The same size, and the same time of modification, as after `cp --preserve`.
    (tmp_path / "b.png").write_bytes(b"two")
    os.utime(tmp_path / "b.png", ns=(before.st_atime_ns, before.st_mtime_ns))
    (tmp_path / "b.png").replace(path)
    assert file_state(uri) not in (None, first)
    assert file_state("s3://bucket/a.png") is None
    assert file_state("file:///a%00b.png") is None
