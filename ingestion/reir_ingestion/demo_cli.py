"""`reir demo`: a built-in gallery, indexed, asked and served, with the truth known; or own photos.

At the end the process becomes `reir serve`, because this package must not import `reir_serving`.
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
    from reir.records import SearchResult
    from reir.search import Gallery
    from reir_ingestion.demo_gallery import DemoExpression

DEMO_GALLERY = "demo"
OWN_GALLERY = "demo-own"
NUM_HITS = 4
NUM_DRAWN = 6
"""Sentences on the contact sheet, spread over the examples."""
NUM_OFFERED = 5
"""Sentences that the page offers, besides one about something that is not there."""
ABSENT = "the white refrigerator with magnets"
RIGHT_IOU = 0.5


def register_demo(app: typer.Typer) -> None:
    """Add the subcommand to the CLI."""
    app.command("demo")(demo)


def demo(  # noqa: PLR0913, one argument an option
    photos: Annotated[
        Path | None, typer.Option(help="Folder of your own photos to ask about instead.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Where the contact sheet is written.")] = Path(
        "out/demo.png"
    ),
    store: Annotated[
        str | None, typer.Option(help="Folder of the embedded store, or address of a server.")
    ] = None,
    serve: Annotated[
        bool, typer.Option("--serve/--no-serve", help="Stay and serve the search page.")
    ] = True,
    port: Annotated[int, typer.Option(help="Of the search page.")] = 8000,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and serve no page.")] = False,
) -> None:
    """Index a built-in gallery, ask it sentences and serve the search page; works offline."""
    from reir.checkpoint import load_encoder
    from reir.config import reir_home
    from reir.search import open_gallery
    from reir.store import open_store
    from reir_ingestion.demo_gallery import build_demo_gallery
    from reir_ingestion.pipeline import IndexOptions, index
    from reir_ingestion.sources import open_source

    console = Console(stderr=as_json)
    encoder = load_encoder()
    built = None if photos else build_demo_gallery(reir_home() / "demo")
    folder = photos or built.photos_dir  # type: ignore[union-attr]
    name = OWN_GALLERY if photos else DEMO_GALLERY
    with closing(open_store(store)) as opened:
        console.print(f"indexing {folder}")
        # Photos of an earlier release's gallery are gone: they must not be found.
        options = IndexOptions(prune=True)
        report = index(open_source(str(folder)), name, opened, encoder, options=options)
        console.print(report.table())
        examples: list[str] = []
        with closing(open_gallery(name, store=opened, encoder=encoder)) as gallery:
            if built is not None:
                examples = _answer(gallery, built.expressions, output, console, as_json=as_json)
            elif not serve:
                _ask(gallery, output, console)
    if serve and not as_json:
        settings = {"galleries": [name], "port": port, "examples": examples}
        _become_server(settings | ({"store": store} if store else {}))


def _become_server(settings: Mapping[str, object]) -> NoReturn:
    """Replace this process with `reir serve`, so that signals reach the server directly."""
    from reir.config import reir_home

    file = reir_home() / "demo" / "serve.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(dict(settings)), encoding="utf-8")
    sys.stdout.flush()
    reir = [sys.executable, "-c", "from reir.cli import main; main()"]
    os.execv(sys.executable, [*reir, "serve", "--config", str(file)])


def _answer(
    gallery: Gallery,
    expressions: Sequence[DemoExpression],
    output: Path,
    console: Console,
    *,
    as_json: bool,
) -> list[str]:
    """Ask every example, compare with the truth, draw; return what the page shall offer."""
    from reir.drawing import contact_sheets

    results = gallery.search_batch([e.text for e in expressions], k=NUM_HITS)
    right = [is_right(r, e) for r, e in zip(results, expressions, strict=True)]
    table = Table(title="Best hit of each sentence")
    for column in ("sentence", "photo", "score", "right"):
        table.add_column(column)
    for result, correct in zip(results, right, strict=True):
        top = result.hits[0] if result.hits else None
        table.add_row(
            result.expression,
            Path(top.uri).name if top else "nothing found",
            f"{top.score:.3f}" if top else "",
            "yes" if correct else "no",
        )
    console.print(table)
    output.parent.mkdir(parents=True, exist_ok=True)
    contact_sheets(results[:: max(len(results) // NUM_DRAWN, 1)][:NUM_DRAWN]).save(output)
    br1 = 100 * sum(right) / len(right)
    console.print(f"BR@1 against the known truth: {br1:.0f} % of {len(right)} sentences")
    console.print(f"contact sheet: {output.resolve()}", soft_wrap=True)
    if as_json:
        answers = [{"right": ok, **r.to_dict()} for r, ok in zip(results, right, strict=True)]
        typer.echo(json.dumps({"br1_50": br1, "sheet": str(output), "answers": answers}, indent=2))
    return offered(expressions, right)


def offered(expressions: Sequence[DemoExpression], right: Sequence[bool]) -> list[str]:
    """Return the sentences that the page offers: some that are answered right, and `ABSENT`."""
    known = [each.text for ok, each in zip(right, expressions, strict=True) if ok]
    return [*known[:: max(len(known) // NUM_OFFERED, 1)][:NUM_OFFERED], ABSENT]


def is_right(result: SearchResult, truth: DemoExpression) -> bool:
    """Whether the first hit is the true photo and its box overlaps the true one by half."""
    from reir.boxes import elementwise_iou

    if not result.hits:
        return False
    top = result.hits[0]
    sides = truth.size_px * 2
    box = [value / side for value, side in zip(truth.box_xyxy_px, sides, strict=True)]
    overlap = float(elementwise_iou([top.box], [box])[0])
    return Path(top.uri).name == truth.file_name and overlap >= RIGHT_IOU


def _ask(gallery: Gallery, output: Path, console: Console) -> None:
    """Read sentences until an empty line or the end of the input."""
    from reir.errors import QueryError

    console.print("Write a sentence about one object; an empty line ends.")
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
        console.print(f"drawn: {output.resolve()}", soft_wrap=True)
