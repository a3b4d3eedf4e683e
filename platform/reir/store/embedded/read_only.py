"""An embedded store in a read-only folder is served from a small temporary copy.

Milvus Lite writes when it opens a store: locks, a write-ahead log, cleanup. The copy lets it do so.
Large files are symlinks to the store, so that the copy is small and fast to make. Writes that reach
the store after the copy was made are not seen, except by searches: a process that has already
searched a version reads on in its journal. One that has not finds that the journal does not match
the copy, and rebuilds it from there.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from pathlib import Path

from reir.errors import StoreUnavailable

# A stamp contains the inode and ctime of its journal. Through a symlink, these are still the same,
# so the stamp stays valid and the journal need not be compared with the store.
_SYMLINKED_SUFFIXES = {".parquet", ".idx", ".rows", ".journal"}
# The files beside these folders, such as locks and server.json, belong to servers of the original.
_COPIED_FOLDERS = ("milvus", "reader")


def why_read_only(directory: Path) -> str:
    """Return the system's reason why an existing store is not writable; "" if it is writable."""
    # By default, `os.access` asks for the real user, but files are opened as the effective one.
    # `os.path.isdir` returns False, without an error, if permission is missing
    if not os.path.isdir(directory / "milvus") or os.access(directory, os.W_OK, effective_ids=True):
        return ""
    is_disk = os.statvfs(directory).f_flag & os.ST_RDONLY
    return os.strerror(errno.EROFS if is_disk else errno.EACCES)


def copy_with_symlinks(directory: Path) -> tempfile.TemporaryDirectory[str]:
    """Copy a store to a temporary directory, with symlinks instead of copies of large files.

    Raises:
        StoreUnavailable: a file cannot be read, or there is no space for the copy.
    """
    copy = tempfile.TemporaryDirectory(prefix="reir-read-only-", ignore_cleanup_errors=True)
    try:
        for name in _COPIED_FOLDERS:
            if os.path.isdir(directory / name):
                target = Path(copy.name) / name
                shutil.copytree(directory / name, target, copy_function=_link_or_copy)
        for folder, _, _ in os.walk(copy.name):  # `copytree` has copied their read-only mode
            os.chmod(folder, 0o700)
    except OSError as error:
        copy.cleanup()
        raise StoreUnavailable(
            str(directory),
            f"its folder is read-only, and copying it to {copy.name} to read it failed: {error}; "
            f"make its files readable, or set TMPDIR to a folder with free space",
        ) from error
    return copy


def _link_or_copy(source: str, target: str) -> None:
    if Path(source).suffix in _SYMLINKED_SUFFIXES:
        os.symlink(source, target)
    else:
        shutil.copyfile(source, target)
