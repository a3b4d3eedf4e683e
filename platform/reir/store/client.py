"""One Milvus connection: errors of ours, retries, and what differs between Lite and a server."""

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
from reir.store.damage import parse_damage
from reir.store.lite_server import LiteServer

CALL_TIMEOUT_S = 60.0
CONNECT_TIMEOUT_S = 10.0
BACK_OFFS_S = (0.05, 0.2, 0.5, 1.0, 2.0)
"""Waits between attempts while the connection fails; then `StoreUnavailable`."""

SHORT_BACK_OFFS_S = (0.05, 0.2)
"""For a service, which has somebody waiting and says when to try again."""

EF_SEARCH, EF_FILTERED = 256, 1024
"""Breadth of HNSW search without and with a filter. Recall@10 of text queries on 100,000 instances:
without a filter 0.92 at 16, 0.99 at 64, 1.0 at 256; with filters that keep half 0.86, 0.97 and
0.996, and at 1024 1.0 for 3 ms more (`benchmarks/p1_vector_search_server.py`)."""

_CONNECT_FAILED = 2
_NOT_FOUND = 100
_ALIAS_NOT_FOUND = 1600
_NOT_LOADED = 101
_NEVER_AGAIN = {"timeout": None, "retry_times": 0}
"""What keeps pymilvus from another attempt of its own: within a timeout it would try again."""

_UNREACHABLE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
_DENIED = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)

logger = logging.getLogger(__name__)
# Every failure reaches the caller as an error of ours; pymilvus logs each with its traceback too.
logging.getLogger("pymilvus").setLevel(logging.CRITICAL)


@dataclass(frozen=True)
class Capabilities:
    """What to ask of a backend.

    Attributes:
        index_type: of the instance vectors.
        index_params: of that index.
        paging: what makes a limited query return the first rows by key. Lite orders by key for
            iterators only; a server does so always, and for iterators does not wait for the
            latest writes.
    """

    index_type: str
    index_params: Mapping[str, int] = field(default_factory=dict)
    paging: Mapping[str, Any] = field(default_factory=lambda: {"reduce_stop_for_best": True})

    def search_params(self, limit: int, *, filtered: bool) -> dict[str, Any]:
        """Parameters for a search of `limit` rows."""
        breadth = EF_FILTERED if filtered else EF_SEARCH
        return {"metric_type": "IP", "params": {"ef": max(breadth, limit)}}


LITE = Capabilities(index_type="FLAT", paging={"iterator": "True"})
SERVER = Capabilities(index_type="HNSW", index_params={"M": 16, "efConstruction": 200})


class MilvusConnection:
    """Calls `MilvusClient` methods; reconnects, and restarts an embedded server that died."""

    def __init__(
        self,
        backend: LiteServer | str,
        token: str = "",
        back_offs_s: Sequence[float] = BACK_OFFS_S,
    ) -> None:
        """Prepare a connection; the first call makes it.

        Args:
            backend: an embedded server, or the URI of a real one.
            token: for a real server with access control.
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
        """Where the store is, for a person."""
        return self._backend if isinstance(self._backend, str) else str(self._backend.place)

    def call(self, method: str, **arguments: Any) -> Any:
        """Call a method of `MilvusClient`.

        Raises:
            GalleryNotFound: no such collection or alias.
            StoreUnavailable: not reachable, after all retries.
            StoreError: Milvus refused the call.
        """
        return self._call(method, arguments, (*self._back_offs_s, None))

    def call_once(self, method: str, **arguments: Any) -> Any:
        """As `call`, without a second attempt: for what must not happen twice."""
        return self._call(method, {**arguments, **_NEVER_AGAIN}, (None,))

    def close(self) -> None:
        """Close the connection, and the hold on an embedded server."""
        self._disconnect(self._client)
        if isinstance(self._backend, LiteServer):
            self._backend.close()

    def _call(
        self, method: str, arguments: dict[str, Any], back_offs_s: Sequence[float | None]
    ) -> Any:
        for back_off_s in back_offs_s:
            client = None
            try:
                client = self._connected()
                return self._call_once(client, method, arguments)
            except (MilvusException, grpc.RpcError, grpc.FutureTimeoutError) as error:
                replaced = client is not self._client  # another thread found it dead and closed it
                if not _is_unreachable(error) and not replaced:
                    raise self._refused(method, error) from error
                self._disconnect(client)
                if back_off_s is None:
                    raise StoreUnavailable(self.address, str(error)) from error
                logger.info("no answer from %s, again in %g s", self.address, back_off_s)
                time.sleep(back_off_s)
        raise AssertionError("the last attempt returns or raises")

    def _call_once(self, client: MilvusClient, method: str, arguments: dict[str, Any]) -> Any:
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
        with self._mutex:
            if self._client is None:
                uri = (
                    self._backend if isinstance(self._backend, str) else self._backend.address().uri
                )
                self._client = MilvusClient(
                    uri, token=self._token, timeout=CONNECT_TIMEOUT_S, dedicated=True
                )
            return self._client

    def _disconnect(self, client: MilvusClient | None) -> None:
        """Close `client` if it is the one in use; another thread may have made a new one."""
        with self._mutex:
            if client is self._client:
                self._client = None
                if client is not None:
                    client.close()

    def _refused(self, method: str, error: Exception) -> Exception:
        if getattr(error, "code", None) in (_NOT_FOUND, _ALIAS_NOT_FOUND):
            return GalleryNotFound(f"store at {self.address}: {error}")
        damage = parse_damage(self.address, getattr(error, "message", str(error)))
        if damage is not None:
            return damage
        if _status(error) in _DENIED:
            hint = "set REIR_MILVUS_TOKEN to user:password or to an API key"
            return StoreError(f"store at {self.address} refuses access: {error}; {hint}")
        if os.strerror(errno.ENOSPC) in str(error):
            return StoreFull(f"store at {self.address} refused {method}: {error}; {FREE_SPACE}")
        return StoreError(f"store at {self.address} refused {method}: {error}")


def _bound(client: MilvusClient, method: str) -> Callable[..., Any]:
    """The method; those about imports are only in what stands behind the client."""
    found: Callable[..., Any] = getattr(client, method, None) or getattr(
        client._get_connection(), method
    )
    return found


def _status(error: Exception) -> object:
    code = getattr(error, "code", None)
    return code() if callable(code) else code


def _is_unreachable(error: Exception) -> bool:
    if isinstance(error, grpc.FutureTimeoutError):
        return True
    return _status(error) in (_CONNECT_FAILED, *_UNREACHABLE)
