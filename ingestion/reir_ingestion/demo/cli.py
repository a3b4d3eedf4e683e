"""`reir demo`: index a built-in gallery with known answers, search it, and serve the search page.

At the end, this process becomes `reir serve`, because this package must not import `reir_serving`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
import yaml
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from reir.query.search import Gallery
    from reir.results import SearchResult
    from reir_ingestion.demo.gallery import DemoExpression

DEMO_GALLERY = "demo"
OWN_GALLERY = "demo-own"
NUM_HITS = 4
NUM_ON_SHEET = 6
"""Number of sentences on the contact sheet, spread over all examples."""
NUM_SUGGESTIONS = 5
"""Number of sentences that the search page suggests, besides `ABSENT`."""
ABSENT = "the white refrigerator with magnets"
"""A sentence about something that no photo shows."""
MIN_IOU = 0.5


def register_demo(app: typer.Typer) -> None:
    """Add the subcommand to the CLI."""
    app.command("demo")(demo)


def demo(  # noqa: PLR0913, every argument is an option of the command
    photos: Annotated[
        Path | None,
        typer.Option(help="Folder of your own photos to search instead of the built-in gallery."),
    ] = None,
    output: Annotated[
        Path, typer.Option(help="File for the contact sheet with the results.")
    ] = Path("out/demo.png"),
    store: Annotated[
        str | None, typer.Option(help="Folder of an embedded store, or address of a Milvus server.")
    ] = None,
    serve: Annotated[
        bool,
        typer.Option("--serve/--no-serve", help="Serve the search page at the end, until Ctrl-C."),
    ] = True,
    port: Annotated[int, typer.Option(help="Port of the search page.")] = 8000,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print the results as JSON, and do not serve the search page."),
    ] = False,
) -> None:
    """Index a built-in gallery, search it and serve the search page. Works offline."""
    from reir.checkpoint import load_encoder
    from reir.config import reir_home
    from reir.query.search import open_gallery
    from reir.store import open_store
    from reir_ingestion.demo.gallery import build_demo_gallery
    from reir_ingestion.known_sources import known_source
    from reir_ingestion.pipeline import IndexOptions, index
    from reir_ingestion.sources import SourceOptions, open_source

    console = Console(stderr=as_json)
    encoder = load_encoder()
    built = None if photos else build_demo_gallery(reir_home() / "demo")
    folder = photos or built.photos_dir  # type: ignore[union-attr]
    name = OWN_GALLERY if photos else DEMO_GALLERY
    with closing(open_store(store)) as opened:
        console.print(f"Indexing {folder}")
        # The built-in gallery may differ from that of an earlier release, whose photos are gone.
        options = IndexOptions(prune=True, origin=known_source(folder, SourceOptions()))
        report = index(open_source(str(folder)), name, opened, encoder, options=options)
        console.print(report.table())
        examples: list[str] = []
        with closing(open_gallery(name, store=opened, encoder=encoder)) as gallery:
            if built is not None:
                examples = _search_examples(
                    gallery, built.expressions, output, console, as_json=as_json
                )
            elif not serve:
                _search_interactively(gallery, output, console)
    if serve and not as_json:
        settings = {"galleries": [name], "port": port, "examples": examples}
        _become_server(settings | ({"store": store} if store else {}))


def _become_server(settings: Mapping[str, object]) -> NoReturn:
    """Replace this process with `reir serve`.

    As a child process, the server would keep running if this process got SIGTERM.
    """
    from reir.config import reir_home

    file = reir_home() / "demo" / "serve.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(dict(settings)), encoding="utf-8")
    sys.stdout.flush()  # `execv` drops what Python has buffered
    reir = [sys.executable, "-c", "from reir.cli.main import main; main()"]
    os.execv(sys.executable, [*reir, "serve", "--config", str(file)])


def _search_examples(
    gallery: Gallery,
    expressions: Sequence[DemoExpression],
    output: Path,
    console: Console,
    *,
    as_json: bool,
) -> list[str]:
    """Search every example, score and draw the results; return suggestions for the search page."""
    from reir.images.drawing import contact_sheets

    results = gallery.search_batch([e.text for e in expressions], k=NUM_HITS)
    correct = [is_correct(r, e) for r, e in zip(results, expressions, strict=True)]
    table = Table(title="Best hit for each sentence")
    for column in ("sentence", "photo", "score", "correct"):
        table.add_column(column)
    for result, is_hit in zip(results, correct, strict=True):
        top = result.hits[0] if result.hits else None
        table.add_row(
            result.expression,
            Path(top.uri).name if top else "nothing found",
            f"{top.score:.3f}" if top else "",
            "yes" if is_hit else "no",
        )
    console.print(table)
    output.parent.mkdir(parents=True, exist_ok=True)
    # Every n-th one, because neighboring sentences are about the same scene.
    on_sheet = results[:: max(len(results) // NUM_ON_SHEET, 1)][:NUM_ON_SHEET]
    contact_sheets([result.sheet for result in on_sheet]).save(output)
    br1 = 100 * sum(correct) / len(correct)
    console.print(f"BR@1: the best hit is correct for {br1:.0f}% of {len(correct)} sentences")
    console.print(f"Contact sheet: {output.resolve()}", soft_wrap=True)
    if as_json:
        answers = [{"right": ok, **r.to_dict()} for r, ok in zip(results, correct, strict=True)]
        typer.echo(json.dumps({"br1_50": br1, "sheet": str(output), "answers": answers}, indent=2))
    return choose_suggestions(expressions, correct)


def choose_suggestions(expressions: Sequence[DemoExpression], correct: Sequence[bool]) -> list[str]:
    """Return sentences for the search page: some with a correct best hit, and `ABSENT`."""
    solved = [each.text for ok, each in zip(correct, expressions, strict=True) if ok]
    return [*solved[:: max(len(solved) // NUM_SUGGESTIONS, 1)][:NUM_SUGGESTIONS], ABSENT]


def is_correct(result: SearchResult, truth: DemoExpression) -> bool:
    """Return whether the best hit is the true photo, with an IoU of at least `MIN_IOU`."""
    from reir.images.boxes import elementwise_iou

    if not result.hits:
        return False
    top = result.hits[0]
    sides = truth.size_px * 2
    box = [value / side for value, side in zip(truth.box_xyxy_px, sides, strict=True)]
    overlap = float(elementwise_iou([top.box], [box])[0])
    return Path(top.uri).name == truth.file_name and overlap >= MIN_IOU


def _search_interactively(gallery: Gallery, output: Path, console: Console) -> None:
    """Search for sentences from the terminal until an empty line or the end of the input."""
    from reir.errors import QueryError

    console.print(
        "Describe one object, such as: the red mug left of the laptop. An empty line quits."
    )
    while True:
        try:
            sentence = console.input("> ").strip()
        except EOFError:
            return
        if not sentence:
            return
        try:
            result = gallery.search(sentence, k=2 * NUM_HITS)
        except QueryError as error:
            console.print(str(error), style="red", markup=False)
            continue
        for rank, hit in enumerate(result.hits[:NUM_HITS], 1):
            console.print(f"{rank}  {hit.score:.3f}  {hit.uri}", markup=False)
        output.parent.mkdir(parents=True, exist_ok=True)
        result.save_drawing(output)
        console.print(f"Drawing: {output.resolve()}", soft_wrap=True)
