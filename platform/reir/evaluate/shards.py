"""Shards: groups of photos that are encoded independently, in any process.

An interrupted evaluation restarts at a shard, and workers get one shard at a time. The result of a
shard depends only on the encoder and the shard, to the last bit: photos of two shards never share a
batch, and the number of threads, which changes how sums are rounded, is part of the shard.
"""

# Shapes: P photos of a shard, J instances, E expressions of these photos, L lists of instances,
#         D vector dimension

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from socket import gethostname
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from reir.errors import CheckpointError, DataError, ImageError
from reir.images.decode import read_image
from reir.metrics.reir import Ints
from reir.models.interfaces import BoxEncoder, ExpressionChooser, InstanceChoices, InstanceEncoder
from reir.records import FloatArray, Instances, RgbImage

BATCH_PHOTOS = 8


@dataclass(frozen=True)
class Shard:
    """Some photos to encode, in the form that is sent to a worker.

    Attributes:
        number: index of the shard in the gallery.
        paths: paths of P photos; every process must be able to read them.
        digest: digest of the encoder to use.
        expressions: for each photo, the (T, D) vectors of the expressions that choose instances;
            empty if no expressions choose.
        num_kept: number of instances that each expression chooses.
        threads: CPU threads of torch.
        boxes: for each photo, the (N, 4) boxes to encode, xyxy in [0, 1]; empty if the encoder
            finds the boxes.
    """

    number: int
    paths: tuple[Path, ...]
    digest: str
    expressions: tuple[FloatArray, ...] = ()
    num_kept: int = 1
    threads: int = 1
    boxes: tuple[FloatArray, ...] = ()


@dataclass(frozen=True)
class InstanceLists:
    """L lists of instances as flat arrays, one list after the other.

    Attributes:
        counts: (L,) length of each list.
        boxes: (J, 4) float32, xyxy in [0, 1] of the photo.
        vectors: (J, D) float32.
    """

    counts: Ints
    boxes: FloatArray
    vectors: FloatArray

    @classmethod
    def of(cls, lists: Sequence[Instances], dim: int) -> InstanceLists:
        """Flatten lists of instances."""
        return cls(
            np.array([len(each) for each in lists], dtype=np.int64),
            np.concatenate([np.empty((0, 4), np.float32), *(each.boxes for each in lists)]),
            np.concatenate([np.empty((0, dim), np.float32), *(each.vectors for each in lists)]),
        )

    @classmethod
    def concatenate(cls, parts: Sequence[InstanceLists]) -> InstanceLists:
        """Return the lists of all parts."""
        names = [field.name for field in fields(cls)]
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


