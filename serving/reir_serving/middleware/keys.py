"""API keys: the file with their salted hashes, and the key ring with which a server checks them.

A key has the form `reir_ID_SECRET`. The file never contains the secret. The secret has 256 random
bits, so nobody can guess it from its hash, and a single round of hashing is enough. This module
does not depend on HTTP.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import math
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator

from reir.config import StrictConfig, dump_config, load_config
from reir.errors import ConfigError, ReirError, nearest_name
from reir.store.embedded.locks import FileLock
from reir.store.names import check_name
from reir_serving.middleware.access import ALL_GALLERIES, Caller

CHECK_EVERY_S = 1.0
"""How often a server checks whether the file has changed; from then on it rejects a revoked key."""

TRUSTED_S = 60.0
"""Seconds for which the last keys stay valid after the keys file has become unusable. This is long
enough to correct a mistake in the file, and short enough that a key whose revocation broke the file
does not stay valid for long."""

_TOKEN = re.compile(r"reir_([0-9a-f]{8})_([0-9a-f]{64})")
# Stands in for the salt of an unknown key, see `KeyRing.caller`.
_NO_SALT = "0" * 32

GalleryNames = tuple[str, ...]

logger = logging.getLogger(__name__)


class KeyEntry(StrictConfig):
    """One key, as it is in the file.

    Attributes:
        id: first part of the key; it is not secret.
        salt, hash: hexadecimal; `hash` is the HMAC-SHA256 of the secret with the salt as the key.
        read, write: names of galleries, or "*" for all.
        tenant: see `Caller.tenant`.
        rate_per_s: average number of requests per second; None applies the server's limit.
        note: who uses the key.
        created: ISO date.
    """

    id: Annotated[str, Field(pattern=r"^[0-9a-f]{8}$")]
    salt: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    hash: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    read: GalleryNames = ()
    write: GalleryNames = ()
    tenant: str = ""
    rate_per_s: float | None = Field(None, gt=0)
    note: str = ""
    created: str = ""

    @field_validator("read", "write")
    @classmethod
    def _galleries(cls, names: GalleryNames) -> GalleryNames:
        for name in names:
            if name != ALL_GALLERIES:
                _checked_name("gallery", name)
        return names

    @field_validator("tenant")
    @classmethod
    def _tenant(cls, name: str) -> str:
        # `Caller.restrict_filter` puts the name into a filter, so it must not contain quotes.
        return _checked_name("tenant", name) if name else name

    @property
    def caller(self) -> Caller:
        """The caller that sends requests with this key."""
        return Caller(
            key_id=self.id,
            tenant=self.tenant,
            read=self.read,
            write=self.write,
            rate_per_s=self.rate_per_s,
        )


class KeyFile(StrictConfig):
    """The keys file."""

    keys: tuple[KeyEntry, ...] = ()


def new_key(
    path: Path, *, read: GalleryNames, write: GalleryNames, tenant: str = "", note: str = ""
) -> str:
    """Add a key to the file and return it; it cannot be shown again.

    Creates the file if it does not exist.

    Raises:
        ConfigError: a name is not allowed, or the file cannot be read or written.
    """
    secret, salt = secrets.token_hex(32), secrets.token_hex(16)
    values = {
        "salt": salt,
        "hash": _hash(salt, secret),
        "read": read,
        "write": write,
        "tenant": tenant,
        "note": note,
        "created": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    with _locked(path):
        file = load_config(KeyFile, path) if path.exists() else KeyFile()
        taken = {entry.id for entry in file.keys}
        key_id = secrets.token_hex(4)
        while key_id in taken:
            key_id = secrets.token_hex(4)
        entry = load_config(KeyEntry, {"id": key_id, **values})
        _save(path, KeyFile(keys=(*file.keys, entry)))
    return f"reir_{key_id}_{secret}"


def revoke_key(path: Path, key_id: str) -> None:
    """Delete a key from the file.

    Raises:
        ConfigError: the file cannot be used, or has no such key.
    """
    with _locked(path):
        file = load_config(KeyFile, path)
        others = tuple(entry for entry in file.keys if entry.id != key_id)
        if len(others) == len(file.keys):
            known = [entry.id for entry in file.keys]
            raise ConfigError(
                f"{path} has no key {key_id!r}{nearest_name(key_id, known)}; `reir keys list "
                f"--file {path}` lists the keys"
            )
        _save(path, KeyFile(keys=others))


class KeysUnusable(ReirError):
    """The keys file is unusable and the keys last read from it have expired; none is accepted."""


class KeyRing:
    """The API keys of a server, reloaded whenever the keys file changes.

    If the file becomes unusable, the keys read from it last stay valid for `TRUSTED_S` seconds.
    After that, no key is accepted.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        """Read the file.

        Raises:
            ConfigError: the file cannot be read, or an entry of it is invalid.
        """
        self._path, self._clock = path, clock
        # Before the file is read: if it changes in between, the next check finds another stamp and
        # reads it again.
        self._stamp = _stamp(path)
        self._entries = _entries(path)
        self._checked_s = clock()
        self._problem, self._expire_s, self._is_expiry_logged = "", math.inf, False

    def caller(self, token: str) -> Caller | None:
        """Return the caller with this key; None if the key is wrong.

        The duration does not reveal how many characters of a wrong key are right.

        Raises:
            KeysUnusable: the file has been unusable for `TRUSTED_S` seconds.
        """
        self._reload_if_changed()
        if self.is_expired:
            raise KeysUnusable(self._problem)
        found = _TOKEN.fullmatch(token)
        key_id, secret = found.groups() if found else ("", "")
        entry = self._entries.get(key_id)
        # An unknown id is hashed and compared too, so that it takes as long as a known one.
        salt, expected = (entry.salt, entry.hash) if entry else (_NO_SALT, _NO_SALT * 2)
        matches = hmac.compare_digest(_hash(salt, secret), expected)
        return entry.caller if entry is not None and matches else None

    @property
    def is_expired(self) -> bool:
        """Whether the last keys have expired, so that no key is accepted."""
        return self._clock() >= self._expire_s

    def problem(self) -> str:
        """Return why the keys file is unusable at the moment; empty if it is usable."""
        self._reload_if_changed()
        return self._problem

    def _reload_if_changed(self) -> None:
        """Reload the file if it has changed; retry an unusable file until it can be read."""
        now_s = self._clock()
        if now_s - self._checked_s < CHECK_EVERY_S:
            return
        self._checked_s = now_s
        stamp = _stamp(self._path)
        # A file may become readable without a change of its time, for example by `chmod`.
        if stamp == self._stamp and not self._problem:
            return
        self._stamp = stamp
        try:
            self._entries = _entries(self._path)
        except ConfigError as error:
            self._set_problem(str(error), now_s)
        else:
            self._set_problem("", now_s)

    def _set_problem(self, problem: str, now_s: float) -> None:
        """Record the state of the file, empty `problem` if it is usable, and log any change."""
        if problem and not self._problem:
            self._expire_s = now_s + TRUSTED_S
            logger.error(
                "the keys file cannot be used; the previous keys stay valid for %.0f s: %s",
                TRUSTED_S,
                problem,
            )
        elif problem and self.is_expired and not self._is_expiry_logged:  # checked every second
            self._is_expiry_logged = True
            logger.error("no key is accepted until the keys file can be used: %s", problem)
        elif self._problem and not problem:
            self._expire_s, self._is_expiry_logged = math.inf, False
            logger.warning("the keys file can be used again")
        self._problem = problem


