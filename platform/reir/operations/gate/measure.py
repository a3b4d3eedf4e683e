"""Measures how a version of a gallery answers: canaries, presence, recall of the store, latency."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from reir.errors import ReirError
from reir.metrics.calibration import auroc, expected_calibration_error
from reir.operations.canary import (
    Canary,
    CanaryAnswer,
    ask_canaries,
    resolve_canaries,
    select_canaries,
)
from reir.operations.gate.changes import VersionChanges, compare_versions
from reir.operations.gate.recall import search_recall
from reir.query.search import Gallery, open_gallery
from reir.store.contract import InstanceStore

MAX_CANARIES = 500
TIMED_EXPRESSIONS, TIMED_ROUNDS = 40, 5
RECALL_EXPRESSIONS = 100
MIN_CALIBRATED = 10
"""Numbers of present and of absent canaries from which on presence is measured."""

GENERIC_EXPRESSIONS = (
    "a person in a red shirt",
    "the dog on the left",
    "a white car in front of a building",
    "the man with the hat",
    "a cup on the table",
    "the child next to a woman",
    "a black bag",
    "the bird on the branch",
    "a bicycle leaning against a wall",
    "the largest boat",
    "a plate of food",
    "the woman holding a phone",
)
"""Timed and searched for where a gallery has no canaries."""


@dataclass(frozen=True, kw_only=True)
class VersionAnswers:
    """How one version answers.

    Attributes:
        version: its name.
        answers: to the canaries that it can answer, in their order.
        lost: canaries whose photo the version does not have.
        recall: mean recall@10 of the store's search against an exact scan.
        latency_p95_ms: 95th percentile over expressions of the time of a search in this process,
            without re-ranking; the time of one expression is a median.
    """

    version: str
    answers: tuple[CanaryAnswer, ...]
    lost: tuple[Canary, ...]
    recall: float
    latency_p95_ms: float

    def right_within(self, k: int) -> dict[Canary, bool]:
        """Whether one of the first `k` hits is right, for each canary with a known answer.

        A canary whose photo is lost counts as wrong.
        """
        found = {each.canary: 0 < each.rank <= k for each in self.answers if each.canary.is_present}
        return found | dict.fromkeys(self.lost, False)

    def recognized(self) -> dict[Canary, bool]:
        """Whether the version says that the object is not there, for each absent canary."""
        return {each.canary: not each.result.found for each in self.answers if each.canary.absent}

    @property
    def presence_ece(self) -> float | None:
        """Calibration error of the presence of canaries; None if too few are known."""
        known = self._presence()
        return None if known is None else expected_calibration_error(*known, balanced=True)

    @property
    def presence_auroc(self) -> float | None:
        """How well presence separates present from absent canaries; None if too few are known."""
        known = self._presence()
        return None if known is None else auroc(*known)

    def _presence(self) -> tuple[list[float], list[bool]] | None:
        known = [
            (each.result.presence, each.canary.is_present)
            for each in self.answers
            if each.result.presence is not None and (each.canary.is_present or each.canary.absent)
        ]
        num_present = sum(is_present for _, is_present in known)
        if min(num_present, len(known) - num_present) < MIN_CALIBRATED:
            return None
        return [value for value, _ in known], [is_present for _, is_present in known]


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """What the gate knows of a live version and a candidate.

    Attributes:
        changes: of photos and instances.
        candidate: how the candidate answers.
        live: how the live version answers; None if its model cannot be loaded any more.
        live_problem: why not.
        is_same_model: whether both were built with the same checkpoint and settings.
    """

    changes: VersionChanges
    candidate: VersionAnswers
    live: VersionAnswers | None
    live_problem: str
    is_same_model: bool


def measure_versions(
    store: InstanceStore,
    gallery: str,
    live: str,
    candidate: str,
    canaries: Sequence[Canary],
) -> Measurements:
    """Compare a candidate with the live version.

    Args:
        store: the store.
        gallery: name of the gallery.
        live, candidate: the two versions.
        canaries: of the gallery.

    Raises:
        CheckpointError: the model of the candidate does not load.
        GalleryNotFound: one of the versions is gone.
    """
    specs = {each.name: each.spec for each in store.versions(gallery)}
    opened: list[Gallery] = [open_gallery(gallery, store=store, version=candidate)]
    problem = ""
    try:
        if specs[live].digest == specs[candidate].digest:
            opened.append(opened[0].with_version(live))
        else:
            opened.append(open_gallery(gallery, store=store, version=live))
    except ReirError as error:  # the checkpoint of an old version may have been deleted
        problem = str(error)
    wanted = select_canaries(canaries, MAX_CANARIES)
    latencies = latencies_p95_ms(opened, _expressions(wanted))
    found = [
        _answers(store, each, wanted, latency)
        for each, latency in zip(opened, latencies, strict=True)
    ]
    return Measurements(
        changes=compare_versions(store, gallery, live, candidate),
        candidate=found[0],
        live=found[1] if len(found) > 1 else None,
        live_problem=problem,
        # Not by the name of the encoder: one checkpoint can be named in several ways.
        is_same_model=replace(specs[live], encoder="") == replace(specs[candidate], encoder=""),
    )


def measure_version(
    store: InstanceStore, gallery: Gallery, canaries: Sequence[Canary]
) -> VersionAnswers:
    """Measure one version alone."""
    wanted = select_canaries(canaries, MAX_CANARIES)
    (latency,) = latencies_p95_ms([gallery], _expressions(wanted))
    return _answers(store, gallery, wanted, latency)


def _answers(
    store: InstanceStore, gallery: Gallery, canaries: Sequence[Canary], latency_p95_ms: float
) -> VersionAnswers:
    version = gallery.refresh()
    known, lost = resolve_canaries(store, gallery.name, version, canaries)
    expressions = _expressions([*known])[:RECALL_EXPRESSIONS]
    vectors = gallery.encode_expressions(expressions)
    recall = search_recall(store, gallery.name, version, vectors)
    return VersionAnswers(
        version=version,
        answers=tuple(ask_canaries(gallery, known)),
        lost=tuple(lost),
        recall=float(np.mean(recall)),
        latency_p95_ms=latency_p95_ms,
    )


def latencies_p95_ms(galleries: Sequence[Gallery], expressions: Sequence[str]) -> list[float]:
    """Return the 95th percentile over expressions of the time of a search, in each gallery.

    The galleries take turns, and the time of an expression is the median of several searches. So
    other work of the machine slows all galleries alike, and a short stall does not count.
    """
    expressions = expressions[:TIMED_EXPRESSIONS]
    for gallery in galleries:  # the first searches read the version into memory
        gallery.search_batch(expressions[:2])
    times_ms = np.zeros((len(galleries), TIMED_ROUNDS, len(expressions)))
    for number in range(TIMED_ROUNDS):
        for place, expression in enumerate(expressions):
            # Whoever searches first finds the caches of the CPU cold, so that alternates, too.
            turns = [*enumerate(galleries)][:: 1 if (number + place) % 2 else -1]
            for turn, gallery in turns:
                started_s = time.perf_counter()
                gallery.search(expression)
                times_ms[turn, number, place] = 1e3 * (time.perf_counter() - started_s)
    return [float(np.percentile(np.median(each, axis=0), 95)) for each in times_ms]


def _expressions(canaries: Sequence[Canary]) -> list[str]:
    return list(dict.fromkeys(each.expression for each in canaries)) or [*GENERIC_EXPRESSIONS]
