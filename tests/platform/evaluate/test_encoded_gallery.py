"""Photos -> encoded gallery: shards, what is kept of them, and a kill in between."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from reir.errors import CheckpointError, DataError
from reir.evaluate import EncodedShard, Encoding, Shard, encode_gallery, encode_shard, evaluate_reir
from reir.evaluate.encoded_gallery import EncodedGallery, choosing_expressions, queries_of
from reir.records import Instances, RgbImage
from reir_testing import ChoosingFakeEncoder, FakeEncoder
from reir_testing.photo_sets import SIZE_PX, draw_photo_set, random_scenes, three_photos


class Counting(FakeEncoder):
    """Counts the photos that it encodes."""

    def __init__(self, num_candidates: int = 30) -> None:
        super().__init__(num_candidates)
        self.num_encoded = 0

    def encode_images(self, images: Sequence[RgbImage]) -> list[Instances]:
        self.num_encoded += len(images)
        return super().encode_images(images)


def assert_equal(one: EncodedGallery, other: EncodedGallery) -> None:
    np.testing.assert_array_equal(one.arrays.vectors, other.arrays.vectors)
    np.testing.assert_array_equal(one.arrays.images, other.arrays.images)
    np.testing.assert_array_equal(one.arrays.boxes_px, other.arrays.boxes_px)
    np.testing.assert_array_equal(one.image_vectors, other.image_vectors)
    assert one.unreadable == other.unreadable


def test_runs_are_equal_and_shards_change_nothing(tmp_path: Path) -> None:
    data = draw_photo_set(tmp_path, random_scenes(9, 20))
    one, some, all_at_once = (
        encode_gallery(FakeEncoder(), data, tmp_path, how=Encoding(shard_photos=n))
        for n in (1, 7, 50)
    )
    assert_equal(one, all_at_once)
    assert_equal(some, all_at_once)
    first = evaluate_reir(FakeEncoder(), data, tmp_path)
    assert evaluate_reir(FakeEncoder(), data, tmp_path) == first


def test_shards_may_come_back_in_any_order(tmp_path: Path) -> None:
    data = draw_photo_set(tmp_path, random_scenes(9, 9))
    encoder = ChoosingFakeEncoder(2)
    queries = queries_of(encoder, data, data.expressions)
    choosers = choosing_expressions(encoder, queries, [text.text for text in data.expressions], 1)

    def backwards(shards: Iterable[Shard]) -> Iterator[tuple[int, EncodedShard]]:
        for shard in reversed(list(shards)):
            yield shard.number, encode_shard(encoder, shard)

    ways = [Encoding(shard_photos=2, runner=runner) for runner in (None, backwards)]
    one, other = (
        encode_gallery(encoder, data, tmp_path, choosers=choosers, how=way) for way in ways
    )
    assert_equal(one, other)
    for (rows, gallery), (same_rows, same_gallery) in zip(one.turns(), other.turns(), strict=True):
        np.testing.assert_array_equal(rows, same_rows)
        np.testing.assert_array_equal(gallery.vectors, same_gallery.vectors)


def test_every_expression_has_its_turn_once(tmp_path: Path) -> None:
    data = draw_photo_set(tmp_path, random_scenes(3, 9))
    encoder = ChoosingFakeEncoder(2)
    expressions = data.expressions[::-1]  # not in the order of the photos
    queries = queries_of(encoder, data, expressions)
    choosers = choosing_expressions(encoder, queries, [text.text for text in expressions], 1)
    encoded = encode_gallery(encoder, data, tmp_path, choosers=choosers)
    seen: list[int] = []
    for rows, gallery in encoded.turns():
        seen += rows.tolist()
        for row in rows:
            own = gallery.images == queries.images[row]
            best = encoded.arrays.images == queries.images[row]
            # what it chose is at least as good as the best of the query-free choice
            assert own.sum() == 1
            score = gallery.vectors[own] @ queries.vectors[row]
            assert score >= (encoded.arrays.vectors[best] @ queries.vectors[row]).max() - 1e-6
    assert sorted(seen) == list(range(len(expressions)))


def test_unreadable_and_misshapen_photos_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = three_photos(tmp_path)
    (tmp_path / "0.png").write_bytes(b"no photo")
    Image.new("RGB", (SIZE_PX[1], SIZE_PX[0])).save(tmp_path / "2.png")
    with caplog.at_level(logging.WARNING):
        gallery = encode_gallery(FakeEncoder(), data, tmp_path)
    assert gallery.unreadable == {"0.png": "not_an_image"}
    assert gallery.num_misshapen == 1
    assert set(gallery.arrays.images.tolist()) == {1}
    assert "0.png" in caplog.text
    assert "1 of 3 photos have another aspect ratio" in caplog.text
    report = evaluate_reir(FakeEncoder(), data, tmp_path)
    assert report.info.counts["unreadable"] == 1
    assert report.query_free.definition_b["br1_50"].mean == 25


def test_missing_photos_end_the_run(tmp_path: Path) -> None:
    data = three_photos(tmp_path)
    (tmp_path / "1.png").unlink()
    with pytest.raises(DataError, match=r"1 of 3 photos of drawn are not in .*, e\.g\. 1\.png"):
        evaluate_reir(FakeEncoder(), data, tmp_path)


@pytest.mark.parametrize("name", ["../0.png", "/etc/passwd", "a/../../0.png", "a\0.png"])
def test_file_names_stay_in_the_folder(tmp_path: Path, name: str) -> None:
    data = three_photos(tmp_path)
    first, *others = data.images
    with pytest.raises(DataError, match="expected a file_name inside the folder"):
        evaluate_reir(
            FakeEncoder(), replace(data, images=(replace(first, file_name=name), *others)), tmp_path
        )


def test_progress_counts_every_photo(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    how = Encoding(shard_photos=2, progress=lambda done, total: calls.append((done, total)))
    encode_gallery(FakeEncoder(), three_photos(tmp_path), tmp_path, how=how)
    assert calls == [(0, 3), (2, 3), (3, 3)]


def test_an_unreadable_photo_takes_its_expressions_along(tmp_path: Path) -> None:
    data = three_photos(tmp_path)
    (tmp_path / "0.png").write_bytes(b"no photo")
    report = evaluate_reir(ChoosingFakeEncoder(), data, tmp_path)
    assert report.leaky is not None
    assert report.leaky.definition_b["br10_50"].mean == 50


def test_numbers_of_an_encoding_are_checked() -> None:
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        Encoding(threads=0)
    with pytest.raises(ValueError, match="shard_photos must be at least 1, got -1"):
        Encoding(shard_photos=-1)


# ------------------------------------------------------------------------------------- a worker


def shard_of(folder: Path, **changes: object) -> Shard:
    shard = Shard(0, (folder / "0.png",), FakeEncoder().digest)
    return replace(shard, **changes)  # type: ignore[arg-type]


def test_a_worker_with_another_encoder_refuses(tmp_path: Path) -> None:
    three_photos(tmp_path)
    with pytest.raises(CheckpointError, match="every worker must see the same checkpoint"):
        encode_shard(FakeEncoder(), shard_of(tmp_path, digest="another"))


def test_a_worker_that_does_not_see_the_photos_refuses(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"0\.png does not exist on .*every worker must see the photos"
    ):
        encode_shard(FakeEncoder(), shard_of(tmp_path))


def test_threads_are_those_of_the_shard_and_given_back(tmp_path: Path) -> None:
    three_photos(tmp_path)
    seen: list[int] = []

    class Watching(FakeEncoder):
        def encode_images(self, images: Sequence[RgbImage]) -> list[Instances]:
            seen.append(torch.get_num_threads())
            return super().encode_images(images)

    before = torch.get_num_threads()
    encode_shard(Watching(), shard_of(tmp_path, threads=3))
    assert (seen, torch.get_num_threads()) == ([3], before)


# --------------------------------------------------------------------------------- work folder


def test_finished_shards_are_taken_as_they_are(tmp_path: Path) -> None:
    data, work = draw_photo_set(tmp_path, random_scenes(1, 9)), tmp_path / "work"
    (tmp_path / "3.png").write_bytes(b"no photo")
    encoder = Counting()
    how = Encoding(shard_photos=2, work=work)
    whole = encode_gallery(encoder, data, tmp_path, how=how)
    assert encoder.num_encoded == 8
    assert_equal(encode_gallery(encoder, data, tmp_path, how=how), whole)
    assert encoder.num_encoded == 8
    assert whole.unreadable == {"3.png": "not_an_image"}


def test_a_damaged_shard_is_encoded_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data, work = draw_photo_set(tmp_path, random_scenes(1, 9)), tmp_path / "work"
    encoder = Counting()
    how = Encoding(shard_photos=2, work=work)
    whole = encode_gallery(encoder, data, tmp_path, how=how)
    first, second, *_ = sorted(work.glob("*/*.npz"))
    first.write_bytes(first.read_bytes()[:200])
    second.write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        assert_equal(encode_gallery(encoder, data, tmp_path, how=how), whole)
    assert encoder.num_encoded == 9 + 4
    assert caplog.text.count("is damaged") == 2


def test_shards_of_other_encoders_photos_or_settings_are_left_alone(tmp_path: Path) -> None:
    data, work = draw_photo_set(tmp_path, random_scenes(1, 4)), tmp_path / "work"
    encoder = Counting()
    how = Encoding(work=work)
    encode_gallery(encoder, data, tmp_path, how=how)
    encode_gallery(encoder, data, tmp_path, how=replace(how, threads=2))
    assert encoder.num_encoded == 8
    Image.new("RGB", SIZE_PX, (220, 20, 20)).save(tmp_path / "0.png", compress_level=0)
    changed = encode_gallery(encoder, data, tmp_path, how=how)
    assert encoder.num_encoded == 12
    assert (changed.arrays.images == 0).sum() == 1
    fewer = Counting(num_candidates=1)
    found = encode_gallery(fewer, data, tmp_path, how=how)
    assert fewer.num_encoded == 4
    assert np.bincount(found.arrays.images).max() == 1
    other = Counting()
    other.digest = "f" * 64
    encode_gallery(other, data, tmp_path, how=how)
    assert other.num_encoded == 4
    assert len(list(work.iterdir())) == 5


def test_a_work_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    data = three_photos(tmp_path)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match=r"cannot create work folder .*file"):
        encode_gallery(FakeEncoder(), data, tmp_path, how=Encoding(work=tmp_path / "file"))


CHILD = """
import sys
from pathlib import Path
from reir.evaluate import Encoding, evaluate_reir
from reir_testing import ChoosingFakeEncoder
from reir_testing.photo_sets import draw_photo_set, random_scenes
photos, work = map(Path, sys.argv[1:])
data = draw_photo_set(photos, random_scenes(2, 40))
say = lambda done, total: print(done, flush=True)
how = Encoding(shard_photos=2, work=work, progress=say)
print(evaluate_reir(ChoosingFakeEncoder(2), data, photos, how=how).to_dict())
"""


def start(photos: Path, work: Path) -> subprocess.Popen[str]:
    photos.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(photos), str(work)], stdout=subprocess.PIPE, text=True
    )


def test_a_killed_evaluation_goes_on_and_ends_with_the_same_report(tmp_path: Path) -> None:
    child = start(tmp_path / "photos", tmp_path / "work")
    assert child.stdout is not None
    for line in child.stdout:
        if int(line) >= 10:
            break
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    assert child.returncode == -signal.SIGKILL, "it had ended before"
    kept = len(list((tmp_path / "work").glob("*/*.npz")))
    assert 5 <= kept < 20
    *progress, report = start(tmp_path / "photos", tmp_path / "work").communicate()[0].splitlines()
    assert int(progress[0]) == 2 * kept
    assert len(progress) == 1 + 20 - kept
    assert report == start(tmp_path / "photos", tmp_path / "new").communicate()[0].splitlines()[-1]