def _entries(path: Path) -> dict[str, KeyEntry]:
    return {entry.id: entry for entry in load_config(KeyFile, path).keys}


def _stamp(path: Path) -> tuple[int, int]:
    """Return values that change whenever the file does; zeros if there is no file."""
    # The inode tells when `_save` has replaced the file, even within the resolution of the time.
    try:
        status = path.stat()
    except OSError:
        return 0, 0
    return status.st_mtime_ns, status.st_ino


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Let no other command change the file during a block.

    Raises:
        ConfigError: the folder of the file does not exist or cannot be written.
    """
    # A lock of its own, because `_save` replaces the file, and with it any lock on it.
    try:
        lock = FileLock(path.with_name(f".{path.name}.lock"))
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error
    with lock:
        lock.acquire(timeout_s=None)
        yield


def _save(path: Path, content: KeyFile) -> None:
    """Replace the file in one step; only its owner can read it."""
    # A running server may read the file at any time, so it must never see half of it.
    # The name can be fixed, because only one process at a time holds the lock of `_locked`.
    temporary = path.with_name(f".{path.name}.new")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(dump_config(content))
        temporary.replace(path)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error


def _hash(salt: str, secret: str) -> str:
    return hmac.new(bytes.fromhex(salt), secret.encode(), hashlib.sha256).hexdigest()


def _checked_name(kind: str, name: str) -> str:
    try:
        return check_name(kind, name)
    except ConfigError as error:
        raise ValueError(str(error)) from error
