"""`MilvusConnection`: calls Milvus, retries, and raises the errors of `reir.errors`."""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc  # type: ignore[import-untyped]
from pymilvus import MilvusClient
from pymilvus.exceptions import MilvusException

from reir.errors import FREE_SPACE, GalleryNotFound, StoreError, StoreFull, StoreUnavailable
from reir.store.embedded.damage_errors import parse_damage_report
from reir.store.embedded.lite_server import LiteServer

CALL_TIMEOUT_S = 60.0
CONNECT_TIMEOUT_S = 10.0
BACK_OFFS_S = (0.05, 0.2, 0.5, 1.0, 2.0)
"""Waits between attempts while Milvus cannot be reached; then `StoreUnavailable` is raised."""

SHORT_BACK_OFFS_S = (0.05, 0.2)
"""The same for a service, whose clients are waiting and are told when to retry."""

EF_SEARCH, EF_FILTERED = 256, 1024
"""`ef` of HNSW searches without and with a filter. Recall@10 of text queries on 100,000 instances
(`benchmarks/vector_search_server.py`): without a filter, 0.92 at ef 16, 0.99 at 64 and 1.0 at 256.
With filters that keep half of the instances, 0.86, 0.97 and 0.996; at 1024 it is 1.0, and a search
takes 3 ms longer."""

# Error codes of Milvus and of pymilvus.
_CONNECT_FAILED = 2
_NOT_FOUND = 100
_ALIAS_NOT_FOUND = 1600
_NOT_LOADED = 101
_NO_RETRY = {"timeout": None, "retry_times": 0}
"""Arguments that turn off the retries of pymilvus, which retries until a timeout if it has one."""

_UNREACHABLE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
_DENIED = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)

logger = logging.getLogger(__name__)
# pymilvus logs every failure with a traceback. Callers get it as an error of `reir.errors` anyway.
logging.getLogger("pymilvus").setLevel(logging.CRITICAL)


@dataclass(frozen=True)
class Capabilities:
    """What differs between Milvus Lite and a server.

    Attributes:
        index_type: of the instance vectors.
        index_params: of that index.
        paging: query arguments with which a limited query returns the first rows by key. Lite
            sorts by key only for iterators. A server always does, but for iterators it does not
            wait for the latest writes.
    """

    index_type: str
    index_params: Mapping[str, int] = field(default_factory=dict)
    paging: Mapping[str, Any] = field(default_factory=lambda: {"reduce_stop_for_best": True})

    def search_params(self, limit: int, *, filtered: bool) -> dict[str, Any]:
        """Parameters for a search of `limit` rows."""
        breadth = EF_FILTERED if filtered else EF_SEARCH
        # A server refuses an `ef` below the number of rows that it is asked for.
        return {"metric_type": "IP", "params": {"ef": max(breadth, limit)}}


# Searches of an embedded store read journals and never this index, so the cheapest one is enough.
LITE = Capabilities(index_type="FLAT", paging={"iterator": "True"})
SERVER = Capabilities(index_type="HNSW", index_params={"M": 16, "efConstruction": 200})


