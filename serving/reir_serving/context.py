"""What an endpoint has at hand: the backend, the limits, and who asks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends
from starlette.requests import Request

from reir.errors import ConfigError
from reir.store.names import check_name
from reir_serving.access import Caller, served
from reir_serving.backend import Backend, GalleryImage
from reir_serving.config import ServeConfig
from reir_serving.keys import KeyRing
from reir_serving.logs import AUDIT, log_line
from reir_serving.metrics import Metrics
from reir_serving.notes import Notes, notes_of
from reir_serving.pictures import PictureCache
from reir_serving.problems import FORBIDDEN, Refused, no_gallery, no_image


@dataclass(frozen=True)
class Site:
    """What all requests share; `create_app` keeps it in the application's state."""

    backend: Backend
    config: ServeConfig
    metrics: Metrics
    pictures: PictureCache
    keys: KeyRing | None = None


@dataclass(frozen=True, slots=True)
class Context:
    """One request: the site, and its notes."""

    site: Site
    notes: Notes

    @property
    def backend(self) -> Backend:
        """Galleries and models."""
        return self.site.backend

    @property
    def caller(self) -> Caller:
        """Who asks."""
        return self.notes.caller

    def readable(self, gallery: str) -> str:
        """Return the name of a gallery that the caller may search.

        Raises:
            Refused: there is none, as far as the caller may know.
        """
        try:
            check_name("gallery", gallery)
        except ConfigError as error:
            raise no_gallery(gallery) from error
        if not served(gallery, self.caller, self.site.config.galleries):
            raise no_gallery(gallery)
        return gallery

    def writable(self, gallery: str) -> str:
        """Return the name of a gallery that the caller may change.

        Raises:
            Refused: the caller may not see it, or only read.
        """
        if not self.caller.may_write(self.readable(gallery)):
            raise Refused(FORBIDDEN, f"this key may search gallery {gallery!a} but not change it")
        return gallery

    async def image(self, gallery: str, image_id: str) -> GalleryImage:
        """Return a photo that the caller may see.

        Raises:
            Refused: the gallery has none under that id, as far as the caller may know.
        """
        found = await self.backend.image(self.readable(gallery), image_id)
        if found is None or not self.caller.sees(found.record):
            raise no_image(gallery, image_id)
        return found

    def note_write(self, action: str, gallery: str, values: Mapping[str, object]) -> None:
        """Count a write and put a line into the audit log."""
        self.site.metrics.note_write(action)
        log_line(
            AUDIT,
            action=action,
            gallery=gallery,
            key=self.caller.key_id,
            tenant=self.caller.tenant,
            request_id=self.notes.request_id,
            **values,
        )


def context_of(request: Request) -> Context:
    """Return the context of a request."""
    return Context(request.app.state.site, notes_of(request.scope))


async def _context(request: Request) -> Context:  # FastAPI calls what is not async in a thread
    return context_of(request)


Asked = Annotated[Context, Depends(_context)]
"""How an endpoint takes its context."""
