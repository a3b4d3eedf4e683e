"""A dataset's photos -> the encoded gallery that every evaluation measures against."""

# Shapes: P photos, M expressions, J instances of the whole gallery, D vector dimension

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

import reir
from reir.datasets import Expression, ReferringDataset, ReferringImage
from reir.errors import DataError
from reir.evaluate.shards import EncodedShard, Packed, Runner, Shard, run_here
from reir.evaluate.work import WorkFolder
from reir.metrics import Gallery, Queries
from reir.metrics.reir import Ints
from reir.models.seams import ExpressionChooser, InstanceEncoder
from reir.records import FloatArray

logger = logging.getLogger(__name__)

_EXPRESSIONS_AT_ONCE = 64
_SHAPE_TOLERANCE = 0.02  # a photo whose aspect ratio is further off is another photo, or turned

Progress = Callable[[int, int], None]
"""Called with the photos done and all photos, after each shard."""


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """How a gallery is encoded; only `threads` and `shard_photos` can change a bit of it.

    Attributes:
        runner: where shards are encoded; None: in this process, one after the other.
        work: folder for finished shards, from which a killed run goes on; None keeps none.
        threads: of torch, in every process; more are faster and round differently.
        shard_photos: photos a shard.
        progress: called after each shard.
    """

    runner: Runner | None = None
    work: Path | None = None
    threads: int = 1
    shard_photos: int = 32
    progress: Progress | None = None

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name in ("threads", "shard_photos"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Asked:
    """Expressions that choose instances of their own photo (`reir.models.seams`).

    Attributes:
        texts: M expressions.
        vectors: (M, D).
        images: (M,) position of each one's photo in `dataset.images`.
        num_kept: instances kept of each choice.
    """

    texts: tuple[str, ...]
    vectors: FloatArray
    images: Ints
    num_kept: int


@dataclass(frozen=True)
class ChosenInstances:
    """Instances that the expressions of a photo chose there.

    Attributes:
        instances: all of them; their photo is the position in `dataset.images`.
        expression: (J,) which of the M expressions chose each.
        turn: (M,) place of each expression among those of its photo.
        num_turns: (P,) expressions of each photo.
    """

    instances: Gallery
    expression: Ints
    turn: Ints
    num_turns: Ints


@dataclass(frozen=True)
class EncodedGallery:
    """A gallery after the visual stream.

    Attributes:
        arrays: instances, query-free; their photo is the position in `dataset.images`.
        image_vectors: (P', D) one for each photo that decodes.
        image_rows: (P',) their positions.
        chosen: what expressions chose, None where none were asked.
        unreadable: file name -> reason, of photos that could not be decoded: no instances.
        num_misshapen: photos whose aspect ratio is not the annotated one.
        threads: of torch, that encoded it.
    """

    arrays: Gallery
    image_vectors: FloatArray
    image_rows: Ints
    chosen: ChosenInstances | None
    unreadable: Mapping[str, str]
    num_misshapen: int
    threads: int

    def turns(self) -> Iterator[tuple[Ints, Gallery]]:
        """Yield, for the t-th expression of every photo at once, which they are and their gallery.

        One turn is one run of the released evaluator (clare.md section 6, step 2): each photo
        shows what its own expression of this turn chose there. A photo with fewer expressions takes
        them again from the first, one without any shows its query-free instances.
        """
        if self.chosen is None:
            raise ValueError("no expression chose instances when this gallery was encoded")
        chosen, num_turns = self.chosen, self.chosen.num_turns
        bare = num_turns[self.arrays.images] == 0
        own_turn = chosen.turn[chosen.expression]
        for turn in range(int(num_turns.max(initial=0))):
            # photos without expressions have no row in `chosen`, so none is divided by 0
            shown = own_turn == turn % num_turns[chosen.instances.images]
            yield (
                np.flatnonzero(chosen.turn == turn),
                _joined(_rows(chosen.instances, shown), _rows(self.arrays, bare)),
            )


def encode_gallery(
    encoder: InstanceEncoder,
    dataset: ReferringDataset,
    images_dir: str | Path,
    *,
    asked: Asked | None = None,
    how: Encoding | None = None,
) -> EncodedGallery:
    """Run the visual stream once over each photo of a dataset.

    A photo that cannot be decoded stays in the gallery without instances and is logged and
    counted; one that is not there at all ends the run.

    Args:
        encoder: the model; an `ExpressionChooser` where `asked` is given.
        dataset: its photos.
        images_dir: where they are.
        asked: expressions that choose instances as well.
        how: where, with how many threads, and what is kept of it.

    Raises:
        DataError: photos are missing, or a file name leads out of `images_dir`.
    """
    how = how or Encoding()
    paths = _photo_paths(dataset, Path(images_dir).absolute())
    shards = _Shards(encoder, paths, asked, how)
    work = WorkFolder(how.work, shards.about(dataset)) if how.work else None
    done: dict[int, EncodedShard] = {}
    if work:
        done = {n: found for n in range(len(shards)) if (found := work.load(n)) is not None}
    shards.report(done)
    missing = [number for number in range(len(shards)) if number not in done]
    pending = (shards[number] for number in missing)  # made as the runner takes them
    for number, encoded in (how.runner or run_here(encoder))(pending):
        if work:
            work.save(number, encoded)
        done[number] = encoded
        shards.report(done)
    return _assembled(dataset, [done[n] for n in range(len(shards))], asked, how.threads)


class _Shards:
    """The shards of a gallery, made one by one as they are needed."""

    def __init__(
        self, encoder: InstanceEncoder, paths: Sequence[Path], asked: Asked | None, how: Encoding
    ) -> None:
        self._encoder, self._paths, self._asked, self._how = encoder, paths, asked, how
        self._order = np.argsort(asked.images, kind="stable") if asked else np.empty(0, np.int64)
        images = asked.images[self._order] if asked else self._order
        self._starts = np.searchsorted(images, np.arange(len(paths) + 1))

    def __len__(self) -> int:
        return -(-len(self._paths) // self._how.shard_photos)

    def __getitem__(self, number: int) -> Shard:
        size = self._how.shard_photos
        rows = range(len(self._paths))[number * size : (number + 1) * size]
        vectors: tuple[FloatArray, ...] = ()
        if self._asked:
            own = (self._order[self._starts[at] : self._starts[at + 1]] for at in rows)
            vectors = tuple(self._asked.vectors[some] for some in own)
        return Shard(
            number,
            tuple(self._paths[at] for at in rows),
            self._encoder.digest,
            vectors,
            self._asked.num_kept if self._asked else 0,
            self._how.threads,
        )

    def report(self, done: Mapping[int, EncodedShard]) -> None:
        if self._how.progress is not None:
            photos = sum(len(shard.failures) for shard in done.values())
            self._how.progress(photos, len(self._paths))

    def about(self, dataset: ReferringDataset) -> dict[str, str | int]:
        """Everything that shards depend on; photos count by name and size of the file."""
        photos = hashlib.sha256()
        for image, path in zip(dataset.images, self._paths, strict=True):
            photos.update(f"{image.file_name}\0{path.stat().st_size}\n".encode())
        texts = hashlib.sha256()
        if self._asked:
            for image_row, text in zip(self._asked.images, self._asked.texts, strict=True):
                texts.update(f"{image_row}\0{text}\n".encode())
        return {
            "version": reir.__version__,
            "digest": self._encoder.digest,
            "num_candidates": self._encoder.num_candidates,
            "threads": self._how.threads,
            "shard_photos": self._how.shard_photos,
            "num_photos": len(self._paths),
            "photos": photos.hexdigest(),
            "num_expressions": len(self._order),
            "expressions": texts.hexdigest(),
            "num_kept": self._asked.num_kept if self._asked else 0,
        }


def encode_expressions(encoder: InstanceEncoder, texts: Sequence[str]) -> FloatArray:
    """(M, D) vectors of the texts, in batches."""
    vectors = [np.empty((0, encoder.dim), dtype=np.float32)]
    for first in range(0, len(texts), _EXPRESSIONS_AT_ONCE):
        vectors.append(encoder.encode_expressions(texts[first : first + _EXPRESSIONS_AT_ONCE]))
    return np.concatenate(vectors)


def image_positions(dataset: ReferringDataset, image_ids: Sequence[str]) -> Ints:
    """(M,) position in `dataset.images` of each photo that is named."""
    position = {photo.image_id: at for at, photo in enumerate(dataset.images)}
    return np.array([position[image_id] for image_id in image_ids], dtype=np.int64)


def queries_of(
    encoder: InstanceEncoder, dataset: ReferringDataset, expressions: Sequence[Expression]
) -> Queries:
    """Encode expressions; each goes with its true photo, the position in `dataset.images`, and box.

    Raises:
        DataError: there are none, so that nothing could be measured.
    """
    if not expressions:
        raise DataError(
            f"{dataset.source}: expected expressions that describe an instance, got none of "
            f"{len(dataset.expressions)}; nothing can be measured"
        )
    instances = [dataset.instances_by_id[str(text.instance_id)] for text in expressions]
    return Queries(
        encode_expressions(encoder, [text.text for text in expressions]),
        image_positions(dataset, [each.image_id for each in instances]),
        np.array([each.box_xyxy_px for each in instances], dtype=np.float64),
    )


def asked_by(
    encoder: InstanceEncoder, queries: Queries, texts: Sequence[str], num_kept: int
) -> Asked | None:
    """Return the queries as choosers of instances; None for an encoder without that choice."""
    if not isinstance(encoder, ExpressionChooser):
        return None
    return Asked(tuple(texts), queries.vectors, queries.images, num_kept)


def _assembled(
    dataset: ReferringDataset, shards: Sequence[EncodedShard], asked: Asked | None, threads: int
) -> EncodedGallery:
    failures = np.concatenate([shard.failures for shard in shards])
    sizes_px = np.concatenate([shard.size_px for shard in shards])
    readable = np.flatnonzero(failures == "")
    unreadable = {}
    for at in np.flatnonzero(failures != "").tolist():
        unreadable[dataset.images[at].file_name] = str(failures[at])
        logger.warning("%s: %s; it has no instances", dataset.images[at].file_name, failures[at])
    num_misshapen = sum(_is_misshapen(dataset.images[at], sizes_px[at]) for at in readable)
    if num_misshapen:
        logger.warning(
            "%s: %d of %d photos have another aspect ratio than annotated; their boxes may not fit",
            dataset.source,
            num_misshapen,
            len(failures),
        )
    instances = Packed.joined([shard.instances for shard in shards])
    image_vectors = np.concatenate([shard.image_vectors for shard in shards])
    return EncodedGallery(
        _gallery(dataset, instances, np.arange(len(failures))),
        image_vectors[readable],
        readable,
        _chosen(dataset, Packed.joined([shard.chosen for shard in shards]), asked),
        unreadable,
        num_misshapen,
        threads,
    )


def _chosen(
    dataset: ReferringDataset, packed: Packed, asked: Asked | None
) -> ChosenInstances | None:
    if asked is None:
        return None
    order = np.argsort(asked.images, kind="stable")  # shards hold them photo by photo
    num_turns = np.bincount(asked.images, minlength=len(dataset.images))
    turn = np.empty(len(order), dtype=np.int64)
    firsts = np.cumsum(num_turns) - num_turns
    turn[order] = np.arange(len(order)) - firsts[asked.images[order]]
    instances = _gallery(dataset, packed, asked.images[order])
    return ChosenInstances(instances, np.repeat(order, packed.counts), turn, num_turns)


def _gallery(dataset: ReferringDataset, packed: Packed, photo_of_list: Ints) -> Gallery:
    """Instances with their photo, and their boxes in pixels of the annotated size."""
    images = np.repeat(photo_of_list, packed.counts)
    size_px = np.array([(photo.width_px, photo.height_px) for photo in dataset.images])
    width, height = size_px[images].T
    return Gallery(packed.vectors, images, packed.boxes * np.stack([width, height] * 2, axis=-1))


def _rows(gallery: Gallery, rows: np.ndarray) -> Gallery:
    return Gallery(gallery.vectors[rows], gallery.images[rows], gallery.boxes_px[rows])


def _joined(one: Gallery, other: Gallery) -> Gallery:
    return Gallery(
        np.concatenate([one.vectors, other.vectors]),
        np.concatenate([one.images, other.images]),
        np.concatenate([one.boxes_px, other.boxes_px]),
    )


def _photo_paths(dataset: ReferringDataset, images_dir: Path) -> list[Path]:
    paths = [_photo_path(dataset, photo, images_dir) for photo in dataset.images]
    missing = [path for path in paths if not path.exists()]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(paths)} photos of {dataset.source} are not in {images_dir}, "
            f"e.g. {missing[0].relative_to(images_dir)}; pass the folder that file_name starts from"
        )
    return paths


def _photo_path(dataset: ReferringDataset, photo: ReferringImage, images_dir: Path) -> Path:
    name = PurePosixPath(photo.file_name)
    if name.is_absolute() or ".." in name.parts or "\0" in photo.file_name:
        raise DataError(
            f"{dataset.source}: image {photo.image_id!r}: expected a file_name within the folder "
            f"of photos, got {photo.file_name!r}"
        )
    return images_dir / name


def _is_misshapen(photo: ReferringImage, size_px: Ints) -> bool:
    width, height = size_px
    ratio = (width * photo.height_px) / (height * photo.width_px)
    return bool(abs(ratio - 1) > _SHAPE_TOLERANCE)
