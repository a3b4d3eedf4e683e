"""`reir label-page`: a local page on which a person says whether hits are right."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reir.cli.common import Gallery, Store, messages, plural

EXAMPLES = """[bold]Example[/bold]

reir label-page photos --sentences questions.txt"""

Sentences = Annotated[
    Path, typer.Option(metavar="FILE", help="Text file with one sentence in each line.")
]
Folder = Annotated[
    Path | None,
    typer.Option(
        "--search-log",
        metavar="FOLDER",
        help="Folder in which the answers are stored as feedback. Default: $REIR_HOME/searches.",
    ),
]
Port = Annotated[int, typer.Option(help="Port of the page. Default: any free port.")]


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command("label-page", epilog=EXAMPLES)(label_page)


def label_page(
    gallery: Gallery,
    sentences: Sentences,
    folder: Folder = None,
    port: Port = 0,
    store: Store = None,
) -> None:
    """Open a local page that asks about the hits of sentences, the most useful questions first.

    The answers are stored as feedback. `reir finetune GALLERY --from feedback` learns from it.
    """
    # Imported here, because `reir --help` must not wait for FastAPI.
    from reir.operations.search_log import default_folder
    from reir_serving.labeling.server import read_sentences, run_label_page

    console = messages()
    answered = run_label_page(
        gallery,
        read_sentences(sentences),
        store=store,
        folder=folder or default_folder(),
        port=port,
        on_ready=lambda address: console.print(f"open {address} in a browser; Ctrl-C ends"),
    )
    console.print(f"{plural(answered, 'question')} answered")