@dataclass(frozen=True)
class EncodedShard:
    """The result of a shard.

    Attributes:
        instances: P lists, chosen without any query; empty if a photo cannot be decoded.
        chosen: E lists, one for each expression of each photo, photo by photo.
        image_vectors: (P, D) vectors of whole photos; NaN if a photo cannot be decoded.
        size_px: (P, 2) width and height of each photo; 0 if it cannot be decoded.
        failures: (P,) reason why a photo cannot be decoded; empty text if it can.
    """

    instances: InstanceLists
    chosen: InstanceLists
    image_vectors: FloatArray
    size_px: Ints
    failures: npt.NDArray[np.str_]

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return the arrays under the names that they are saved by."""
        packed = {
            f"{part}_{field.name}": getattr(getattr(self, part), field.name)
            for part in ("instances", "chosen")
            for field in fields(InstanceLists)
        }
        return packed | {
            "image_vectors": self.image_vectors,
            "size_px": self.size_px,
            "failures": self.failures,
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> EncodedShard:
        """Inverse of `to_arrays`.

        Raises:
            KeyError: an array is missing.
        """
        instances, chosen = (
            InstanceLists(*(arrays[f"{part}_{field.name}"] for field in fields(InstanceLists)))
            for part in ("instances", "chosen")
        )
        rest = (arrays[name] for name in ("image_vectors", "size_px", "failures"))
        return cls(instances, chosen, *rest)


Runner = Callable[[Iterable[Shard]], Iterator[tuple[int, EncodedShard]]]
"""Encodes shards, and yields the number and result of each as it is done, in any order."""


def run_here(encoder: InstanceEncoder) -> Runner:
    """Return the runner that encodes one shard after the other in this process."""
    return lambda shards: ((shard.number, encode_shard(encoder, shard)) for shard in shards)


def encode_shard(encoder: InstanceEncoder, shard: Shard) -> EncodedShard:
    """Decode and encode the photos of a shard.

    Args:
        encoder: an `ExpressionChooser` if the shard has expressions; a `BoxEncoder` if it has
            boxes.
        shard: the photos.

    Raises:
        CheckpointError: the encoder has another digest than the shard asks for.
        DataError: a photo is missing.
    """
    if encoder.digest != shard.digest:
        raise CheckpointError(
            f"this process loaded an encoder with digest {encoder.digest[:12]}, but the evaluation "
            f"uses {shard.digest[:12]}; every worker must see the same checkpoint at the same path"
        )
    num_photos = len(shard.paths)
    size_px = np.zeros((num_photos, 2), dtype=np.int64)
    failures = [""] * num_photos
    found: dict[int, InstanceChoices] = {}
    with torch_threads(shard.threads):
        for first in range(0, num_photos, BATCH_PHOTOS):
            photos: dict[int, RgbImage] = {}
            for at in range(first, num_photos)[:BATCH_PHOTOS]:
                try:
                    photos[at] = read_photo(shard.paths[at])
                except ImageError as error:
                    # As text, which `np.savez` can store without a pickle.
                    failures[at] = error.reason.value
            for at, pixels in photos.items():
                size_px[at] = pixels.shape[1::-1]
            found.update(zip(photos, _encode(encoder, shard, photos), strict=True))
    # A photo that cannot be decoded keeps its place, so that lists and photos stay aligned.
    results = [found.get(at) or _nothing(encoder.dim, shard, at) for at in range(num_photos)]
    image_vectors = [
        found[at].query_free.image_vector if at in found else np.full(encoder.dim, np.nan)
        for at in range(num_photos)
    ]
    return EncodedShard(
        InstanceLists.of([each.query_free for each in results], encoder.dim),
        InstanceLists.of([own for each in results for own in each.by_expression], encoder.dim),
        np.array(image_vectors, dtype=np.float32),
        size_px,
        np.array(failures, dtype=np.str_),
    )


def read_photo(path: Path) -> RgbImage:
    """Return the pixels of a photo.

    Raises:
        DataError: it is missing.
        ImageError: it cannot be decoded.
    """
    # A missing file is not a broken photo: most likely this machine cannot see the folder at all,
    # and going on would give a report without photos.
    if not path.exists():
        raise DataError(
            f"{path} does not exist on {gethostname()}; every worker must see the photos there"
        )
    return read_image(path)


def _encode(
    encoder: InstanceEncoder, shard: Shard, photos: Mapping[int, RgbImage]
) -> Sequence[InstanceChoices]:
    pixels = list(photos.values())
    if not pixels:
        return []
    if shard.boxes:
        if not isinstance(encoder, BoxEncoder):
            raise TypeError(f"{type(encoder).__name__} cannot encode given boxes")
        given = {at: encoder.encode_boxes(photos[at], shard.boxes[at]) for at in photos}
        return [InstanceChoices(instances, ()) for instances in given.values()]
    if not shard.expressions:
        return [InstanceChoices(instances, ()) for instances in encoder.encode_images(pixels)]
    if not isinstance(encoder, ExpressionChooser):
        raise TypeError(f"{type(encoder).__name__} cannot choose instances by an expression")
    asked = [shard.expressions[at] for at in photos]
    return encoder.encode_images_for(pixels, asked, shard.num_kept)


def _nothing(dim: int, shard: Shard, at: int) -> InstanceChoices:
    """Return the result of a photo that cannot be decoded: no instances for any expression."""
    boxes, objectness, vectors, whole = (
        np.zeros(shape, np.float32) for shape in ((0, 4), (0,), (0, dim), (dim,))
    )
    none = Instances(boxes, objectness, vectors, whole)
    num_expressions = len(shard.expressions[at]) if shard.expressions else 0
    return InstanceChoices(none, (none,) * num_expressions)


@contextmanager
def torch_threads(num: int) -> Iterator[None]:
    """Set the number of CPU threads of torch for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(num)
    try:
        yield
    finally:
        torch.set_num_threads(before)
