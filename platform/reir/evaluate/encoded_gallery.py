"""Encodes the photos of a dataset into the gallery on which every evaluation is based."""

# Shapes: P photos, M expressions, J instances of the whole gallery, D vector dimension

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import reir
from reir.datasets import BoxPx, Expression, ReferringDataset, ReferringImage
from reir.datasets.photo_sizes import leaves_folder
from reir.errors import ConfigError, DataError
from reir.evaluate.shards import EncodedShard, InstanceLists, Runner, Shard, run_here
from reir.evaluate.work_folder import WorkFolder
from reir.images.views import ViewsEncoder
from reir.metrics import Gallery, Queries
from reir.metrics.reir import Floats, Ints
from reir.models.interfaces import BoxEncoder, ExpressionChooser, InstanceEncoder
from reir.records import FloatArray

logger = logging.getLogger(__name__)

_EXPRESSIONS_AT_ONCE = 64
# A photo whose aspect ratio differs by more is probably another photo, or rotated.
_SHAPE_TOLERANCE = 0.02

Progress = Callable[[int, int], None]
"""Called after each shard with the number of photos done and of all photos."""


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """How a gallery is encoded. Only `threads`, `shard_photos` and `oracle` can change the result.

    Attributes:
        runner: encodes the shards; None encodes them in this process, one after the other.
        work: folder for finished shards, from which a rerun continues; None to keep none.
        threads: CPU threads of torch in each process; their number changes how sums are rounded.
        shard_photos: photos per shard.
        progress: called after each shard.
        oracle: encode the annotated boxes of each photo instead of those that the encoder finds.
    """

    runner: Runner | None = None
    work: Path | None = None
    threads: int = 1
    shard_photos: int = 32
    progress: Progress | None = None
    oracle: bool = False

    def __post_init__(self) -> None:
        """Check that the numbers are positive."""
        for name in ("threads", "shard_photos"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class ChoosingExpressions:
    """Expressions that choose instances of their own photo, for an `ExpressionChooser`.

    Attributes:
        texts: M expressions.
        vectors: (M, D) expression vectors.
        images: (M,) position of each expression's photo in `dataset.images`.
        num_kept: number of instances that each expression chooses.
    """

    texts: tuple[str, ...]
    vectors: FloatArray
    images: Ints
    num_kept: int


@dataclass(frozen=True)
class ChosenInstances:
    """The instances that each expression chose in its own photo.

    Attributes:
        instances: the J chosen instances; photos are given as positions in `dataset.images`.
        expression: (J,) index of the expression that chose each instance.
        turn: (M,) index of each expression among those of its photo.
        num_turns: (P,) number of expressions of each photo.
    """

    instances: Gallery
    expression: Ints
    turn: Ints
    num_turns: Ints


@dataclass(frozen=True)
class EncodedGallery:
    """The output of the visual stream for all photos of a gallery.

    Attributes:
        arrays: instances that were chosen without any query; photos are given as positions in
            `dataset.images`.
        image_vectors: (P', D) vectors of the photos that could be decoded.
        image_rows: (P',) positions of these photos.
        chosen: the instances that expressions chose; None if no expressions were given.
        unreadable: file name -> reason, for photos that could not be decoded.
        num_misshapen: number of photos whose aspect ratio is not the annotated one.
        threads: CPU threads of torch that encoded it.
    """

    arrays: Gallery
    image_vectors: FloatArray
    image_rows: Ints
    chosen: ChosenInstances | None
    unreadable: Mapping[str, str]
    num_misshapen: int
    threads: int

    def turns(self) -> Iterator[tuple[Ints, Gallery]]:
        """Yield the turns of an evaluation in which each photo's own expression chooses.

        One turn is one run of the released evaluator (docs/clare.md, section 6). In turn t, each
        photo contributes the instances that its t-th expression chose. A photo with fewer
        expressions starts again with its first one. A photo without expressions contributes its
        query-free instances.

        Yields:
            The rows of the expressions that search in this turn, and the gallery to search.
        """
        if self.chosen is None:
            raise ValueError("this gallery was encoded without expressions that choose instances")
        chosen, num_turns = self.chosen, self.chosen.num_turns
        bare = num_turns[self.arrays.images] == 0
        own_turn = chosen.turn[chosen.expression]
        for turn in range(int(num_turns.max(initial=0))):
            # num_turns is never 0 here, since photos without expressions have no row in `chosen`
            in_turn = own_turn == turn % num_turns[chosen.instances.images]
            yield (
                np.flatnonzero(chosen.turn == turn),
                _concatenate(_rows(chosen.instances, in_turn), _rows(self.arrays, bare)),
            )


def encode_gallery(
    encoder: InstanceEncoder,
    dataset: ReferringDataset,
    images_dir: str | Path,
    *,
    choosers: ChoosingExpressions | None = None,
    how: Encoding | None = None,
) -> EncodedGallery:
    """Run the visual stream once on each photo of a dataset.

    A photo that cannot be decoded stays in the gallery without instances, and is logged and
    counted. A missing photo is an error.

    Args:
        encoder: the model; an `ExpressionChooser` if `choosers` is given.
        dataset: the data set whose photos are encoded.
        images_dir: folder of the photos.
        choosers: expressions that choose instances in addition to the query-free ones.
        how: how the photos are encoded.

    Raises:
        ConfigError: `how.oracle` is set, and the encoder is no `BoxEncoder`.
        DataError: photos are missing, or a file name points outside `images_dir`.
    """
    how = how or Encoding()
    if how.oracle and not isinstance(encoder, BoxEncoder):
        raise ConfigError(
            f"{type(encoder).__name__} cannot encode true boxes as an oracle; use an encoder that "
            f"can encode given boxes, such as siglip-crops:NAME_OR_DIR"
        )
    paths = photo_paths(dataset, Path(images_dir).absolute())
    shards = _Shards(encoder, paths, choosers, how, _true_boxes(dataset) if how.oracle else ())
    # Everything that could change a shard names its folder, so a shard that is found is never
    # wrong.
    work = WorkFolder(EncodedShard, how.work, shards.about(dataset)) if how.work else None
    done: dict[int, EncodedShard] = {}
    if work:
        done = {n: shard for n in range(len(shards)) if (shard := work.load(n)) is not None}
    shards.report(done)
    missing = [number for number in range(len(shards)) if number not in done]
    pending = (shards[number] for number in missing)  # lazy: a shard holds many vectors
    for number, encoded in (how.runner or run_here(encoder))(pending):
        if work:
            work.save(number, encoded)
        done[number] = encoded
        shards.report(done)
    return _assemble(dataset, [done[n] for n in range(len(shards))], choosers, how.threads)


class _Shards:
    """The shards of a gallery, each created when it is needed."""

    def __init__(
        self,
        encoder: InstanceEncoder,
        paths: Sequence[Path],
        choosers: ChoosingExpressions | None,
        how: Encoding,
        boxes: Sequence[FloatArray],
    ) -> None:
        self._boxes = boxes
        self._encoder, self._paths, self._choosers, self._how = encoder, paths, choosers, how
        # Sorted by photo, so that the expressions of a photo are one range of this order.
        self._order = (
            np.argsort(choosers.images, kind="stable") if choosers else np.empty(0, np.int64)
        )
        images = choosers.images[self._order] if choosers else self._order
        self._starts = np.searchsorted(images, np.arange(len(paths) + 1))

    def __len__(self) -> int:
        return -(-len(self._paths) // self._how.shard_photos)

    def __getitem__(self, number: int) -> Shard:
        size = self._how.shard_photos
        rows = range(len(self._paths))[number * size : (number + 1) * size]
        vectors: tuple[FloatArray, ...] = ()
        if self._choosers:
            own = (self._order[self._starts[at] : self._starts[at + 1]] for at in rows)
            vectors = tuple(self._choosers.vectors[some] for some in own)
        return Shard(
            number,
            tuple(self._paths[at] for at in rows),
            self._encoder.digest,
            vectors,
            self._choosers.num_kept if self._choosers else 0,
            self._how.threads,
            tuple(self._boxes[at] for at in rows) if self._boxes else (),
        )

    def report(self, done: Mapping[int, EncodedShard]) -> None:
        if self._how.progress is not None:
            photos = sum(len(shard.failures) for shard in done.values())
            self._how.progress(photos, len(self._paths))

    def about(self, dataset: ReferringDataset) -> dict[str, str | int | float]:
        """Return everything that shards depend on; of photos, their names and file sizes."""
        choosers = self._choosers
        return {
            # Another release may decode photos or choose candidates differently.
            "version": reir.__version__,
            "digest": self._encoder.digest,
            "num_candidates": self._encoder.num_candidates,
            "threads": self._how.threads,
            "shard_photos": self._how.shard_photos,
            "num_photos": len(self._paths),
            "photos": hash_of_photos(dataset, self._paths),
            "num_expressions": len(self._order),
            "expressions": hash_of_texts(
                *((choosers.images, choosers.texts) if choosers else ((), ()))
            ),
            "num_kept": choosers.num_kept if choosers else 0,
            **({"boxes": self._hash_of_boxes()} if self._boxes else {}),
            **view_settings(self._encoder),
        }

    def _hash_of_boxes(self) -> str:
        boxes = hashlib.sha256()
        for each in self._boxes:
            boxes.update(f"{len(each)}\n".encode() + each.tobytes())
        return boxes.hexdigest()


def hash_of_photos(dataset: ReferringDataset, paths: Sequence[Path]) -> str:
    """Return a hash of the names and file sizes of photos."""
    photos = hashlib.sha256()
    for image, path in zip(dataset.images, paths, strict=True):
        # Sizes instead of contents, because hashing a gallery would take as long as reading it.
        photos.update(f"{image.file_name}\0{path.stat().st_size}\n".encode())
    return photos.hexdigest()


def hash_of_texts(images: Iterable[int], texts: Iterable[str]) -> str:
    """Return a hash of expressions, each with the position of its photo."""
    hashed = hashlib.sha256()
    for image, text in zip(images, texts, strict=True):
        hashed.update(f"{image}\0{text}\n".encode())
    return hashed.hexdigest()


def view_settings(encoder: InstanceEncoder) -> dict[str, int | float]:
    """Return in which parts the encoder encodes large photos; nothing if only as a whole."""
    return encoder.views.settings if isinstance(encoder, ViewsEncoder) else {}


def encode_expressions(encoder: InstanceEncoder, texts: Sequence[str]) -> FloatArray:
    """Return the (M, D) vectors of the texts."""
    # Without texts, the result still has the shape (0, D).
    vectors = [np.empty((0, encoder.dim), dtype=np.float32)]
    for first in range(0, len(texts), _EXPRESSIONS_AT_ONCE):
        vectors.append(encoder.encode_expressions(texts[first : first + _EXPRESSIONS_AT_ONCE]))
    return np.concatenate(vectors)


def image_positions(dataset: ReferringDataset, image_ids: Sequence[str]) -> Ints:
    """Return the (M,) positions of photos in `dataset.images`."""
    position = {photo.image_id: at for at, photo in enumerate(dataset.images)}
    return np.array([position[image_id] for image_id in image_ids], dtype=np.int64)


@dataclass(frozen=True)
class Targets:
    """The true answers of M expressions.

    Attributes:
        images: (M,) positions of their photos in `dataset.images`.
        boxes_px: (M, 4) true boxes, xyxy in pixels of the annotated size.
    """

    images: Ints
    boxes_px: Floats

    def __len__(self) -> int:
        """Return the number of expressions M."""
        return len(self.images)

    def __getitem__(self, rows: slice) -> Targets:
        """Return the answers of some of the expressions."""
        return Targets(self.images[rows], self.boxes_px[rows])


def targets_of(dataset: ReferringDataset, expressions: Sequence[Expression]) -> Targets:
    """Return the photo and the true box of each expression.

    Raises:
        DataError: there are no expressions.
    """
    if not expressions:
        raise DataError(
            f"{dataset.source}: none of {len(dataset.expressions)} expressions describes an "
            f"instance; there is nothing to measure"
        )
    instances = [dataset.instances_by_id[str(text.instance_id)] for text in expressions]
    return Targets(
        image_positions(dataset, [each.image_id for each in instances]),
        np.array([each.box_xyxy_px for each in instances], dtype=np.float64),
    )


def queries_of(
    encoder: InstanceEncoder, dataset: ReferringDataset, expressions: Sequence[Expression]
) -> Queries:
    """Encode expressions as queries, with the position of their photo and their true box.

    Raises:
        DataError: there are no expressions.
    """
    targets = targets_of(dataset, expressions)
    vectors = encode_expressions(encoder, [text.text for text in expressions])
    return Queries(vectors, targets.images, targets.boxes_px)


def choosing_expressions(
    encoder: InstanceEncoder, queries: Queries, texts: Sequence[str], num_kept: int
) -> ChoosingExpressions | None:
    """Return the queries as choosers of instances; None if the encoder does not support that."""
    if not isinstance(encoder, ExpressionChooser):
        return None
    return ChoosingExpressions(tuple(texts), queries.vectors, queries.images, num_kept)


def _assemble(
    dataset: ReferringDataset,
    shards: Sequence[EncodedShard],
    choosers: ChoosingExpressions | None,
    threads: int,
) -> EncodedGallery:
    failures = np.concatenate([shard.failures for shard in shards])
    sizes_px = np.concatenate([shard.size_px for shard in shards])
    readable = np.flatnonzero(failures == "")
    unreadable = {}
    for at in np.flatnonzero(failures != "").tolist():
        unreadable[dataset.images[at].file_name] = str(failures[at])
        logger.warning(
            "%s: cannot be decoded (%s); it counts as a photo without instances",
            dataset.images[at].file_name,
            failures[at],
        )
    num_misshapen = sum(is_misshapen(dataset.images[at], sizes_px[at]) for at in readable)
    if num_misshapen:
        logger.warning(
            "%s: %d of %d photos have another aspect ratio than annotated; boxes may be wrong",
            dataset.source,
            num_misshapen,
            len(failures),
        )
    instances = InstanceLists.concatenate([shard.instances for shard in shards])
    image_vectors = np.concatenate([shard.image_vectors for shard in shards])
    return EncodedGallery(
        _gallery(dataset, instances, np.arange(len(failures))),
        image_vectors[readable],
        readable,
        _chosen(dataset, InstanceLists.concatenate([shard.chosen for shard in shards]), choosers),
        unreadable,
        num_misshapen,
        threads,
    )


def _chosen(
    dataset: ReferringDataset, packed: InstanceLists, choosers: ChoosingExpressions | None
) -> ChosenInstances | None:
    if choosers is None:
        return None
    order = np.argsort(choosers.images, kind="stable")  # the order of the lists in the shards
    num_turns = np.bincount(choosers.images, minlength=len(dataset.images))
    turn = np.empty(len(order), dtype=np.int64)
    firsts = np.cumsum(num_turns) - num_turns
    turn[order] = np.arange(len(order)) - firsts[choosers.images[order]]
    instances = _gallery(dataset, packed, choosers.images[order])
    return ChosenInstances(instances, np.repeat(order, packed.counts), turn, num_turns)


def _gallery(dataset: ReferringDataset, packed: InstanceLists, photo_of_list: Ints) -> Gallery:
    """Return instances with their photo, and with boxes in pixels of the annotated size.

    The true boxes are in these pixels, even if the file of a photo has another size.
    """
    images = np.repeat(photo_of_list, packed.counts)
    size_px = np.array([(photo.width_px, photo.height_px) for photo in dataset.images])
    width, height = size_px[images].T
    return Gallery(packed.vectors, images, packed.boxes * np.stack([width, height] * 2, axis=-1))


def _rows(gallery: Gallery, rows: np.ndarray) -> Gallery:
    return Gallery(gallery.vectors[rows], gallery.images[rows], gallery.boxes_px[rows])


def _concatenate(one: Gallery, other: Gallery) -> Gallery:
    return Gallery(
        np.concatenate([one.vectors, other.vectors]),
        np.concatenate([one.images, other.images]),
        np.concatenate([one.boxes_px, other.boxes_px]),
    )


def _true_boxes(dataset: ReferringDataset) -> list[FloatArray]:
    """Return the (N, 4) annotated boxes of each photo, xyxy in [0, 1], each box once."""
    boxes: dict[str, list[BoxPx]] = {photo.image_id: [] for photo in dataset.images}
    for instance in dataset.instances:
        boxes[instance.image_id].append(instance.box_xyxy_px)
    found = []
    for photo in dataset.images:
        sides_px = np.array([photo.width_px, photo.height_px] * 2)
        own = np.array(boxes[photo.image_id]).reshape(-1, 4) / sides_px
        unique = np.unique(own.clip(0, 1), axis=0)
        # Boxes without area have no pixels to encode.
        has_area = (unique[:, 2:] > unique[:, :2]).all(axis=1)
        found.append(unique[has_area].astype(np.float32))
    return found


def photo_paths(dataset: ReferringDataset, images_dir: Path) -> list[Path]:
    """Return the path of each photo of a dataset.

    Raises:
        DataError: photos are missing, or a file name points outside `images_dir`.
    """
    paths = [_photo_path(dataset, photo, images_dir) for photo in dataset.images]
    missing = [path for path in paths if not path.exists()]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(paths)} photos of {dataset.source} are not in {images_dir}, "
            f"e.g. {missing[0].relative_to(images_dir)}; file names must be relative to this folder"
        )
    return paths


def _photo_path(dataset: ReferringDataset, photo: ReferringImage, images_dir: Path) -> Path:
    if leaves_folder(photo.file_name):
        raise DataError(
            f"{dataset.source}: image {photo.image_id!r}: expected a file_name inside the folder "
            f"of photos, got {photo.file_name!r}"
        )
    return images_dir / photo.file_name


def is_misshapen(photo: ReferringImage, size_px: Ints) -> bool:
    """Whether a photo's (2,) width and height have another aspect ratio than annotated."""
    width, height = size_px
    ratio = (width * photo.height_px) / (height * photo.width_px)
    return bool(abs(ratio - 1) > _SHAPE_TOLERANCE)
