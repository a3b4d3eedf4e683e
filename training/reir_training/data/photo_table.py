"""The annotated photos of a run, in files that all processes of a machine share.

As Python objects, the annotations of a published data set would take gigabytes in every worker and
in every process that loads data for it. Instead, a short-lived process writes them once to Arrow
files, which the other processes map into memory. A photo becomes a Python object only on access.
"""

from __future__ import annotations

import fcntl
import logging
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa

from reir.records import MaskRle
from reir_training.config import DataConfig
from reir_training.data.examples import TRAIN, VAL, TrainExpression, TrainPhoto, split_held_out
from reir_training.data.leakage import training_photos

logger = logging.getLogger(__name__)

# All batches but the last have this length, which lets `__getitem__` find a row by division.
ROWS_A_BATCH = 1024
_TEXTS = pa.list_(pa.string())
_SCHEMA = pa.schema(
    {
        "path": pa.string(),
        "split": pa.string(),
        "boxes": pa.list_(pa.float32()),
        "categories": pa.list_(pa.int64()),
        "names": _TEXTS,
        "texts": _TEXTS,
        "text_boxes": pa.list_(pa.int32()),
        "kinds": _TEXTS,
        "captions": _TEXTS,
        "near_misses": _TEXTS,
        "crowded": _TEXTS,
        "is_wide": pa.bool_(),
        "size_px": pa.list_(pa.int32()),
        "gallery": pa.string(),
        "mask_sides": pa.list_(pa.int32()),
        "mask_runs": _TEXTS,
        "look_alikes": _TEXTS,
    }
)


class PhotoTable(Sequence[TrainPhoto]):
    """Photos in a file, which each process maps into memory when it first uses the table.

    Args:
        path: file that `write_photos` wrote.
        write: writes the file if this machine does not have it yet; must be picklable.
    """

    def __init__(self, path: Path, write: Callable[[], object] | None = None) -> None:
        self._path, self._write = path, write
        self._batches: list[pa.RecordBatch] | None = None
        self._length = 0

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle only the path: each process maps the same file itself."""
        return PhotoTable, (self._path, self._write)

    def _mapped(self) -> list[pa.RecordBatch]:
        if self._batches is None:
            if self._write is not None:
                self._write()
            reader = pa.ipc.open_file(pa.memory_map(str(self._path)))
            self._batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
            self._length = sum(batch.num_rows for batch in self._batches)
        return self._batches

    def __len__(self) -> int:
        """Return the number of photos."""
        self._mapped()
        return self._length

    @overload
    def __getitem__(self, row: int) -> TrainPhoto: ...

    @overload
    def __getitem__(self, row: slice) -> list[TrainPhoto]: ...

    def __getitem__(self, row: int | slice) -> TrainPhoto | list[TrainPhoto]:
        """Return one photo, or a list of photos for a slice."""
        if isinstance(row, slice):
            return [self[i] for i in range(*row.indices(len(self)))]
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} is out of range: the table has {len(self)} photos")
        batch, place = divmod(row, ROWS_A_BATCH)
        columns = self._mapped()[batch].slice(place, 1)
        return _photo({name: columns[name][0].as_py() for name in _SCHEMA.names})

    def __iter__(self) -> Iterator[TrainPhoto]:
        """Yield all photos, a batch of rows at a time."""
        for batch in self._mapped():
            yield from map(_photo, batch.to_pylist())


def write_photos(photos: Iterable[TrainPhoto], path: Path) -> None:
    """Write photos to a file atomically, so that no process sees an incomplete file."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    with pa.OSFile(str(unfinished), "wb") as file, pa.ipc.new_file(file, _SCHEMA) as writer:
        rows = map(_row, photos)
        while batch := list(islice(rows, ROWS_A_BATCH)):
            writer.write_batch(pa.RecordBatch.from_pylist(batch, _SCHEMA))
    unfinished.replace(path)


def read_run_photos(
    config: DataConfig, cache: Path | None, *, masks: bool = False
) -> tuple[Sequence[TrainPhoto], Sequence[TrainPhoto]]:
    """Return the training photos and the held-out photos, as tables in `cache` if it is set.

    Raises:
        DataError: for the same reasons as in `training_photos`.
    """
    if cache is not None:
        return shared_photos(config, cache, masks=masks)
    return split_held_out(training_photos(config, masks=masks))


