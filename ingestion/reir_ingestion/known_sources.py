"""The sources that a gallery was indexed from, kept in its store to index them again."""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import asdict, dataclass, field, replace

from reir.errors import SourceError
from reir.images.photo_files import BUCKET_SCHEMES
from reir.store.contract import InstanceStore
from reir_ingestion.sources import Source, SourceOptions, open_source

KIND = "source"
"""Kind of the documents; there is one for each source of each gallery."""


@dataclass(frozen=True, kw_only=True)
class KnownSource:
    """A source, as it was named in `reir index`.

    Attributes:
        text: the source; local paths are absolute, and secrets in the address of a bucket are left
            out.
        options: what it may access.
        has_secrets: whether secrets were left out, so that the source cannot be opened again by
            its text alone.
        indexed_s: Unix time at which a run over it last ended; 0 before that.
    """

    text: str
    options: SourceOptions = field(default_factory=SourceOptions)
    has_secrets: bool = False
    indexed_s: float = 0.0

    def open(self) -> Source:
        """Open the source.

        Raises:
            SourceError: it does not exist, contains no images, or needs secrets that are not kept.
        """
        if self.has_secrets:
            raise SourceError(
                f"source {self.text!a} was indexed with credentials or options in its address, "
                f"which are not kept; name it again with --source"
            )
        return open_source(self.text, self.options)


def known_source(text: str | os.PathLike[str], options: SourceOptions) -> KnownSource:
    """Return a source in the form in which it is kept."""
    text = os.fspath(text)
    if text.startswith(BUCKET_SCHEMES):
        from reir.object_storage import without_secrets

        public = without_secrets(text)
        return KnownSource(text=public, options=options, has_secrets=public != text)
    is_path = "://" not in text
    absolute = os.path.abspath(os.path.expanduser(text)) if is_path else text
    return KnownSource(text=absolute, options=options)


def remember_source(store: InstanceStore, gallery: str, source: KnownSource) -> None:
    """Record that a gallery has just been indexed from a source."""
    store.put_document(KIND, _name(gallery, source), asdict(replace(source, indexed_s=time.time())))


def known_sources(store: InstanceStore, gallery: str) -> list[KnownSource]:
    """Return the sources that a gallery was indexed from, ordered by their text."""
    found = []
    for values in store.find_documents(KIND, f"{gallery}/").values():
        options = SourceOptions(**values.pop("options"))
        found.append(KnownSource(options=options, **values))
    return sorted(found, key=lambda each: each.text)


def forget_source(store: InstanceStore, gallery: str, source: KnownSource) -> None:
    """Forget a source; the photos that were indexed from it stay in the gallery."""
    store.delete_documents(KIND, [_name(gallery, source)])


def _name(gallery: str, source: KnownSource) -> str:
    # The same source with other options is the same source: the last options count.
    # A path may have bytes that are not UTF-8; JSON documents hold them as escaped surrogates.
    text = source.text.encode("utf-8", "surrogateescape")
    return f"{gallery}/{hashlib.sha256(text).hexdigest()[:16]}"
