"""The places beside the store in which an erased photo may have left traces."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from reir.config import reir_home
from reir.errors import DataError
from reir.images.decode import canonical_uri, path_of_uri
from reir.images.photo_files import delete_upload
from reir.operations.canary import KIND as CANARY
from reir.operations.feedback import Feedback, read_feedback, remove_feedback
from reir.operations.gate.page import report_page
from reir.operations.gate.verdicts import report_from
from reir.operations.search_log import remove_events
from reir.store.contract import InstanceStore
from reir.text import normalize_expression

REINDEX, REINDEX_REPORT, SOURCE = "reindex", "reindex-report", "source"
"""Kinds of documents of `reir reindex` that may name photos."""


@dataclass(frozen=True, kw_only=True)
class ErasePlaces:
    """Folders and files to look in.

    Attributes:
        uploads: folder of uploaded photos.
        search_log: folder of the search log.
        reports: folder of reports of `reir reindex`.
        logs: other log files, such as the access log of a server.
    """

    uploads: Path
    search_log: Path
    reports: Path
    logs: tuple[Path, ...] = ()


@dataclass(frozen=True)
class ErasedNames:
    """What erased photos may be called in these places.

    Attributes:
        image_ids, uris: of the photos.
        expressions: `expression_hash` of each expression that is known to describe one of them.
    """

    image_ids: frozenset[str]
    uris: frozenset[str]
    expressions: frozenset[str] = frozenset()

    @property
    def texts(self) -> list[str]:
        """All names, also the paths of local files, as logs have them, in JSON and without."""
        paths = {str(path_of_uri(uri)) for uri in self.uris if uri.startswith("file:///")}
        escaped = {json.dumps(path)[1:-1] for path in paths}
        return sorted(self.image_ids | self.uris | paths | escaped)

    def is_about(self, expression: str) -> bool:
        """Whether an expression is known to describe one of the photos."""
        return expression_hash(expression) in self.expressions


def expression_hash(expression: str) -> str:
    """Return a hash that is the same for all spellings that encoders do not tell apart."""
    return hashlib.sha256(normalize_expression(expression).encode()).hexdigest()


def default_places() -> ErasePlaces:
    """Return the places in `$REIR_HOME`, and those that the settings of `reir serve` name."""
    from reir.settings import load_settings, sections

    home = reir_home()
    serve: Any = None
    if model := sections().get("serve"):
        serve = load_settings("serve", model).values
    uploads = getattr(serve, "uploads", None) or home / "uploads"
    search_log = getattr(serve, "search_log", None) or home / "searches"
    access_log = getattr(serve, "access_log", None)
    logs = sorted((home / "schedule-runs").glob("*/*.log"))
    return ErasePlaces(
        uploads=uploads,
        search_log=search_log,
        reports=home / "reports",
        logs=(*logs, *([access_log] if access_log else [])),
    )


def erase_uploads(places: ErasePlaces, gallery: str, names: ErasedNames) -> int:
    """Delete the files of uploaded photos; return how many there were."""
    # With the slash, since the name of another gallery may begin with that of this one.
    ours = canonical_uri(places.uploads / gallery) + "/"
    paths = [path_of_uri(uri) for uri in names.uris if uri.startswith(ours)]
    existing = [path for path in paths if path.exists()]
    for folder in {path.parent for path in existing}:
        # All files of a folder have the same content and tenant; one may be what an upload that was
        # killed has left.
        for file in [*folder.iterdir()]:
            delete_upload(file)
    return len(existing)


def known_expressions(
    store: InstanceStore, places: ErasePlaces, gallery: str, names: ErasedNames
) -> set[str]:
    """Return hashes of expressions that canaries or users' feedback say describe a photo."""
    canaries = store.find_documents(CANARY, f"{gallery}/").values()
    found = {each["expression"] for each in canaries if each["uri"] in names.uris}
    if places.search_log.exists():
        found |= {
            said.expression
            for said in read_feedback(places.search_log, gallery)
            if said.verdict in ("right", "box") and said.uri in names.uris
        }
    return set(map(expression_hash, found))


