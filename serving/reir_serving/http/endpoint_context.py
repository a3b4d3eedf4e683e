"""What an endpoint works with: the backend, the configuration, and the caller of the request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends
from starlette.requests import Request

from reir.errors import ConfigError
from reir.operations.search_log import SearchLog
from reir.store.names import check_name
from reir_serving.backend.photos import GalleryImage
from reir_serving.backend.service import Service
from reir_serving.config import ServeConfig
from reir_serving.http.pictures import PictureCache
from reir_serving.http.problems import (
    FORBIDDEN,
    ProblemError,
    gallery_not_found,
    image_not_found,
)
from reir_serving.middleware.access import Caller, is_visible
from reir_serving.middleware.keys import KeyRing
from reir_serving.middleware.logs import AUDIT, log_line
from reir_serving.middleware.metrics import Metrics
from reir_serving.middleware.rate_limits import RateLimit
from reir_serving.middleware.request_state import request_state


@dataclass(frozen=True)
class AppState:
    """What all requests share; `create_app` stores it in the application's state."""

    backend: Service
    config: ServeConfig
    metrics: Metrics
    pictures: PictureCache
    feedback_rate: RateLimit
    keys: KeyRing | None = None
    search_log: SearchLog | None = None


class EndpointContext:
    """One request at its endpoint: what all requests share, its caller and its id.

    Attributes:
        search_log: where searches are logged; None if this is off.
        feedback_rate: the limit of feedback from one key or address.
        caller: whoever sent the request.
        request_id: see `RequestState`.
    """

    def __init__(self, request: Request) -> None:
        app: AppState = request.app.state.app_state
        self.backend, self.config, self.metrics = app.backend, app.config, app.metrics
        self.pictures, self.keys, self.search_log = app.pictures, app.keys, app.search_log
        self.feedback_rate = app.feedback_rate
        state = request_state(request.scope)
        self.caller: Caller = state.caller
        self.request_id = state.request_id

    def readable(self, gallery: str) -> str:
        """Return the name of a gallery that the caller may search.

        Raises:
            ProblemError: the gallery does not exist, or the caller may not see it.
        """
        # The same answer in all cases, so that a caller cannot find out which galleries exist.
        try:
            check_name("gallery", gallery)
        except ConfigError as error:
            raise gallery_not_found(gallery) from error
        if not is_visible(gallery, self.caller, self.config.galleries):
            raise gallery_not_found(gallery)
        return gallery

    def writable(self, gallery: str) -> str:
        """Return the name of a gallery that the caller may change.

        Raises:
            ProblemError: the caller may not see the gallery, or may only search it.
        """
        if not self.caller.may_write(self.readable(gallery)):
            raise ProblemError(
                FORBIDDEN, f"this key may search gallery {gallery!a}, but not change it"
            )
        return gallery

    async def image(self, gallery: str, image_id: str) -> GalleryImage:
        """Return a photo that the caller may see.

        Raises:
            ProblemError: the gallery has no such photo, or the caller may not see it.
        """
        found = await self.backend.image(self.readable(gallery), image_id)
        if found is None or not self.caller.can_see(found.record):
            raise image_not_found(gallery, image_id)
        return found

    def note_write(self, action: str, gallery: str, values: Mapping[str, object]) -> None:
        """Count a write, and write a line to the audit log."""
        self.metrics.note_write(action)
        log_line(
            AUDIT,
            action=action,
            gallery=gallery,
            key=self.caller.key_id,
            tenant=self.caller.tenant,
            request_id=self.request_id,
            **values,
        )


async def _context(request: Request) -> EndpointContext:
    # `async` although it awaits nothing, because FastAPI calls other functions in a thread, which
    # costs a hand-over for each request.
    return EndpointContext(request)


Context = Annotated[EndpointContext, Depends(_context)]
"""Type of the parameter by which an endpoint gets its context."""
