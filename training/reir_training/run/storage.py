"""Remote storage for the output of a run: a bucket or a shared folder, through pyarrow."""

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
    """A folder in a local or remote file system; files keep their names in it.

    Attributes:
        filesystem: pyarrow file system.
        path: path of the folder, without a scheme.
    """

    filesystem: FileSystem
    path: str

    def push(self, local: Path) -> None:
        """Upload a file or folder, replacing files of the same name."""
        target = f"{self.path}/{local.name}"
        if local.is_dir():
            self.filesystem.create_dir(target)
        # Uploads with several threads can hang in pyarrow's S3 (apache/arrow#32372).
        copy_files(str(local), target, destination_filesystem=self.filesystem, use_threads=False)

    def pull(self, local: Path) -> None:
        """Download the file or folder of that name from the storage.

        A local file is only replaced if the stored one is longer: a local metrics file may have
        lines that were not uploaded before the run was interrupted.
        """
        found = self.filesystem.get_file_info(f"{self.path}/{local.name}")
        if found.type == FileType.Directory:
            local.mkdir(parents=True, exist_ok=True)
        elif found.type != FileType.File or (local.exists() and local.stat().st_size >= found.size):
            return
        copy_files(found.path, str(local), source_filesystem=self.filesystem)

    def check(self) -> None:
        """Write, read and delete a small file.

        Raises:
            OSError: one of these operations failed.
        """
        marker = f"{self.path}/{MARKER}"
        self.filesystem.create_dir(self.path)
        with self.filesystem.open_output_stream(marker) as stream:
            stream.write(MARKER.encode())
        # Reading needs another permission than writing, and resuming a run needs both.
        with self.filesystem.open_input_stream(marker) as stream:
            if stream.read() != MARKER.encode():
                raise OSError("a test file does not have the content that was written")
        self.filesystem.delete_file(marker)


def open_storage(uri: str) -> Storage:
    """Open the storage at a URI.

    Args:
        uri: a folder, or a bucket in the form that `reir.object_storage.open_filesystem` accepts.

    Raises:
        ConfigError: the scheme or an option of the URI is unknown.
    """
    if "://" not in uri:
        return Storage(LocalFileSystem(), str(Path(uri).absolute()))
    try:
        return Storage(*open_filesystem(uri))
    except STORAGE_ERRORS as error:
        raise ConfigError(_message(uri, error)) from error


def open_checked_storage(uri: str) -> Storage:
    """Open a storage and test it, so that a run does not fail when it first saves a state.

    Raises:
        ConfigError: for the same reasons as in `open_storage`, or the storage is not writable.
    """
    storage = open_storage(uri)
    try:
        storage.check()
    except STORAGE_ERRORS as error:
        raise ConfigError(_message(uri, error)) from error
    return storage


def _message(uri: str, error: Exception) -> str:
    return (
        f"storage {without_secrets(uri)!r} cannot be used: {error}; use s3://bucket/path, "
        "gs://bucket/path or a writable folder"
    )