def erase_searches(places: ErasePlaces, gallery: str, names: ErasedNames) -> int:
    """Delete searches and feedback that are about a photo; return how many there were."""
    ids_and_uris = names.image_ids | names.uris

    def is_search(event: Mapping[str, Any]) -> bool:
        # Earlier releases logged feedback here, too; such an event names the photo itself.
        hits = [event, *event.get("hits", ())]
        # In a filter, names are in quotes.
        quoted = set((event.get("where") or "").replace("'", '"').split('"'))
        return (
            names.is_about(event["expression"])
            or not quoted.isdisjoint(ids_and_uris)
            or any(
                each.get("image_id") in names.image_ids or each.get("uri") in names.uris
                for each in hits
            )
        )

    def is_feedback(said: Feedback) -> bool:
        return not ids_and_uris.isdisjoint((said.image_id, said.uri)) or names.is_about(
            said.expression
        )

    if not places.search_log.exists():
        return 0
    searches = remove_events(places.search_log, gallery, is_search)
    return searches + remove_feedback(places.search_log, gallery, is_feedback)


def erase_documents(store: InstanceStore, gallery: str, names: ErasedNames) -> tuple[int, int, int]:
    """Delete canaries and sources that are about a photo, and take it out of jobs and reports.

    Returns:
        How many canaries, sources, and jobs and reports were changed.
    """

    def is_canary(value: Mapping[str, Any]) -> bool:
        return value["uri"] in names.uris or names.is_about(value["expression"])

    canaries = _names_of(store, CANARY, gallery, is_canary)
    sources = _names_of(store, SOURCE, gallery, lambda value: _is_photo(value["text"], names))
    store.delete_documents(CANARY, canaries)
    store.delete_documents(SOURCE, sources)
    changed = 0
    for kind, prefix, cleaned_of in (
        (REINDEX_REPORT, f"{gallery}/", _without_photos),
        # The document of a job has the name of its gallery, without a slash. So this prefix also
        # finds galleries whose names begin with it, which the loop leaves alone.
        (REINDEX, gallery, _job_without_photos),
    ):
        for name, values in store.find_documents(kind, prefix).items():
            cleaned = cleaned_of(values, names)
            if name.partition("/")[0] == gallery and cleaned != values:
                store.put_document(kind, name, cleaned)
                changed += 1
    return len(canaries), len(sources), changed


def erase_report_files(places: ErasePlaces, names: ErasedNames) -> int:
    """Take the photos out of the reports in the folder; return how many were changed."""
    changed = 0
    for path in sorted(places.reports.glob("*/report.json")):
        try:
            values = json.loads(path.read_text())
            cleaned = _without_photos(values, names)
            if cleaned == values:
                continue
            page = report_page(report_from(cleaned))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path} is not a report of `reir reindex` ({error}); delete its folder"
            ) from error
        # The page first: if this is interrupted, the next run finds the photo in the JSON again.
        path.with_suffix(".html").write_text(page, encoding="utf-8")
        path.write_text(json.dumps(cleaned, indent=2) + "\n")
        changed += 1
    return changed


def erase_log_lines(path: Path, names: ErasedNames) -> int:
    """Overwrite the lines of a log that name a photo with spaces; return how many there were.

    In place: a server that is writing to the file goes on writing to it.
    """
    wanted = [text.encode() for text in names.texts]
    erased = 0
    with path.open("r+b") as file:
        for start, line in _lines(file):
            if any(text in line for text in wanted):
                file.seek(start)
                file.write(b" " * len(line.rstrip(b"\n")))
                # The line break was not written, so the position is still before it.
                file.seek(start + len(line))
                erased += 1
    return erased


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yield offset and bytes of each line."""
    while True:
        start = file.tell()
        line = file.readline()
        if not line:
            return
        yield start, line


def _names_of(
    store: InstanceStore, kind: str, gallery: str, is_meant: Callable[[Mapping[str, Any]], bool]
) -> list[str]:
    found = store.find_documents(kind, f"{gallery}/")
    return [name for name, value in found.items() if is_meant(value)]


def _is_photo(source: str, names: ErasedNames) -> bool:
    return source in names.uris or ("://" not in source and canonical_uri(source) in names.uris)


def _without_photos(report: Mapping[str, Any], names: ErasedNames) -> dict[str, Any]:
    def is_other(change: Mapping[str, Any]) -> bool:
        return change["uri"] not in names.uris and change["wrong_uri"] not in names.uris

    kept = {name: [*filter(is_other, report[name])] for name in ("lost", "won")}
    return {**report, **kept}


def _job_without_photos(job: Mapping[str, Any], names: ErasedNames) -> dict[str, Any]:
    sources = [each for each in job["sources"] if not _is_photo(each["text"], names)]
    names_one = any(text in job["error"] for text in names.texts)
    return {**job, "sources": sources, "error": "" if names_one else job["error"]}
