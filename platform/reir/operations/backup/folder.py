"""`BackupFolder`: the folder of a backup, on a disk of this machine or in a bucket."""

from __future__ import annotations

import errno
import os
import secrets
import socket
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pyarrow.fs import FileSelector, FileSystem, FileType, LocalFileSystem

from reir.errors import FREE_SPACE, ConfigError, DataError
from reir.object_storage import STORAGE_ERRORS, open_filesystem, without_secrets

CLAIM = "backup-running.txt"
"""File that is in a folder while a backup is written into it, or after one was killed."""


@dataclass(frozen=True)
class BackupFolder:
    """A folder with files, each of which is written as a whole.

    Attributes:
        filesystem: pyarrow file system.
        path: path of the folder in that file system.
        place: the folder in the words of messages and records, without secrets.
        claim: content of the file `CLAIM` while this process may write; empty if it has not
            claimed the folder.
    """

    filesystem: FileSystem
    path: str
    place: str
    claim: str = ""

    def sizes(self) -> dict[str, int]:
        """Size of each file in the folder by name, 0 for folders; empty if there is no folder.

        Raises:
            ConfigError: it is a file.
            DataError: it cannot be read.
        """
        try:
            # Asked first, because to list the files of a file would fail with a vaguer error.
            if self.filesystem.get_file_info(self.path).type == FileType.File:
                raise ConfigError(f"{self.place} is a file; name a folder for the backup")
            found = self.filesystem.get_file_info(FileSelector(self.path, allow_not_found=True))
        except STORAGE_ERRORS as error:
            raise DataError(f"the folder {self.place} cannot be read: {error}") from error
        return {each.base_name: each.size or 0 for each in found}

    def claimed(self) -> BackupFolder:
        """Create the folder if it is missing, and return it with a claim; see `release`.

        A bucket cannot create a file only if it is missing. Of two backups that begin there at the
        same moment, the one that claimed the folder first fails at its next file.

        Raises:
            ConfigError: another backup has claimed it.
            DataError: it cannot be created or written.
        """
        claim = f"{socket.gethostname()} {os.getpid()} {secrets.token_hex(8)}"
        if not self._is_local:
            self.write(CLAIM, memoryview(claim.encode()))
            return replace(self, claim=claim)
        path = os.path.join(self.path, CLAIM)
        try:
            os.makedirs(self.path, exist_ok=True)
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except OSError as error:
            if os.path.lexists(path):
                raise self.taken_error() from error
            raise DataError(f"the folder {self.place} cannot be created: {error}") from error
        try:
            with open(handle, "w", encoding="utf-8") as file:
                file.write(claim)
        except OSError as error:  # the disk is full
            os.unlink(path)
            raise self._write_error(CLAIM, error) from error
        return replace(self, claim=claim)

    def release(self) -> None:
        """Give up the claim, unless the folder belongs to another backup by now."""
        self.delete([CLAIM])

    def taken_error(self) -> ConfigError:
        """Return the error for a folder that another backup has claimed."""
        return ConfigError(
            f"a backup into {self.place} is running, or was interrupted; name another folder, or "
            f"delete this one if none is running"
        )

    def write(self, name: str, content: memoryview) -> None:
        """Write a file, which gets its name when it is complete, and replace one of that name.

        Raises:
            DataError: it cannot be written, or the folder belongs to another backup by now.
        """
        self._check_claim()
        try:
            if self._is_local:
                self._write_local(name, content)
            else:  # a bucket shows an object only once all of it was sent
                with self.filesystem.open_output_stream(f"{self.path}/{name}") as stream:
                    stream.write(content)
        except STORAGE_ERRORS as error:
            raise self._write_error(name, error) from error

    def read(self, name: str) -> Any:
        """Return the content of a file as a buffer.

        Raises:
            DataError: it is missing, or cannot be read.
        """
        with self.open(name) as file:
            try:
                return file.read_buffer()
            except STORAGE_ERRORS as error:
                raise self._read_error(name, error) from error

    def open(self, name: str) -> Any:
        """Open a file to read parts of it.

        Raises:
            DataError: it is missing, or cannot be read.
        """
        try:
            return self.filesystem.open_input_file(f"{self.path}/{name}")
        except FileNotFoundError as error:
            raise DataError(f"{self.place}/{name} is missing") from error
        except STORAGE_ERRORS as error:
            raise self._read_error(name, error) from error

    def delete(self, names: Iterable[str]) -> None:
        """Delete files as far as that is possible; those that do not exist are ignored.

        If the folder belongs to another backup by now, nothing is deleted.
        """
        try:
            self._check_claim()
        except DataError:
            return
        for name in names:
            with suppress(*STORAGE_ERRORS):
                self.filesystem.delete_file(f"{self.path}/{name}")

    @property
    def _is_local(self) -> bool:
        return isinstance(self.filesystem, LocalFileSystem)

    def _check_claim(self) -> None:
        """Raise `DataError` if the folder belongs to another backup by now."""
        if not self.claim:
            return
        # Somebody may have deleted the folder, and begun another backup there.
        if CLAIM not in self.sizes() or bytes(self.read(CLAIM)) != self.claim.encode():
            raise DataError(
                f"another process seems to use the folder {self.place}: name another one"
            )

    def _write_local(self, name: str, content: memoryview) -> None:
        # Beside the file, because a rename is atomic only within one file system.
        temporary = os.path.join(self.path, f".{name}.{os.getpid()}")
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())  # so that a power failure cannot leave an empty file
            os.replace(temporary, os.path.join(self.path, name))
        except OSError:
            with suppress(OSError):
                os.unlink(temporary)
            raise

    def _write_error(self, name: str, error: Exception) -> DataError:
        advice = f"; {FREE_SPACE}" if getattr(error, "errno", None) == errno.ENOSPC else ""
        return DataError(f"{self.place}/{name} cannot be written: {error}{advice}")

    def _read_error(self, name: str, error: Exception) -> DataError:
        return DataError(f"{self.place}/{name} cannot be read: {error}")


def open_folder(place: str) -> BackupFolder:
    """Return a folder, which need not exist yet.

    Args:
        place: a local path, or a folder in a bucket as `reir.object_storage.open_filesystem`
            accepts it.

    Raises:
        ConfigError: the kind of storage or an option is unknown.
    """
    if "://" not in place:
        path = str(Path(place).expanduser().absolute())
        return BackupFolder(LocalFileSystem(), path, path)
    try:
        return BackupFolder(*open_filesystem(place), without_secrets(place))
    except STORAGE_ERRORS as error:
        raise ConfigError(
            f"the folder {without_secrets(place)!r} cannot be used: {error}; name a local path, "
            f"s3://BUCKET/PATH or gs://BUCKET/PATH"
        ) from error
