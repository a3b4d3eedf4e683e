"""`reir demo`: index a built-in gallery with known answers, search it, and serve the search page.

At the end, this process becomes `reir serve`, because this package must not import `reir_serving`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
import yaml
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from reir.demo.gallery import DemoScore, DemoSentence
    from reir.query.search import Gallery
    from reir.results import SearchResult

DEMO_GALLERY = "demo"
OWN_GALLERY = "demo-own"
NUM_HITS = 5
NUM_DRAWN = 4
"""Number of hits in a row of the contact sheet."""
NUM_ON_SHEET = 6
"""Number of sentences on the contact sheet, spread over all sentences."""
NUM_SUGGESTIONS = 5
"""Number of sentences that the search page suggests, besides one about something absent."""


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
    from reir.demo.gallery import PHOTOS, demo_sentences
    from reir.query.search import open_gallery
    from reir.store import open_store
    from reir_ingestion.known_sources import known_source
    from reir_ingestion.pipeline import IndexOptions, index
    from reir_ingestion.sources import SourceOptions, open_source

    console = Console(stderr=as_json)
    encoder = load_encoder()
    folder = photos or PHOTOS
    name = OWN_GALLERY if photos else DEMO_GALLERY
    with closing(open_store(store)) as opened:
        console.print(f"Indexing {folder}")
        # The built-in gallery may differ from that of an earlier release, whose photos are gone.
        options = IndexOptions(prune=True, origin=known_source(folder, SourceOptions()))
        report = index(open_source(str(folder)), name, opened, encoder, options=options)
        console.print(report.table())
        examples: list[str] = []
        with closing(open_gallery(name, store=opened)) as gallery:
            if photos is None:
                examples = _search_examples(
                    gallery, demo_sentences(), output, console, as_json=as_json
                )
            elif not serve:
                _search_interactively(gallery, output, console)
    if serve and not as_json:
        settings: dict[str, object] = {"galleries": [name], "port": port}
        if examples:
            settings["examples"] = examples
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
    sentences: Sequence[DemoSentence],
    output: Path,
    console: Console,
    *,
    as_json: bool,
) -> list[str]:
    """Search every sentence, score and draw the results; return suggestions for the search page."""
    from reir.demo.gallery import score_demo
    from reir.images.drawing import contact_sheets

    texts = [each.text for each in sentences]
    results = gallery.search_batch(texts, k=NUM_HITS, verify=True)
    score = score_demo(sentences, results)
    console.print(_table(sentences, results))
    output.parent.mkdir(parents=True, exist_ok=True)
    # Every n-th one, so that some of the sentences at the end, about absent things, are drawn too.
    on_sheet = results[:: max(len(results) // NUM_ON_SHEET, 1)][-NUM_ON_SHEET:]
    # Without the time, which is that of all sentences together.
    drawn = [replace(each, hits=each.hits[:NUM_DRAWN], timings_ms={}) for each in on_sheet]
    contact_sheets([result.sheet for result in drawn]).save(output)
    for line in describe_score(score, sentences):
        console.print(line)
    console.print(f"Contact sheet: {output.resolve()}", soft_wrap=True)
    if as_json:
        answers = [
            {"rank": each.rank_in(result), "absent": each.is_absent, **result.to_dict()}
            for each, result in zip(sentences, results, strict=True)
        ]
        values = asdict(score) | {"sheet": str(output), "answers": answers}
        typer.echo(json.dumps(values, indent=2))
    return choose_suggestions(sentences, results)


def _table(sentences: Sequence[DemoSentence], results: Sequence[SearchResult]) -> Table:
    table = Table(title="Answers to the sentences")
    for column in ("sentence", "best hit", "probability", "right answer"):
        table.add_column(column)
    for each, result in zip(sentences, results, strict=True):
        top = result[0] if len(result) else None
        rank = each.rank_in(result)
        table.add_row(
            each.text,
            Path(top.uri).name if top and result.found else "probably not there",
            f"{top.presence:.0%}" if top and top.presence is not None else "",
            "not there" if each.is_absent else f"hit {rank}" if rank else f"not in {NUM_HITS} hits",
        )
    return table


def describe_score(score: DemoScore, sentences: Sequence[DemoSentence]) -> list[str]:
    """Return the lines that say how many sentences are answered right."""
    num_absent = sum(each.is_absent for each in sentences)
    num_present = len(sentences) - num_absent
    return [
        f"{num_present} sentences describe something in the photos: the best hit is right for "
        f"{score.top1:.0%} of them, one of the first five for {score.top5:.0%}.",
        f"{num_absent} sentences describe something that no photo shows: {score.absent:.0%} of "
        f"them are answered with 'probably not there', and so are {score.false_absent:.0%} of the "
        "others.",
    ]


def choose_suggestions(
    sentences: Sequence[DemoSentence], results: Sequence[SearchResult]
) -> list[str]:
    """Return sentences for the search page: some whose answers are right, and one about nothing."""
    pairs = list(zip(sentences, results, strict=True))
    solved = [each.text for each, result in pairs if result.found and each.rank_in(result) == 1]
    refused = [each.text for each, result in pairs if each.is_absent and not result.found]
    return [*solved[:: max(len(solved) // NUM_SUGGESTIONS, 1)][:NUM_SUGGESTIONS], *refused[:1]]


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
            result = gallery.search(sentence, k=2 * NUM_HITS, verify=True)
        except QueryError as error:
            console.print(str(error), style="red", markup=False)
            continue
        for rank, hit in enumerate(result.hits[:NUM_HITS], 1):
            console.print(f"{rank}  {hit.score:.3f}  {hit.uri}", markup=False)
        output.parent.mkdir(parents=True, exist_ok=True)
        result.save_drawing(output)
        console.print(f"Drawing: {output.resolve()}", soft_wrap=True)
