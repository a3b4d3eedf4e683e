"""Judges the measurements of a candidate version: every number, its limit and its verdict."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from pydantic import Field

from reir.config import StrictConfig
from reir.operations.canary import Canary, CanaryAnswer
from reir.operations.gate.measure import MIN_CALIBRATED, Measurements, VersionAnswers
from reir.records import Box

Verdict = Literal["passed", "failed", "info"]
"""`info` is a number without a limit."""

MAX_EXAMPLES = 40
NO_CANARIES = (
    "add some with `reir canary add` or `reir canary make`, or accept an unknown model with "
    "--limit min_canaries=0"
)
NO_CALIBRATION = (
    "the new model has no calibration, so it cannot tell whether an object is in the gallery; fit "
    "one with `reir calibrate`, or accept this with --limit presence_ece=1"
)
TOO_FEW_FOR_PRESENCE = (
    f"not measured: this takes a calibrated model, and {MIN_CALIBRATED} canaries each of objects "
    f"that are in the gallery and of objects that are not"
)
_LATENCY_NOISE_MS = 5.0
"""Latencies that differ by less are equal, whatever their ratio: a search takes some 10 ms."""


class GateLimits(StrictConfig):
    """Limits that a candidate version must keep to become live.

    Attributes:
        lost_photos: largest share of the indexed photos of the live version that the candidate may
            lack.
        more_failures: by how much the share of failed photos may grow.
        min_instances, max_instances: limits of the instances per photo, relative to the live
            version.
        changed_photos: largest share of unchanged photos whose instances may differ, if the
            candidate was built with the same model and settings.
        br1_drop, br10_drop: by how much BR@1 and BR@10 of the canaries may fall, beyond the
            standard error of the difference.
        absent_drop: by how much the share of recognized absent canaries may fall, likewise.
        presence_ece: largest calibration error of the presence.
        presence_auroc_drop: by how much the AUROC of the presence may fall.
        recall: smallest recall@10 of the store's search against an exact scan.
        latency_ratio: largest 95th percentile of the time of a search, relative to the live
            version.
        min_canaries: how many canaries with a known answer are needed to judge another model; 0
            lets a model pass that nothing is known about.
    """

    lost_photos: float = Field(0.01, ge=0, le=1)
    more_failures: float = Field(0.01, ge=0, le=1)
    min_instances: float = Field(0.5, ge=0)
    max_instances: float = Field(2.0, ge=0)
    changed_photos: float = Field(0.02, ge=0, le=1)
    br1_drop: float = Field(0.02, ge=0, le=1)
    br10_drop: float = Field(0.02, ge=0, le=1)
    absent_drop: float = Field(0.1, ge=0, le=1)
    presence_ece: float = Field(0.15, ge=0, le=1)
    presence_auroc_drop: float = Field(0.05, ge=0, le=1)
    recall: float = Field(0.99, ge=0, le=1)
    latency_ratio: float = Field(1.5, gt=0)
    min_canaries: int = Field(20, ge=0)


@dataclass(frozen=True, kw_only=True)
class GateCheck:
    """One number of a report.

    Attributes:
        name: what was measured.
        live, candidate: its value for both versions; None if it was not measured.
        limit: what the candidate must keep, in words; empty for information.
        verdict: whether it did.
        note: what else a reader should know.
        unit: "share", "ms" or "" for a plain number.
    """

    name: str
    live: float | None
    candidate: float | None
    limit: str
    verdict: Verdict
    note: str = ""
    unit: str = ""


@dataclass(frozen=True, kw_only=True)
class CanaryChange:
    """A canary whose first hit is right in one of the two versions only.

    Attributes:
        expression, uri, box: the canary, with its known answer.
        live_rank, candidate_rank: rank of the first right hit, from 1; 0 if it is not among ten.
        wrong_uri, wrong_box: the first hit of the version that is wrong; empty if it has none.
    """

    expression: str
    uri: str
    box: Box | None
    live_rank: int
    candidate_rank: int
    wrong_uri: str = ""
    wrong_box: Box | None = None


@dataclass(frozen=True, kw_only=True)
class GateReport:
    """The judgment of a candidate version.

    Attributes:
        gallery, live, candidate: what was compared.
        created_s: Unix time.
        checks: every number.
        num_lost, num_won: canaries whose first hit is right in the live version only, and in the
            candidate only.
        lost, won: the first `MAX_EXAMPLES` of each.
    """

    gallery: str
    live: str
    candidate: str
    created_s: float
    checks: tuple[GateCheck, ...]
    num_lost: int = 0
    num_won: int = 0
    lost: tuple[CanaryChange, ...] = ()
    won: tuple[CanaryChange, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether the candidate keeps all limits."""
        return not self.failed_checks

    @property
    def failed_checks(self) -> list[GateCheck]:
        """The checks that failed."""
        return [check for check in self.checks if check.verdict == "failed"]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {"passed": self.passed, **asdict(self)}


