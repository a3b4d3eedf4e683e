"""A gallery open for searching: the query path with all of its stages in this process.

Knows the store's contract and the encoder's interface; no model, no Ray and no command line.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar, Unpack

from reir.encoders import (
    TRAINED_KIND,
    EncoderSpec,
    checkpoint_folder,
    load_encoder_spec,
    stored_spec,
)
from reir.errors import (
    CheckpointError,
    GalleryNotFound,
    QueryError,
    SchemaMismatch,
    nearest_name,
)
from reir.images.decode import read_bytes
from reir.models.interfaces import InstanceEncoder, Segmenter, Zoomer
from reir.models.query_zoom.policy import ZoomPolicy
from reir.models.query_zoom.zoomer import load_zoomer_spec, zoomer_of
from reir.models.reranker import Reranker
from reir.models.segmenters import load_segmenter_spec
from reir.query.answer import answer, run_now
from reir.query.every_photo import (
    EveryPhoto,
    EveryPhotoOptions,
    EveryPhotoQuery,
    begin_scan,
    parts_now,
)
from reir.query.local_stages import LocalStages
from reir.query.localize import PixelLocalizer
from reir.query.photo_query import locate, vector_of
from reir.query.presence import Calibration, load_calibration
from reir.query.request import MAX_K, Query, SearchOptions, Term, query_of
from reir.query.rerank import PhotoReranker
from reir.query.retrieval import Retriever
from reir.query.verify.photos import PixelVerifier
from reir.query.zoom.photos import PhotoZoomer
from reir.records import Box, FloatArray
from reir.results import GalleryInfo, Localization, SearchResult
from reir.store.contract import InstanceStore
from reir.text import validate_expression

T = TypeVar("T")

MAX_RELOADS = 3
"""So often a search loads another model, if a version of another model becomes live meanwhile."""


def open_gallery(  # noqa: PLR0913 - all but the name are keyword-only
    name: str,
    *,
    store: InstanceStore | str | None = None,
    encoder: InstanceEncoder | str | None = None,
    checkpoint: Path | None = None,
    segmenter: Segmenter | str | None = None,
    zoomer: Zoomer | str | None = None,
    version: str = "",
) -> Gallery:
    """Open a gallery for searching.

    Args:
        name: gallery.
        store: an open store, which the caller closes; or a location in the form that
            `reir.store.open_store` accepts; None means the default location.
        encoder: an encoder, or its name in the form that `reir.encoders` accepts.
        checkpoint: checkpoint directory, instead of an encoder. If neither is given, the encoder
            that the version was indexed with is loaded, and another one as soon as a version of
            another encoder becomes live.
        segmenter: gives hits their masks when they are localized; a segmenter, or its name in the
            form that `reir.models.segmenters` accepts; None for that of the checkpoint.
        zoomer: searches the first photos of an answer on request; a zoomer, or the name of a
            localizer in the form that `reir.models.localizers` accepts, which looks once if it
            cannot zoom in; None for the encoder itself.
        version: the version to search, whichever is live; empty for the live one.

    Raises:
        GalleryNotFound: no such gallery or version, or none of its versions is live.
        SchemaMismatch: the version was built with another checkpoint.
        ConfigError: the name of the encoder, segmenter or zoomer is not known, or a package that
            it needs is missing.
        CheckpointError: the checkpoint does not load.
        StoreUnavailable: the store cannot be reached.
    """
    with ExitStack() as owned:
        if store is None or isinstance(store, str):
            from reir.store import open_store

            store = open_store(store)
            owned.callback(store.close)  # unlike a store of the caller, also if an error follows
        check_gallery(store, name)  # before the checkpoint, which takes seconds to load
        if encoder is None and checkpoint is not None:
            encoder = str(EncoderSpec(TRAINED_KIND, str(checkpoint.absolute())))
        model = _own_model(store, name, version) if encoder is None else chosen_model(encoder)
        if isinstance(segmenter, str):
            segmenter = load_segmenter_spec(segmenter)
        if isinstance(zoomer, str):
            zoomer = load_zoomer_spec(zoomer)
        gallery = Gallery(name, store, *model, version=version, segmenter=segmenter, zoomer=zoomer)
        if encoder is None and not version:
            gallery.own_model = partial(_own_model, store, name)
        gallery.owned = owned.pop_all()  # from here on, the gallery closes the store
        return gallery


def list_galleries(store: InstanceStore | str | None = None) -> list[GalleryInfo]:
    """Return the galleries of a store, ordered by name.

    Args:
        store: an open store, or a location in the form that `reir.store.open_store` accepts; None
            means the default location.

    Raises:
        StoreUnavailable: the store cannot be reached.
    """
    if store is None or isinstance(store, str):
        from reir.store import open_store

        with closing(open_store(store)) as opened:
            return list_galleries(opened)
    found = []
    for name in store.galleries():
        versions = tuple(store.versions(name))
        live = next((each.name for each in versions if each.live), "")
        found.append(GalleryInfo(name=name, live=live, versions=versions, searchable=bool(live)))
    return found


@dataclass(frozen=True)
class CheckpointExtras:
    """The optional parts of a checkpoint."""

    reranker: Reranker | None = None
    calibration: Calibration | None = None
    segmenter: Segmenter | None = None
    zoom_policy: ZoomPolicy | None = None
    verifier: PixelVerifier | None = None

    def localizer(
        self, encoder: InstanceEncoder, segmenter: Segmenter | None = None
    ) -> PixelLocalizer:
        """Return the localizer; `segmenter` takes the place of that of the checkpoint."""
        return PixelLocalizer(encoder, self.calibration, segmenter or self.segmenter, self.verifier)


Model = tuple[InstanceEncoder, CheckpointExtras]


def load_extras(folder: Path, encoder: InstanceEncoder) -> CheckpointExtras:
    """Load the optional parts of a checkpoint directory, as far as it has them.

    None is loaded if the weights in the directory are not those of the encoder, because each part
    was made for certain weights.

    Raises:
        CheckpointError: a file is damaged, or a part was trained on other weights.
    """
    from reir.checkpoint import (
        COLOR_HEAD,
        load_color_reader,
        load_reranker,
        load_segmenter,
        load_zoom_policy,
        read_config,
    )

    digest = encoder.digest
    # The gallery keeps the path of its checkpoint, where other weights may have been saved since.
    if read_config(folder).get("digest") != digest:
        return CheckpointExtras()
    load_reader = partial(load_color_reader, folder, encoder)
    return CheckpointExtras(
        load_reranker(folder, digest),
        load_calibration(folder, digest),
        load_segmenter(folder),
        load_zoom_policy(folder, digest),
        PixelVerifier(load_reader) if COLOR_HEAD.is_in(folder) else None,
    )


class Gallery(AbstractContextManager["Gallery"]):
    """A gallery open for searching; use it as a context manager, or call `close`.

    Every search asks the store for the live version, so a promotion takes effect with the next
    search. If another model indexed the new version, that search loads the model first.

    Attributes:
        name: name of the gallery.
        stages: the stages of a query.
        owned: resources that `close` releases, such as a store that was opened for this gallery.
        own_model: loads the model that the live version was indexed with; None to keep `encoder`.
    """

    def __init__(  # noqa: PLR0913 - options are keyword-only
        self,
        name: str,
        store: InstanceStore,
        encoder: InstanceEncoder,
        extras: CheckpointExtras | None = None,
        *,
        version: str = "",
        segmenter: Segmenter | None = None,
        zoomer: Zoomer | None = None,
    ) -> None:
        """Open gallery `name` of a store, to be searched with the vectors of `encoder`.

        Without `extras`, there is no re-ranking and no presence. Without `version`, every search
        uses the version that is live then. Without `segmenter`, masks come from that of `extras`;
        without `zoomer`, `encoder` itself looks at the parts of a photo.

        Raises:
            GalleryNotFound: no such gallery, or none of its versions is live.
            SchemaMismatch: the live version was built with another checkpoint.
        """
        self.name = name
        self.owned = ExitStack()
        self.own_model: Callable[[], Model] | None = None
        self._store, self._version = store, version
        self._segmenter, self._zoomer = segmenter, zoomer
        self._use(encoder, extras or CheckpointExtras())

    def _use(self, encoder: InstanceEncoder, extras: CheckpointExtras) -> None:
        """Search with a model.

        Raises:
            GalleryNotFound: no such gallery, or none of its versions is live.
            SchemaMismatch: the version to search was built with another checkpoint.
        """
        name, store = self.name, self._store
        retriever = Retriever(store, name, encoder.digest, encoder.dim, self._version)
        retriever.refresh()  # raises before anything has changed
        self._retriever = retriever
        self._encoder, self._extras = encoder, extras
        reranker = extras.reranker
        self._localizer = extras.localizer(encoder, self._segmenter)
        self.stages = LocalStages(
            encoder=encoder,
            retriever=self._retriever,
            reranker=None if reranker is None else PhotoReranker(store, name, reranker),
            verifier=extras.verifier,
            localizer=self._localizer,
            zoomer=PhotoZoomer(self._zoomer or zoomer_of(encoder, extras.zoom_policy)),
            calibration=extras.calibration,
        )

    def with_version(self, version: str) -> Gallery:
        """Return the same gallery and model, to search another version of the same checkpoint.

        It uses the store of this gallery, which therefore must stay open.

        Raises:
            GalleryNotFound: there is no such version.
            SchemaMismatch: the version was built with another checkpoint.
        """
        return Gallery(
            *(self.name, self._store, self._encoder, self._extras),
            version=version,
            segmenter=self._segmenter,
            zoomer=self._zoomer,
        )

    def encode_expressions(self, expressions: Sequence[str]) -> FloatArray:
        """Return the (len(expressions), D) vectors of expressions, normalized as in a search."""
        return self._encoder.encode_expressions([*map(validate_expression, expressions)])

    @property
    def version(self) -> str:
        """Name of the version that the last search or `refresh` used."""
        return self._retriever.live

    def refresh(self) -> str:
        """Switch to the version that is live now and return its name; every search does this.

        Raises:
            GalleryNotFound: the gallery is gone.
            SchemaMismatch: the version was built with another checkpoint.
        """
        return self._with_live_model(lambda: self._retriever.refresh())

    def search(self, expression: str, **options: Unpack[SearchOptions]) -> SearchResult:
        """Find the instances that an expression describes.

        Args:
            expression: describes one instance.
            options: `k`, `per_image`, `where`, `rerank` and the others of `SearchOptions`.

        Returns:
            The hits, ordered by score; hits with equal scores by image id and instance number.

        Raises:
            QueryError: an argument is out of range; `field` names it.
            GalleryNotFound: the gallery is gone.
            SchemaMismatch: the version that is live now was built with another checkpoint.
        """
        return self.search_batch([expression], **options)[0]

    def search_batch(
        self, expressions: Sequence[str], **options: Unpack[SearchOptions]
    ) -> list[SearchResult]:
        """Answer up to 1000 expressions with one pass of the text model and one call of the store.

        Arguments and errors are those of `search`. The timings of each result are those of the
        whole batch.
        """
        if isinstance(expressions, str):  # a sequence too, whose characters would be searched for
            raise QueryError("expressions", f"must be a list, got the text {expressions!r}")
        if len(expressions) > MAX_K:
            raise QueryError(
                "expressions", f"holds {len(expressions)}, at most {MAX_K} are allowed; split them"
            )
        return self.ask([query_of([Term(expression=each)], options) for each in expressions])

    def similar(
        self,
        like: str | bytes | Path,
        *,
        box: Box | None = None,
        expression: str | None = None,
        **options: Unpack[SearchOptions],
    ) -> SearchResult:
        """Find instances like another one.

        Args:
            like: id of an instance of the gallery; or a photo, as bytes or as the path of its file.
            box: box of the instance in the photo, xyxy in [0, 1]; None stands for the whole photo.
            expression: an expression that the instances should fit as well.
            options: see `SearchOptions`.

        Raises:
            QueryError: an argument is out of range; `field` names it.
            ImageError: the photo cannot be decoded.
        """
        # Text is always an id, and a file is always a `Path`: either could look like the other.
        if isinstance(like, str):
            if box is not None:
                raise QueryError("box", "belongs to a photo; an instance has its own box")
            term = Term(instance_id=like)
            return self._ask_similar(lambda: term, expression, options)
        data = like if isinstance(like, bytes) else read_bytes(like)
        return self._ask_similar(
            lambda: Term(vector=vector_of(self._encoder, data, box)), expression, options
        )

    def _ask_similar(
        self, term: Callable[[], Term], expression: str | None, options: SearchOptions
    ) -> SearchResult:
        described = [] if expression is None else [Term(expression=expression)]

        def ask() -> SearchResult:
            # The vector of a photo belongs to one model, so it is made again with another one.
            query = query_of([term(), *described], options)
            return run_now(answer([query], self.stages))[0]

        return self._with_live_model(ask)

    def localize(
        self, photo: bytes | Path, expression: str, k: int = 5, *, masks: bool = False
    ) -> Localization:
        """Find the instances of one photo, of the gallery or not, that an expression describes.

        Args:
            photo: bytes or path of an image file.
            expression: describes one instance.
            k: maximum number of boxes.
            masks: return masks too, if the checkpoint has a mask branch.

        Raises:
            ImageError: the photo cannot be decoded.
            QueryError: the expression is empty or too long.
        """
        data = photo if isinstance(photo, bytes) else read_bytes(photo)
        return locate(self._localizer, data, expression, k, masks=masks)

    def every_photo(self, expression: str, **options: Unpack[EveryPhotoOptions]) -> EveryPhoto:
        """Find every photo that has the instance that an expression describes, not the k best.

        Args:
            expression: describes one instance.
            options: `where`, `verify`, and at most one of `min_presence`, `precision` and `recall`;
                see `EveryPhotoQuery`.

        Returns:
            The photos, which are read while they are iterated over; the threshold that decides; and
            the precision and recall to expect.

        Raises:
            QueryError: an argument is out of range, the checkpoint has no calibration, or no
                threshold reaches the precision; `field` names the argument.
            GalleryNotFound: the gallery is gone.
            SchemaMismatch: the version that is live now was built with another checkpoint.
        """
        query = EveryPhotoQuery(expression=expression, **options)
        scan = self._with_live_model(lambda: run_now(begin_scan(query, self.stages)))
        return EveryPhoto(
            expression=expression,
            gallery=self.name,
            version=scan.first.version,
            num_photos=scan.first.num_indexed,
            decision=scan.decision,
            parts=parts_now(scan, run_now),
        )

    def ask(self, queries: Sequence[Query]) -> list[SearchResult]:
        """Answer queries, in the order given.

        Raises:
            QueryError: a part of a query is wrong; `field` names it.
            GalleryNotFound: the gallery is gone.
            SchemaMismatch: the version that has become live was built with another checkpoint.
        """
        # Without an event loop, so that searches also work where one runs already (notebooks).
        return self._with_live_model(lambda: run_now(answer(queries, self.stages)))

    def _with_live_model(self, work: Callable[[], T]) -> T:
        """Do `work`, again with another model if a version of that model has become live."""
        for _ in range(MAX_RELOADS):
            try:
                return work()
            except SchemaMismatch:
                if self.own_model is None:
                    raise
            # Loading takes seconds, in which yet another version may become live.
            with suppress(SchemaMismatch):
                self._use(*self.own_model())
        return work()

    def __repr__(self) -> str:
        return f"Gallery({self.name!r}, version {self.version!r})"

    def close(self) -> None:
        """Close the store, if this gallery opened it."""
        self.owned.close()

    def __exit__(self, *_: object) -> None:
        """Close the gallery."""
        self.close()


def check_gallery(store: InstanceStore, name: str) -> None:
    """Check that a store has a gallery.

    Raises:
        GalleryNotFound: it has no gallery of that name; the message lists those that it has.
    """
    known = store.galleries()
    if name not in known:
        more = f" and {len(known) - 10} more" if len(known) > 10 else ""
        have = f"this store has {', '.join(known[:10])}{more}" if known else "this store has none"
        advice = nearest_name(name, known) or f"; `reir index SOURCE --gallery {name}` creates it"
        raise GalleryNotFound(f"no gallery '{name}': {have}{advice}")


def chosen_model(encoder: InstanceEncoder | str) -> Model:
    """Return an encoder and, if it is given by its name, the optional parts of its checkpoint.

    Raises:
        ConfigError: the name is not known, or a package that the encoder needs is missing.
        CheckpointError: the checkpoint does not load.
    """
    if not isinstance(encoder, str):
        return encoder, CheckpointExtras()
    return _with_extras(load_encoder_spec(encoder), encoder)


def _own_model(store: InstanceStore, gallery: str, version: str = "") -> Model:
    """Load the model that a version was indexed with, by default the live one."""
    if not version:
        # For its error: without a live version, `stored_spec` names the shipped checkpoint.
        store.live_version(gallery)
    spec = stored_spec(store, gallery, version)
    try:
        return _with_extras(load_encoder_spec(spec), spec)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}; gallery '{gallery}' was indexed with {spec or 'the shipped checkpoint'}. "
            f"If it has moved, name its new place with --encoder (encoder= in Python)"
        ) from error


def _with_extras(encoder: InstanceEncoder, spec: str) -> Model:
    folder = checkpoint_folder(spec)
    extras = CheckpointExtras() if folder is None else load_extras(folder, encoder)
    return encoder, extras
