"""What a run keeps, and a second home for it: a bucket or a shared folder, through pyarrow."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pyarrow.fs import FileSystem, FileType, LocalFileSystem, copy_files

from reir.errors import ConfigError
from reir.object_storage import STORAGE_ERRORS, open_filesystem, without_secrets

METRICS, CHECKPOINT, TENSORBOARD = "metrics.jsonl", "checkpoint", "tensorboard"
MARKER = ".reir-write-test"


@dataclass(frozen=True)
class Storage:
    """A folder in some file system; what is pushed keeps its name.

    Attributes:
        filesystem: pyarrow's.
        path: of the folder in it, without a scheme.
    """

    filesystem: FileSystem
    path: str

    def push(self, local: Path) -> None:
        """Copy a file or folder to the storage, over what it holds of that name."""
        target = f"{self.path}/{local.name}"
        if local.is_dir():
            self.filesystem.create_dir(target)
        # uploads by several threads can hang in pyarrow's S3 (apache/arrow#32372)
        copy_files(str(local), target, destination_filesystem=self.filesystem, use_threads=False)

    def pull(self, local: Path) -> None:
        """Fetch the file or folder of that name, unless the storage has none or a shorter file."""
        found = self.filesystem.get_file_info(f"{self.path}/{local.name}")
        if found.type == FileType.Directory:
            local.mkdir(parents=True, exist_ok=True)
        elif found.type != FileType.File or (local.exists() and local.stat().st_size >= found.size):
            return
        copy_files(found.path, str(local), source_filesystem=self.filesystem)

    def check(self) -> None:
        """Write, read and delete a small file.

        Raises:
            OSError: one of the three failed.
        """
        marker = f"{self.path}/{MARKER}"
        self.filesystem.create_dir(self.path)
        with self.filesystem.open_output_stream(marker) as stream:
            stream.write(MARKER.encode())
        with self.filesystem.open_input_stream(marker) as stream:
            if stream.read() != MARKER.encode():
                raise OSError("what was written is not what is read")
        self.filesystem.delete_file(marker)


def open_storage(uri: str) -> Storage:
    """Return the storage at `uri`.

    Args:
        uri: a folder, or a bucket as `reir.object_storage.open_filesystem` takes it.

    Raises:
        ConfigError: there is no such kind of storage, or an option is not known.
    """
    if "://" not in uri:
        return Storage(LocalFileSystem(), str(Path(uri).absolute()))
    try:
        return Storage(*open_filesystem(uri))
    except STORAGE_ERRORS as error:
        raise ConfigError(_named(uri, error)) from error


def checked_storage(uri: str) -> Storage:
    """Open a storage and try it, before hours are spent.

    Raises:
        ConfigError: as `open_storage`, or it cannot be written and read.
    """
    storage = open_storage(uri)
    try:
        storage.check()
    except STORAGE_ERRORS as error:
        raise ConfigError(_named(uri, error)) from error
    return storage


def _named(uri: str, error: Exception) -> str:
    return (
        f"storage {without_secrets(uri)!r} cannot be used: {error}; it takes s3://bucket/path, "
        "gs://bucket/path or a folder that can be written"
    )