def report_from(values: Mapping[str, Any]) -> GateReport:
    """Return a report from the values that `GateReport.to_dict` returned."""
    known = {name: value for name, value in values.items() if name != "passed"}
    checks = tuple(GateCheck(**each) for each in known.pop("checks"))
    lost, won = (tuple(map(_change_from, known.pop(name))) for name in ("lost", "won"))
    return GateReport(checks=checks, lost=lost, won=won, **known)


def judge(
    gallery: str, live: str, candidate: str, measured: Measurements, limits: GateLimits
) -> GateReport:
    """Compare what was measured with the limits."""
    judged = _Judge(measured, limits)
    lost, won = _changed_canaries(measured)
    return GateReport(
        gallery=gallery,
        live=live,
        candidate=candidate,
        created_s=time.time(),
        checks=tuple(judged.checks()),
        num_lost=len(lost),
        num_won=len(won),
        lost=tuple(lost[:MAX_EXAMPLES]),
        won=tuple(won[:MAX_EXAMPLES]),
    )


@dataclass
class _Judge:
    """Makes the checks of one report."""

    measured: Measurements
    limits: GateLimits
    _live: VersionAnswers | None = field(init=False)
    _candidate: VersionAnswers = field(init=False)

    def __post_init__(self) -> None:
        self._live, self._candidate = self.measured.live, self.measured.candidate

    def checks(self) -> Iterator[GateCheck]:
        """Yield every check."""
        yield from self._photos()
        yield self._changed_instances()
        yield from self._canaries()
        yield from self._presence()
        yield self._recall()
        yield self._latency()

    def _photos(self) -> Iterator[GateCheck]:
        changes, limits = self.measured.changes, self.limits
        live, candidate = changes.live, changes.candidate
        yield GateCheck(
            name="photos",
            live=live.photos,
            candidate=candidate.photos,
            limit="",
            verdict="info",
            note=f"{changes.added:,} of them are new, not indexed in the live version",
        )
        yield GateCheck(
            name="lost photos",
            live=None,
            candidate=changes.lost_share,
            limit=f"at most {limits.lost_photos:.1%} of the live version's indexed photos",
            verdict=_verdict(changes.lost_share <= limits.lost_photos),
            note=f"{changes.lost:,} photos",
            unit="share",
        )
        yield GateCheck(
            name="failed photos",
            live=live.failed_share,
            candidate=candidate.failed_share,
            limit=f"at most {limits.more_failures:.1%} more",
            verdict=_verdict(candidate.failed_share <= live.failed_share + limits.more_failures),
            note=f"{live.failed:,} and {candidate.failed:,} photos",
            unit="share",
        )
        # Only avoids a division by zero: without live instances, the ratio is not judged.
        ratio = candidate.instances_per_photo / max(live.instances_per_photo, 1e-9)
        yield GateCheck(
            name="instances per photo",
            live=live.instances_per_photo,
            candidate=candidate.instances_per_photo,
            limit=f"{limits.min_instances:g} to {limits.max_instances:g} times as many",
            verdict=_verdict(
                not live.instances or limits.min_instances <= ratio <= limits.max_instances
            ),
        )

    def _changed_instances(self) -> GateCheck:
        changes, limit = self.measured.changes, self.limits.changed_photos
        share = changes.changed_share
        same = self.measured.is_same_model
        return GateCheck(
            name="photos with other instances",
            live=None,
            candidate=share,
            limit=f"at most {limit:.1%}, since model and settings are the same" if same else "",
            verdict=_verdict((share or 0.0) <= limit) if same else "info",
            note=f"{changes.changed:,} of {changes.compared:,} compared photos",
            unit="share",
        )

    def _canaries(self) -> Iterator[GateCheck]:
        limits = self.limits
        known = len(self._candidate.right_within(1))
        needed = 0 if self.measured.is_same_model else limits.min_canaries
        yield GateCheck(
            name="canaries with a known answer",
            live=None,
            candidate=known,
            limit=f"at least {needed} for another model" if needed else "",
            verdict=_verdict(known >= needed) if needed else "info",
            note="" if known >= needed else NO_CANARIES,
        )
        for k, limit in ((1, limits.br1_drop), (10, limits.br10_drop)):
            before = None if self._live is None else self._live.right_within(k)
            now = self._candidate.right_within(k)
            yield from self._drop(f"BR@{k} of canaries", before, now, limit)
        before = None if self._live is None else self._live.recognized()
        now = self._candidate.recognized()
        yield from self._drop("recognized absent canaries", before, now, limits.absent_drop)

    def _drop(
        self,
        name: str,
        before: Mapping[Canary, bool] | None,
        now: Mapping[Canary, bool],
        limit: float,
    ) -> Iterator[GateCheck]:
        """Judge the drop of a share of canaries; both versions were asked the same ones."""
        if not now:
            return
        share = float(np.mean([*now.values()]))
        if not before:
            problem = self.measured.live_problem
            note = f"the live version cannot be asked: {problem}" if problem else ""
            yield GateCheck(
                name=name,
                live=None,
                candidate=share,
                limit="",
                verdict="info",
                note=note,
                unit="share",
            )
            return
        # Of pairs: canaries that are hard for both versions cancel out, so their spread does not
        # hide a small drop.
        drops = [float(before[each]) - float(now[each]) for each in before.keys() & now.keys()]
        drop, error = float(np.mean(drops)), float(np.std(drops)) / len(drops) ** 0.5
        yield GateCheck(
            name=name,
            live=float(np.mean([*before.values()])),
            candidate=share,
            limit=f"at most {limit:.1%} lower, beyond the standard error",
            verdict=_verdict(drop - error <= limit),
            note=f"standard error of the difference {error:.1%}",
            unit="share",
        )

    def _presence(self) -> Iterator[GateCheck]:
        ece, area = self._candidate.presence_ece, self._candidate.presence_auroc
        before = None if self._live is None else self._live.presence_ece
        limit = self.limits.presence_ece
        if ece is None or area is None:
            # A model without calibration cannot say any more that an object is not there.
            is_lost = before is not None
            yield GateCheck(
                name="calibration error of presence",
                live=before,
                candidate=None,
                limit=f"at most {limit:g}" if is_lost else "",
                # No error exceeds 1, so this limit says that no calibration is needed.
                verdict=_verdict(limit >= 1) if is_lost else "info",
                note=NO_CALIBRATION if is_lost else TOO_FEW_FOR_PRESENCE,
            )
            return
        yield GateCheck(
            name="calibration error of presence",
            live=before,
            candidate=ece,
            limit=f"at most {limit:g}",
            verdict=_verdict(ece <= limit),
        )
        area_before = None if self._live is None else self._live.presence_auroc
        limit = self.limits.presence_auroc_drop
        yield GateCheck(
            name="AUROC of presence",
            live=area_before,
            candidate=area,
            limit=f"at most {limit:g} lower",
            verdict=_verdict(area_before is None or area >= area_before - limit),
        )

    def _recall(self) -> GateCheck:
        return GateCheck(
            name="recall@10 of the store's search",
            live=None if self._live is None else self._live.recall,
            candidate=self._candidate.recall,
            limit=f"at least {self.limits.recall:g}",
            verdict=_verdict(self._candidate.recall >= self.limits.recall),
        )

    def _latency(self) -> GateCheck:
        now, limit = self._candidate.latency_p95_ms, self.limits.latency_ratio
        before = None if self._live is None else self._live.latency_p95_ms
        is_slow = before is not None and now > max(limit * before, before + _LATENCY_NOISE_MS)
        return GateCheck(
            name="95th percentile of the time of a search",
            live=before,
            candidate=now,
            limit=f"at most {limit:g} times that of the live version",
            verdict=_verdict(not is_slow),
            unit="ms",
        )


