"""Rejects requests over the limit before Ray Serve and uvicorn spend any work on them.

For each request, Ray Serve collects metadata and metrics, and starts a task that notices when the
client disconnects. That costs far more than a rejection, and so does uvicorn's call of the
application. Ray Serve loads this module because `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH` names
it. Serve's own proxies load it too; they have no admission control, so they reject nothing.

This module also checks that requests come from the proxy of the same server (`environment.SECRET`):
the proxy of another server on this machine may still send requests to a port that one of its own
replicas once used.
"""

from __future__ import annotations

import os
from typing import Any

import uvicorn.config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from reir_serving.middleware.admission import AdmissionControl, raw_bad_request
from reir_serving.ray.environment import SECRET
from reir_serving.ray.haproxy_settings import SECRET_HEADER

MISDIRECTED = b"HTTP/1.1 421 Misdirected Request\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
"""The answer to requests that do not come from this server's proxy."""

# uvicorn creates the protocol objects, so they find the admission control of their process here. It
# is empty in processes that reject nothing.
_admission_control: list[AdmissionControl] = []


def set_admission_control(admission: AdmissionControl) -> None:
    """Reject the requests of this process for which `admission` has no room."""
    _admission_control[:] = [admission]


def install() -> None:
    """Have Ray Serve's HTTP server use `EarlyRejectionProtocol`; Serve calls this at its start."""
    # Serve lets uvicorn choose its protocol class, which uvicorn looks up under "auto".
    uvicorn.config.HTTP_PROTOCOLS["auto"] = f"{__name__}:{EarlyRejectionProtocol.__name__}"


class EarlyRejectionProtocol(HttpToolsProtocol):
    """Rejects requests before uvicorn starts a task for them.

    Overrides a private method of uvicorn, because uvicorn has no hook between parsing a request and
    starting its task. A rejection takes 0.036 ms of CPU time here, and 0.066 ms as an ASGI
    middleware (two cores, `wrk` on 16 connections). When this class was introduced, it raised the
    throughput at four times the load that the server can answer from 0.76 to 0.84 of its peak
    (`benchmarks/overload.py`; docs/LOG.md, 2026-11-23). The target is 0.9, and runs
    reach 0.80 to 0.94, so there is nothing to give away.

    If a later version of uvicorn no longer calls the method, the tests of this module fail, and
    `AdmissionMiddleware` still rejects these requests.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        secret = os.environ.get(SECRET, "").encode()
        self._secret_headers = [(SECRET_HEADER.encode(), secret)] if secret else []
        # uvicorn adds `default_headers` to every answer, and rebuilds that list every second from
        # `encoded_headers`, so the secret has to be in both.
        for each in self._secret_headers:
            if each not in self.config.encoded_headers:
                self.config.encoded_headers.append(each)
                self.server_state.default_headers.append(each)

    def send_400_response(self, msg: str) -> None:
        """Answer a request that cannot be parsed with problem details, like all other errors."""
        self.transport.write(raw_bad_request(msg, self._secret_headers))
        self.transport.close()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        scope: Any = cycle.scope  # uvicorn has its own types for an ASGI scope
        if not all(each in scope["headers"] for each in self._secret_headers):
            cycle.keep_alive = False
            self._answer(cycle, MISDIRECTED)
            return
        for admission in _admission_control:
            if admission.is_full(scope):
                rejection = admission.raw_rejection(
                    scope, self._secret_headers, keep_alive=cycle.keep_alive
                )
                self._answer(cycle, rejection)
                return
        super()._start_asgi_task(cycle, app)

    def _answer(self, cycle: RequestResponseCycle, response: bytes) -> None:
        """Write a whole response without calling the application."""
        self.transport.write(response)
        # With the response complete, uvicorn reads the rest of the body and drops it.
        cycle.response_started = cycle.response_complete = True
        if not cycle.keep_alive:
            self.transport.close()
        cycle.on_response()
