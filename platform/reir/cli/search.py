"""`reir search`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from reir.cli.common import (
    DEFAULT_GALLERY,
    AsJson,
    Checkpoint,
    Encoder,
    Store,
    encoder_from_options,
    messages,
    new_table,
    output,
    photo_text,
    print_json,
    refuse_with_server,
)
from reir.cli.every_photo import Every, Precision, Recall, check_options, print_every_photo
from reir.errors import ConfigError
from reir.query.language import NOTE, seems_foreign

if TYPE_CHECKING:
    from reir.models.zoom_steps import ZoomSearch
    from reir.query.every_photo import EveryPhotoOptions
    from reir.query.request import Query, Term
    from reir.results import Evidence, SearchResult

EXAMPLES = """[bold]Examples[/bold]

reir search "the red mug left of the laptop" --gallery photos

reir search "a dog" -k 20 --per-image 3 --draw dogs.png

reir search "the largest boat" --where "area > 0.1 and cx < 0.5" --json

reir search "a mug" --not "a cup of coffee" --like 6f0c1d#3 --explain

reir search "a dog on a sofa" --all --recall 0.9 --json > dogs.jsonl"""

MAX_COUNT = 1000
NOT_WEIGHT = -0.5
"""Weight of `--not`. With a weight of -1 the query vector would turn away from what is wanted."""

Expression = Annotated[
    str | None, typer.Argument(metavar="EXPRESSION", help="Description of one object, in quotes.")
]
Count = Annotated[int, typer.Option("-k", min=1, max=MAX_COUNT, help="Maximum number of hits.")]
PerImage = Annotated[
    int, typer.Option(min=1, max=MAX_COUNT, help="Maximum number of hits in one photo.")
]
Verify = Annotated[
    bool | None,
    typer.Option(
        "--verify/--no-verify",
        help="Compare the colors that the sentence names with the pixels of the first hits, and "
        "order these by both; with --all, leave out found photos that do not have the colors. "
        "Default: yes, unless --rerank orders the hits.",
        show_default=False,
    ),
]
Rerank = Annotated[bool, typer.Option(help="Order the best photos with the relation re-ranker.")]
Draw = Annotated[Path | None, typer.Option(help="Save a picture of the hits.", metavar="PICTURE")]
Where = Annotated[
    str | None,
    typer.Option(
        help="Only instances that pass this filter: 'area > 0.05 and attr.camera == \"X100\"'.",
        metavar="FILTER",
    ),
]
Like = Annotated[
    list[str] | None,
    typer.Option(
        help="Find instances like this one of the gallery; repeatable.", metavar="INSTANCE_ID"
    ),
]
Unlike = Annotated[
    list[str] | None,
    typer.Option(
        "--not", help="Avoid instances that fit this expression; repeatable.", metavar="EXPRESSION"
    ),
]
MinPresence = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=1,
        help="Leave out hits whose probability of being right is lower than this; with --all, "
        "photos whose probability of having the object is lower.",
        show_default=False,
    ),
]
Explain = Annotated[
    bool,
    typer.Option(
        "--explain",
        help="Show for each hit what differs from the sentence, and what explains its rank.",
    ),
]


SegmenterSpec = Annotated[
    str | None,
    typer.Option(
        metavar="SPEC",
        help="Like --localize, with masks of another model: sam2:NAME_OR_DIR. Default: the mask "
        "head of the checkpoint.",
    ),
]


class ExportFormat(StrEnum):
    """Values of `--export`."""

    COCO = "coco"
    CSV = "csv"
    JSONL = "jsonl"


Export = Annotated[
    ExportFormat | None,
    typer.Option(
        help="Print the hits for other programs: as a COCO data set, as a table of "
        "comma-separated values, or as one JSON object on each line."
    ),
]
Localize = Annotated[
    bool,
    typer.Option(
        "--localize",
        help="Add masks and tighter boxes to the first hits, from the pixels of their photos.",
    ),
]
Zoom = Annotated[
    bool,
    typer.Option(
        "--zoom",
        help="Search the first photos again on their pixels, by zooming in: finds small objects, "
        "and takes about a second for each photo.",
    ),
]
LocalizerSpec = Annotated[
    str | None,
    typer.Option(
        metavar="SPEC",
        help="Let this model look at the first photos, and order them by its scores: "
        "grounding-dino:NAME_OR_DIR looks once at the whole photo, piza:DIR zooms in. Default with "
        "--zoom: the encoder of the gallery.",
    ),
]
Version = Annotated[
    str,
    typer.Option(
        help="Version to search, as listed by `reir versions`. Default: the live version.",
        show_default=False,
    ),
]
Server = Annotated[
    str | None,
    typer.Option(
        envvar="REIR_SERVER",
        metavar="URL",
        help="Search on this server of `reir serve`; $REIR_API_KEY holds its key.",
    ),
]


@dataclass(frozen=True)
class HitModels:
    """Specs of the models that look at the photos of hits; None for those of the checkpoint."""

    segmenter: str | None
    localizer: str | None


def register(app: typer.Typer) -> None:
    """Add the subcommand to the command line."""
    app.command("search", epilog=EXAMPLES)(search)


def search(  # noqa: PLR0913, every argument is an option of the command
    context: typer.Context,
    expression: Expression = None,
    gallery: Annotated[str, typer.Option(help="Gallery to search.")] = DEFAULT_GALLERY,
    k: Count = 10,
    per_image: PerImage = 1,
    where: Where = None,
    like: Like = None,
    unlike: Unlike = None,
    min_presence: MinPresence = None,
    every: Every = False,
    precision: Precision = None,
    recall: Recall = None,
    rerank: Rerank = False,
    verify: Verify = None,
    zoom: Zoom = False,
    localizer: LocalizerSpec = None,
    localize: Localize = False,
    segmenter: SegmenterSpec = None,
    explain: Explain = False,
    draw: Draw = None,
    export: Export = None,
    as_json: AsJson = False,
    store: Store = None,
    checkpoint: Checkpoint = None,
    encoder: Encoder = None,
    server: Server = None,
    version: Version = "",
) -> None:
    """Find the object that a sentence describes.

    Prints the photo, score and box of each hit, best first, and whether the photo shows the object:
    likely, possible or unlikely. Boxes are in percent of the photo, from the upper left corner.
    """
    from reir.query.request import Query, check_query

    check_options(context, every=every)
    if server is not None:
        given = dict(checkpoint=checkpoint, encoder=encoder)
        refuse_with_server(context, version, given | dict(segmenter=segmenter, localizer=localizer))
    spec = encoder_from_options(checkpoint, encoder)
    if verify is None:
        verify = not rerank
    if every:
        options: EveryPhotoOptions = dict(where=where, min_presence=min_presence, verify=verify)
        options |= dict(precision=precision, recall=recall)
        place = (gallery, store, spec, server, version)
        print_every_photo(expression, options, *place, as_json=as_json)
        return
    query = Query(
        terms=query_terms(expression, like or [], unlike or []),
        k=k,
        per_image=per_image,
        where=where,
        # None is for --all, where 0 would be a threshold that the user has chosen.
        min_presence=min_presence or 0.0,
        rerank=rerank,
        verify=verify,
        zoom=zoom or localizer is not None,
        localize=localize or segmenter is not None,
        explain=explain,
    )
    check_query(query)  # before the model is loaded, which takes seconds
    check_picture(draw)
    if server is not None:
        result = _ask_server(server, query, gallery)
    else:
        models = HitModels(segmenter, localizer)
        result = _ask_here(query, gallery, store, spec, models, version)
    _show(result, draw, export, as_json=as_json)


def _show(
    result: SearchResult, draw: Path | None, export: ExportFormat | None, *, as_json: bool
) -> None:
    """Print the answer in the form that the options name, and save the picture."""
    from reir.export import export as export_text

    if export is not None:
        typer.echo(export_text(result, export.value), nl=False)
    elif as_json:
        print_json(result.to_dict())
    else:
        output().print(as_table(result))
    # After the answer, which is worth printing even if the picture cannot be saved.
    if draw is not None:
        result.save_drawing(draw)
        if export is None and not as_json:
            output().print(Text(f"picture: {draw}"))


def _ask_server(server: str, query: Query, gallery: str) -> SearchResult:
    from reir.client.http_client import Client

    with Client(server) as client:
        return client.ask([query], gallery)[0]


def _ask_here(  # noqa: PLR0913 - each is an option of the command
    query: Query,
    gallery: str,
    store: str | None,
    encoder: str | None,
    models: HitModels,
    version: str,
) -> SearchResult:
    from reir.query.search import open_gallery

    with messages().status("loading the model"):
        opened = open_gallery(
            gallery,
            store=store,
            encoder=encoder,
            segmenter=models.segmenter,
            zoomer=models.localizer,
            version=version,
        )
    with opened:
        return opened.ask([query])[0]


def query_terms(
    expression: str | None, like: Sequence[str], unlike: Sequence[str]
) -> tuple[Term, ...]:
    """Return the terms of the query.

    Raises:
        ConfigError: there is neither an expression nor `--like`.
    """
    from reir.query.request import Term

    if expression is None and not like:
        raise ConfigError("nothing to search for; give an EXPRESSION, --like INSTANCE_ID or both")
    wanted = [] if expression is None else [Term(expression=expression)]
    wanted += [Term(instance_id=each) for each in like]
    return (*wanted, *(Term(expression=each, weight=NOT_WEIGHT) for each in unlike))


def check_picture(path: Path | None) -> None:
    """Check that a picture can be written to the path of `--draw`, if there is one.

    Raises:
        ConfigError: pictures cannot be written with its suffix, or its folder does not exist.
    """
    if path is None:
        return
    from reir.images.drawing import check_ending

    try:
        check_ending(path)
    except ConfigError as error:
        raise ConfigError(f"--draw {error}") from error
    if not path.absolute().parent.is_dir():
        raise ConfigError(
            f"--draw {path}: the folder {path.parent} does not exist; create it first"
        )


def as_table(result: SearchResult) -> RenderableType:
    """Return the answer for a terminal: one line for each hit, then gallery and times."""
    if not result.hits:
        return Group(*_remarks(result), _footer(result))
    calibrated = result.presence is not None
    compared = any(hit.differs for hit in result)
    zoomed = any(hit.zoom for hit in result)
    explained = result.hits[0].evidence is not None
    verified = any(hit.evidence and hit.evidence.colors for hit in result)
    numbers = ("#", "score", "zoom", "looks", "area", "dual", "re-rank", "margin")
    table = new_table(
        *("#", "score", *(["object in photo"] if calibrated else []), "photo"),
        *(["what differs"] if compared else []),
        *(["zoom", "looks"] if zoomed else []),
        *("x %", "y %", "area"),
        *(["dual", "re-rank", "margin", "neighbors"] if explained else []),
        *(["colors"] if verified else []),
        right=numbers,
    )
    for rank, hit in enumerate(result.hits, 1):
        x1, y1, x2, y2 = (round(100 * side) for side in hit.box)
        table.add_row(
            str(rank),
            f"{hit.score:#.3g}",  # "#" keeps trailing zeros, so that all scores have three digits
            *([hit.likelihood or "-"] if calibrated else []),
            photo_text(hit.uri),
            *(["; ".join(map(str, hit.differs))] if compared else []),
            *(_zoom_cells(hit.zoom) if zoomed else []),
            f"{x1}-{x2}",
            f"{y1}-{y2}",
            f"{100 * hit.area:.1f} %",
            *(_evidence(hit.evidence) if hit.evidence else []),
            *([_colors(hit.evidence)] if verified and hit.evidence else []),
        )
    return Group(*_remarks(result), *_headline(result), table, "", _footer(result))


def _remarks(result: SearchResult) -> list[RenderableType]:
    """Return remarks on the expression itself."""
    return [Text(NOTE, style="yellow"), ""] if seems_foreign(result.expression) else []


def _headline(result: SearchResult) -> list[RenderableType]:
    """Return a line above the hits if the object may be absent, or if the first hits are tied."""
    return [Text(result.headline, style="bold"), ""] if result.headline else []


def _percent(probability: float | None) -> str:
    return "-" if probability is None else f"{100 * probability:.0f} %"


def _zoom_cells(zoom: ZoomSearch | None) -> list[str]:
    """Return the score of the second search, and its number of looks."""
    return ["-", "-"] if zoom is None else [f"{zoom.score:#.3g}", str(len(zoom.steps))]


def _evidence(evidence: Evidence) -> list[str]:
    numbers = (evidence.dual_score, evidence.rerank_score, evidence.margin)
    near = ", ".join(
        # Neighbors are in the photo of the hit, so their numbers are enough.
        f"#{each.instance_id.rpartition('#')[2]} {_percent(each.weight)}"
        for each in evidence.neighbors
    )
    return [*("-" if each is None else f"{each:#.3g}" for each in numbers), near or "-"]


def _colors(evidence: Evidence) -> str:
    read = (f"{each.word} {_percent(each.probability)}" for each in evidence.colors)
    return ", ".join(read) or "-"


def _footer(result: SearchResult) -> Text:
    num = len(result.hits)
    found = f"{num} hit{'' if num == 1 else 's'}" if num else "Nothing found"
    times = ", ".join(f"{stage} {ms:.0f}" for stage, ms in result.timings_ms.items())
    parts = [f"{found} in gallery {result.gallery}, version {result.version}"]
    if result.presence is not None:
        parts.append(f"probability that it is there {_percent(result.presence)}")
    parts.append(f"{times} ms")
    if result.degraded:
        parts.append("without " + ", ".join(result.degraded))
    return Text("; ".join(parts), style="dim")