def _verdict(is_kept: bool) -> Verdict:
    return "passed" if is_kept else "failed"


def _changed_canaries(measured: Measurements) -> tuple[list[CanaryChange], list[CanaryChange]]:
    """Return the canaries that only the live version gets right, and those that only the other."""
    if measured.live is None:
        return [], []
    before, now = _by_canary(measured.live), _by_canary(measured.candidate)
    lost: list[CanaryChange] = []
    won: list[CanaryChange] = []
    for canary in sorted(before.keys() & now.keys(), key=lambda each: each.expression):
        was_right, is_right = _rank(before[canary]) == 1, _rank(now[canary]) == 1
        if was_right and not is_right:
            lost.append(_change(canary, before[canary], now[canary], wrong=now[canary]))
        elif is_right and not was_right:
            won.append(_change(canary, before[canary], now[canary], wrong=before[canary]))
    return lost, won


def _change_from(values: Mapping[str, Any]) -> CanaryChange:
    # JSON has lists, but a report that was read should equal the one that was written.
    boxes = {name: tuple(values[name]) for name in ("box", "wrong_box") if values[name]}
    return CanaryChange(**{**values, **boxes})


def _by_canary(answers: VersionAnswers) -> dict[Canary, CanaryAnswer | None]:
    """Return the answer to each canary with a known answer; None if its photo is lost."""
    found = {each.canary: each for each in answers.answers if each.canary.is_present}
    return {**dict.fromkeys(answers.lost), **found}


def _rank(answer: CanaryAnswer | None) -> int:
    return 0 if answer is None else answer.rank


def _change(
    canary: Canary,
    before: CanaryAnswer | None,
    now: CanaryAnswer | None,
    wrong: CanaryAnswer | None,
) -> CanaryChange:
    first = wrong.result[0] if wrong is not None and len(wrong.result) else None
    return CanaryChange(
        expression=canary.expression,
        uri=canary.uri,
        box=canary.box,
        live_rank=_rank(before),
        candidate_rank=_rank(now),
        wrong_uri=first.uri if first else "",
        wrong_box=first.box if first else None,
    )
