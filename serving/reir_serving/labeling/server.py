"""`run_label_page`: asks the user of this machine about the hits of sentences, in a browser."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from reir.config import reir_home
from reir.errors import DataError
from reir.operations.feedback import read_feedback
from reir.query.search import Gallery, open_gallery
from reir.store import InstanceStore, open_store
from reir.text import validate_expression
from reir_serving.backend.models import ModelCache
from reir_serving.backend.service import Service
from reir_serving.backend.workers import SearchWorkers
from reir_serving.config import ServeConfig
from reir_serving.http.app import create_app
from reir_serving.labeling.questions import NUM_HITS, Questions
from reir_serving.labeling.routes import PAGE, label_router

HOST = "127.0.0.1"


def read_sentences(path: Path) -> list[str]:
    """Read sentences, one in each line, without empty lines and repetitions.

    Raises:
        DataError: the file cannot be read, or has no sentences.
        QueryError: a sentence is too long.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the sentences in {path}: {error}") from error
    found = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not found:
        raise DataError(f"{path} has no sentences; write one in each line")
    for sentence in found:
        validate_expression(sentence)
    return found


def run_label_page(  # noqa: PLR0913 - all but the first two are keyword-only
    gallery: str,
    sentences: Sequence[str],
    *,
    store: str | None,
    folder: Path,
    port: int = 0,
    on_ready: Callable[[str], None] = lambda _: None,
) -> int:
    """Serve the page on this machine until Ctrl-C; return how many questions were answered.

    Answers are recorded as feedback. Sentences whose answer is known from earlier feedback are not
    asked about again.

    Args:
        gallery: gallery to search.
        sentences: what to ask about.
        store: location of the store, as `reir.store.open_store` takes it.
        folder: folder of the search log, which is created if it is missing.
        port: port of the page; 0 picks a free one.
        on_ready: called with the address once the page can be opened.

    Raises:
        GalleryNotFound: there is no such gallery, or none of its versions is live.
        DataError: all answers are known already.
    """
    # For its owner only, because what people searched for is personal data.
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with closing(open_store(store)) as opened:
        with open_gallery(gallery, store=opened) as found:
            questions = questions_about(found, sentences, folder)
        if not questions.num_open:
            raise DataError(
                f"feedback in {folder} answers all of these {len(sentences)} sentences; give others"
            )
        app = label_app(opened, gallery, questions, folder)
        # The socket listens before the address is announced, so a browser that opens it at once is
        # not refused, but waits for uvicorn. It also tells which port was free.
        with socket.create_server((HOST, port)) as bound:
            on_ready(f"http://{HOST}:{bound.getsockname()[1]}{PAGE}")
            server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
            with suppress(KeyboardInterrupt):  # which uvicorn raises again after it has stopped
                server.run([bound])
    return questions.num_answered


def questions_about(gallery: Gallery, sentences: Sequence[str], folder: Path) -> Questions:
    """Search for sentences, and return the questions about their hits."""
    results = gallery.search_batch(sentences, k=NUM_HITS, per_image=1)
    return Questions(results, read_feedback(folder, gallery.name))


def label_app(store: InstanceStore, gallery: str, questions: Questions, folder: Path) -> FastAPI:
    """Return the application: the page, and photos of the gallery as `reir serve` shows them."""
    # The service gets the open store. This location only keeps it from watching the folder of the
    # default store, which may be another one.
    config = ServeConfig(store="memory:", galleries=(gallery,))
    workers = SearchWorkers(store, ModelCache(), config.limits)
    app = create_app(Service(config, store, workers, reir_home() / "uploads"), config)
    app.include_router(label_router(questions, gallery, folder))
    return app
