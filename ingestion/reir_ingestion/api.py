"""`reir.index`: indexing as a function of the Python API."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from reir.encoders import TRAINED_KIND, EncoderSpec, load_encoder_spec, stored_spec
from reir.errors import ConfigError
from reir.index_report import IndexProgress, IndexReport
from reir.models.interfaces import InstanceEncoder
from reir.store import InstanceStore, open_store
from reir_ingestion import pipeline
from reir_ingestion.command_runner import choose_views
from reir_ingestion.known_sources import known_source
from reir_ingestion.progress_bar import progress_bar
from reir_ingestion.sources import SourceOptions, open_source
from reir_ingestion.stages import IndexOptions


def index(  # noqa: PLR0913 - see `reir.index`
    source: str | Path,
    *,
    gallery: str,
    store: InstanceStore | str | None,
    encoder: InstanceEncoder | str | None,
    checkpoint: Path | None,
    progress: Callable[[IndexProgress], None] | bool,
    batch_size: int,
    prune: bool,
    retry_failed: bool,
) -> IndexReport:
    """Index a source into a gallery, in this process; see `reir.index`."""
    if encoder is not None and checkpoint is not None:
        raise ConfigError("encoder and checkpoint name two models; give one of them")
    found = open_source(source)  # a wrong name is reported before the model is loaded
    if checkpoint is not None:
        # The gallery stores this path, and later searches may run in another folder.
        encoder = str(EncoderSpec(TRAINED_KIND, str(checkpoint.absolute())))
    with ExitStack() as stack:
        if store is None or isinstance(store, str):
            store = open_store(store)
            stack.callback(store.close)
        spec = ""  # an encoder that is given as an object has no name to store with the gallery
        if encoder is None or isinstance(encoder, str):
            spec = encoder or stored_spec(store, gallery)
            encoder = load_encoder_spec(spec)
        show: Callable[[IndexProgress], None] | None = None
        if progress is True:
            show = stack.enter_context(progress_bar())
        elif progress is not False:
            show = progress
        options = IndexOptions(
            batch_size=batch_size,
            prune=prune,
            retry_failed=retry_failed,
            views=choose_views(store, gallery, None),
            encoder_spec=spec,
            origin=known_source(source, SourceOptions()),
        )
        return pipeline.index(found, gallery, store, encoder, options=options, progress=show)