def shared_photos(
    config: DataConfig, folder: Path, *, masks: bool = False
) -> tuple[PhotoTable, PhotoTable]:
    """Return tables of the training photos and of the held-out photos.

    The annotations are read when a table is first used; only then are the errors of
    `training_photos` raised.

    Args:
        config: settings of the run.
        folder: where the processes of this machine share the tables; created if missing.
        masks: read masks too.
    """
    name = _fingerprint(config, masks)
    paths = {split: folder / f"{name}-{split}.arrow" for split in (TRAIN, VAL)}
    write = partial(_write_missing, config, paths, masks)
    train, held_out = (PhotoTable(path, write) for path in paths.values())
    return train, held_out


def _write_missing(config: DataConfig, paths: Mapping[str, Path], masks: bool) -> None:
    """Write the tables if they do not exist yet.

    One process of each machine writes them; the others wait for it.
    """
    folder = paths[TRAIN].parent
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / "lock"):
        if not all(path.is_file() for path in paths.values()):
            # Python would not return the memory that parsing takes, so a child process parses. It
            # is spawned, because a fork would not survive the threads of Ray and torch.
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as child:
                for warning in child.submit(_read_and_write, config, paths, masks).result():
                    logger.warning("%s", warning)


def _read_and_write(config: DataConfig, paths: Mapping[str, Path], masks: bool) -> list[str]:
    """Write the tables, and return the warnings that were logged meanwhile."""
    # The parent process logs them: the logging of a spawned child is not configured.
    collector = _WarningCollector()
    logging.getLogger().addHandler(collector)
    train, held_out = split_held_out(training_photos(config, masks=masks))
    write_photos(train, paths[TRAIN])
    write_photos(held_out, paths[VAL])
    return collector.messages


class _WarningCollector(logging.Handler):
    """Collects the messages of warnings and errors."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the message of a record."""
        self.messages.append(record.getMessage())


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive file lock, which the system releases even if the process is killed."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fingerprint(config: DataConfig, masks: bool) -> str:
    """Return a fingerprint of the settings and the current annotation files."""
    settings = config.model_dump_json(include=set(DataConfig.model_fields))
    # A table of another release may lack a column.
    parts = [settings, str(masks), str(_SCHEMA)]
    for source in (*config.data, *config.evaluation):
        # Beside the main file, a folder may contain captions, splits and near misses.
        files = [source.path / source.file] if source.file else []
        for file in sorted({*files, *source.path.glob("*.json"), *source.path.glob("*.p")}):
            if file.is_file():
                found = file.stat()
                parts.append(f"{file} {found.st_size} {found.st_mtime_ns}")
    return sha256("\n".join(parts).encode()).hexdigest()[:16]


def _row(photo: TrainPhoto) -> dict[str, Any]:
    runs = [None if mask is None else mask.counts for mask in photo.masks]
    # A missing mask gets the size (0, 0), so that sizes and runs stay aligned.
    sides = [side for mask in photo.masks for side in (mask.size if mask else (0, 0))]
    return {
        "path": str(photo.path),
        "split": photo.split,
        "boxes": photo.boxes.ravel(),
        "categories": photo.categories,
        "names": photo.names,
        "texts": [expression.text for expression in photo.expressions],
        "text_boxes": [expression.box for expression in photo.expressions],
        "kinds": [expression.kind for expression in photo.expressions],
        "captions": photo.captions,
        "near_misses": photo.near_misses,
        "crowded": sorted(photo.crowded),
        "is_wide": photo.is_wide,
        "size_px": photo.size_px,
        "gallery": photo.gallery,
        "mask_sides": sides,
        "mask_runs": runs,
        "look_alikes": sorted(photo.look_alikes),
    }


def _photo(row: dict[str, Any]) -> TrainPhoto:
    sides = zip(row["mask_sides"][::2], row["mask_sides"][1::2], strict=True)
    return TrainPhoto(
        path=Path(row["path"]),
        split=row["split"],
        boxes=np.array(row["boxes"], dtype=np.float32).reshape(-1, 4),
        categories=np.array(row["categories"], dtype=np.int64),
        names=tuple(row["names"]),
        expressions=tuple(map(TrainExpression, row["texts"], row["text_boxes"], row["kinds"])),
        captions=tuple(row["captions"]),
        near_misses=tuple(row["near_misses"]),
        crowded=frozenset(row["crowded"]),
        is_wide=row["is_wide"],
        size_px=(row["size_px"][0], row["size_px"][1]),
        gallery=row["gallery"],
        masks=tuple(
            None if runs is None else MaskRle(side, runs)
            for side, runs in zip(sides, row["mask_runs"], strict=True)
        ),
        look_alikes=frozenset(row["look_alikes"]),
    )