class MilvusConnection:
    """Calls `MilvusClient` methods; reconnects, and starts an embedded server again if it died."""

    def __init__(
        self,
        backend: LiteServer | str,
        token: str = "",
        back_offs_s: Sequence[float] = BACK_OFFS_S,
    ) -> None:
        """Prepare a connection, which the first call makes.

        Args:
            backend: the server of an embedded store, or the URI of a Milvus server.
            token: for a Milvus server with access control.
            back_offs_s: waits between attempts.
        """
        self._back_offs_s = back_offs_s
        self._backend = backend
        self._token = token
        self._client: MilvusClient | None = None
        self._mutex = threading.Lock()
        self.capabilities = LITE if isinstance(backend, LiteServer) else SERVER

    @property
    def address(self) -> str:
        """Location of the store, for messages."""
        return self._backend if isinstance(self._backend, str) else str(self._backend.place)

    def call(self, method: str, **arguments: Any) -> Any:
        """Call a method of `MilvusClient`.

        Raises:
            GalleryNotFound: there is no such collection or alias.
            StoreUnavailable: Milvus cannot be reached, after all retries.
            StoreError: Milvus refused the call.
        """
        # None stands for the last attempt, after which there is no wait.
        return self._call(method, arguments, (*self._back_offs_s, None))

    def call_once(self, method: str, **arguments: Any) -> Any:
        """Like `call`, but without retries, for calls that must not be executed twice."""
        return self._call(method, {**arguments, **_NO_RETRY}, (None,))

    def close(self) -> None:
        """Close the connection, and stop using the server of an embedded store."""
        self._disconnect(self._client)
        if isinstance(self._backend, LiteServer):
            self._backend.close()

    def _call(
        self, method: str, arguments: dict[str, Any], back_offs_s: Sequence[float | None]
    ) -> Any:
        for back_off_s in back_offs_s:
            # Reset, so that if connecting fails, the client of the attempt before does not count.
            client = None
            try:
                client = self._connected()
                return self._call_once(client, method, arguments)
            except (MilvusException, grpc.RpcError, grpc.FutureTimeoutError) as error:
                # Another thread may have found the client dead and closed it during our call.
                replaced = client is not self._client
                if not _is_unreachable(error) and not replaced:
                    raise self._refused(method, error) from error
                self._disconnect(client)
                if back_off_s is None:
                    raise StoreUnavailable(self.address, str(error)) from error
                logger.info("no answer from %s; retrying in %g s", self.address, back_off_s)
                time.sleep(back_off_s)
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _call_once(self, client: MilvusClient, method: str, arguments: dict[str, Any]) -> Any:
        # The given arguments come last, because `call_once` passes a timeout of its own.
        arguments = {"timeout": CALL_TIMEOUT_S, **arguments}
        try:
            return _bound(client, method)(**arguments)
        except MilvusException as error:
            if error.code != _NOT_LOADED or "collection_name" not in arguments:
                raise
        # A restarted embedded server has its collections on disk but not loaded.
        client.load_collection(arguments["collection_name"], timeout=CALL_TIMEOUT_S)
        return _bound(client, method)(**arguments)

    def _connected(self) -> MilvusClient:
        # Under the lock, so that threads that start at the same time share one client.
        with self._mutex:
            if self._client is None:
                uri = (
                    self._backend if isinstance(self._backend, str) else self._backend.address().uri
                )
                # Dedicated, because pymilvus keeps a shared connection open when a client is
                # closed, and would return it again although its server has died.
                self._client = MilvusClient(
                    uri, token=self._token, timeout=CONNECT_TIMEOUT_S, dedicated=True
                )
            return self._client

    def _disconnect(self, client: MilvusClient | None) -> None:
        """Close `client`, unless another thread has already replaced it by a new one."""
        with self._mutex:
            if client is self._client:
                self._client = None
                if client is not None:
                    client.close()

    def _refused(self, method: str, error: Exception) -> Exception:
        if getattr(error, "code", None) in (_NOT_FOUND, _ALIAS_NOT_FOUND):
            return GalleryNotFound(f"the store at {self.address} reports: {error}")
        damage = parse_damage_report(self.address, getattr(error, "message", str(error)))
        if damage is not None:
            return damage
        if _status(error) in _DENIED:
            hint = "set REIR_MILVUS_TOKEN to user:password or to an API key"
            return StoreError(f"the store at {self.address} denies access: {error}; {hint}")
        # The protocol has no code for a full disk, only the text of the system.
        if os.strerror(errno.ENOSPC) in str(error):
            return StoreFull(f"the store at {self.address} refused {method}: {error}; {FREE_SPACE}")
        return StoreError(f"the store at {self.address} refused {method}: {error}")


def _bound(client: MilvusClient, method: str) -> Callable[..., Any]:
    """Return a method of the client, or of its connection: only that has bulk inserts."""
    found: Callable[..., Any] = getattr(client, method, None) or getattr(
        client._get_connection(), method
    )
    return found


def _status(error: Exception) -> object:
    # The code is an attribute of Milvus' errors, and a method of gRPC's.
    code = getattr(error, "code", None)
    return code() if callable(code) else code


def _is_unreachable(error: Exception) -> bool:
    if isinstance(error, grpc.FutureTimeoutError):
        return True
    return _status(error) in (_CONNECT_FAILED, *_UNREACHABLE)
