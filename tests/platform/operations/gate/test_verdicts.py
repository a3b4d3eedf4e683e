"""Verdicts: which candidates pass, and what the report says."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from reir.config import load_config
from reir.errors import ConfigError
from reir.images.decode import canonical_uri
from reir.operations.canary import Canary, CanaryAnswer
from reir.operations.gate.changes import VersionChanges, VersionSize
from reir.operations.gate.measure import Measurements, VersionAnswers
from reir.operations.gate.page import format_value, report_page
from reir.operations.gate.verdicts import MAX_EXAMPLES, GateCheck, GateLimits, GateReport, judge
from reir.results import Hit, SearchResult
from reir.store.validation import MAX_DOCUMENT_BYTES

PRESENT = [Canary(expression=f"object {n}", uri=f"file:///{n}.jpg") for n in range(40)]
ABSENT = [Canary(expression=f"nothing {n}", absent=True) for n in range(20)]
SIZE = VersionSize(photos=1000, failed=10, instances=9900)


def answer(canary: Canary, rank: int = 0, *, found: bool = True, presence: float) -> CanaryAnswer:
    hit = Hit(
        instance_id="i#0",
        image_id="i",
        uri="file:///wrong.jpg",
        box=(0.1, 0.1, 0.5, 0.5),
        score=0.5,
        objectness=1.0,
    )
    result = SearchResult(
        expression=canary.expression,
        gallery="g",
        version="v",
        hits=(hit,),
        timings_ms={},
        presence=presence,
        found=found,
    )
    return CanaryAnswer(canary=canary, rank=rank, result=result)


def version(
    name: str = "v", *, first: int = 20, ten: int = 30, recognized: int = 10, **changes: Any
) -> VersionAnswers:
    """A version that gets the first `first` canaries right at rank 1, and `ten` within ten."""
    answers = [
        answer(each, 1 if n < first else 4 if n < ten else 0, presence=0.94)
        for n, each in enumerate(PRESENT)
    ]
    answers += [answer(each, found=n >= recognized, presence=0.06) for n, each in enumerate(ABSENT)]
    values: dict[str, Any] = {
        "version": name,
        "answers": tuple(answers),
        "lost": (),
        "recall": 1.0,
        "latency_p95_ms": 10.0,
    }
    return VersionAnswers(**(values | changes))


CHANGES = VersionChanges(live=SIZE, candidate=SIZE, lost=0, added=0, compared=100, changed=0)
MEASURED = Measurements(
    changes=CHANGES,
    candidate=version("new"),
    live=version("old"),
    live_problem="",
    is_same_model=False,
)


def report(limits: GateLimits | None = None, **changes: Any) -> GateReport:
    measured = replace(MEASURED, **changes)
    return judge("g", "old", "new", measured, limits or GateLimits())


def failures(limits: GateLimits | None = None, **changes: Any) -> list[str]:
    return [check.name for check in report(limits, **changes).failed_checks]


def size(**changes: int) -> VersionChanges:
    return replace(CHANGES, candidate=replace(SIZE, **changes))


def test_an_equal_candidate_passes() -> None:
    found = report()
    assert found.passed
    assert {check.verdict for check in found.checks} == {"passed", "info"}
    assert [check.name for check in found.checks] == [
        "photos",
        "lost photos",
        "failed photos",
        "instances per photo",
        "photos with other instances",
        "canaries with a known answer",
        "BR@1 of canaries",
        "BR@10 of canaries",
        "recognized absent canaries",
        "calibration error of presence",
        "AUROC of presence",
        "recall@10 of the store's search",
        "95th percentile of the time of a search",
    ]


@pytest.mark.parametrize(
    ("changes", "failed"),
    [
        ({"changes": replace(CHANGES, lost=11)}, ["lost photos"]),
        ({"changes": replace(CHANGES, lost=9)}, []),
        ({"changes": size(failed=21)}, ["failed photos"]),
        ({"changes": size(instances=4000)}, ["instances per photo"]),
        ({"changes": size(instances=20_000)}, ["instances per photo"]),
        ({"candidate": version(first=8)}, ["BR@1 of canaries"]),
        ({"candidate": version(first=19)}, []),
        ({"candidate": version(ten=20)}, ["BR@10 of canaries"]),
        ({"candidate": version(recognized=1)}, ["recognized absent canaries"]),
        ({"candidate": version(recall=0.98)}, ["recall@10 of the store's search"]),
        (
            {"candidate": version(latency_p95_ms=15.2)},
            ["95th percentile of the time of a search"],
        ),
        ({"candidate": version(latency_p95_ms=14.9)}, []),
        ({"changes": replace(CHANGES, changed=50)}, []),
        (
            {"changes": replace(CHANGES, changed=3), "is_same_model": True},
            ["photos with other instances"],
        ),
        ({"changes": replace(CHANGES, changed=2), "is_same_model": True}, []),
    ],
)
def test_what_breaks_a_limit_is_named(changes: dict[str, Any], failed: list[str]) -> None:
    assert failures(**changes) == failed


def test_a_better_candidate_passes() -> None:
    better = version(first=40, ten=40, recognized=20, latency_p95_ms=1.0)
    assert failures(candidate=better) == []


def test_lost_canaries_count_as_wrong() -> None:
    kept = tuple(each for each in version().answers if each.canary not in PRESENT[:15])
    lost = version(answers=kept, lost=tuple(PRESENT[:15]))
    found = report(candidate=lost)
    check = next(each for each in found.checks if each.name == "BR@1 of canaries")
    assert (check.live, check.candidate, check.verdict) == (0.5, 5 / 40, "failed")
    assert len(found.lost) == 15


def test_a_small_drop_within_the_standard_error_passes() -> None:
    """Five of 40 lost and four won: one in 40 is 2.5%, but nobody can tell it from none."""
    won = {*range(20, 24)}
    answers = [
        replace(each, rank=1 if (5 <= n < 20 or n in won) else 0) if n < 40 else each
        for n, each in enumerate(version().answers)
    ]
    limits = GateLimits(br10_drop=1)
    assert failures(limits, candidate=version(answers=tuple(answers))) == []


def test_another_model_needs_canaries() -> None:
    none = version(answers=())
    found = report(candidate=none, live=none)
    assert [check.name for check in found.failed_checks] == ["canaries with a known answer"]
    assert "reir canary add" in found.failed_checks[0].note
    assert failures(candidate=none, live=none, is_same_model=True) == []
    assert failures(GateLimits(min_canaries=0), candidate=none, live=none) == []


def test_poorly_calibrated_presence_fails() -> None:
    answers = tuple(
        replace(each, result=replace(each.result, presence=0.9)) for each in version().answers
    )
    assert failures(candidate=version(answers=answers)) == [
        "calibration error of presence",
        "AUROC of presence",
    ]


def without_presence(name: str) -> VersionAnswers:
    """A version of a model without a calibration."""
    answers = (
        replace(each, result=replace(each.result, presence=None)) for each in version().answers
    )
    return version(name, answers=tuple(answers))


def presence_check(found: GateReport) -> GateCheck:
    (check,) = [each for each in found.checks if each.name == "calibration error of presence"]
    return check


def test_a_model_that_loses_the_calibration_must_be_accepted_explicitly() -> None:
    found = report(candidate=without_presence("new"))
    assert failures(candidate=without_presence("new")) == ["calibration error of presence"]
    assert "--limit presence_ece=1" in presence_check(found).note
    assert report(GateLimits(presence_ece=1), candidate=without_presence("new")).passed


def test_the_report_says_that_presence_was_not_measured() -> None:
    found = report(live=without_presence("old"), candidate=without_presence("new"))
    assert found.passed
    assert presence_check(found).verdict == "info"
    assert "not measured" in presence_check(found).note


def test_a_live_version_that_cannot_be_asked_is_no_reason_to_fail() -> None:
    found = report(live=None, live_problem="the checkpoint was deleted")
    assert found.passed
    check = next(each for each in found.checks if each.name == "BR@1 of canaries")
    assert check.verdict == "info"
    assert "the checkpoint was deleted" in check.note


def test_limits_are_read_from_files_and_options(tmp_path: Path) -> None:
    path = tmp_path / "limits.yaml"
    path.write_text("lost_photos: 0.05\nrecall: 0.9\n")
    limits = load_config(GateLimits, path, ["recall=0.95"])
    assert (limits.lost_photos, limits.recall) == (0.05, 0.95)
    with pytest.raises(ConfigError, match="unknown key 'lost_photo'; did you mean 'lost_photos'"):
        load_config(GateLimits, None, ["lost_photo=0.1"])
    with pytest.raises(ConfigError, match=r"'recall': got 2"):
        load_config(GateLimits, None, ["recall=2"])


# -------------------------------------------------------------------------------------- the report


def test_a_report_fits_into_a_document() -> None:
    long = [replace(each, expression=f"{each.expression} {'long ' * 40}") for each in PRESENT * 5]
    answers = [answer(each, 1, presence=0.5) for each in long]
    worse = [answer(each, 0, presence=0.5) for each in long]
    found = report(live=version(answers=tuple(answers)), candidate=version(answers=tuple(worse)))
    assert len(found.lost) == MAX_EXAMPLES
    assert len(json.dumps(found.to_dict())) < MAX_DOCUMENT_BYTES


def test_the_page_has_every_number_and_the_photos(tmp_path: Path) -> None:
    photo = tmp_path / "a <b>.jpg"
    Image.new("RGB", (300, 200), (200, 30, 30)).save(photo)
    shown = Canary(
        expression="<script>alert(1)</script>", uri=canonical_uri(photo), box=(0.1, 0.1, 0.6, 0.9)
    )
    found = report(
        live=version(answers=(answer(shown, 1, presence=0.5),)),
        candidate=version(answers=(answer(shown, 0, presence=0.5),)),
    )
    page = report_page(found)
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert page.count("data:image/jpeg;base64,") == 1
    assert "wrong.jpg (missing" in page  # the wrong hit has no file
    for check in found.checks:
        assert check.name.replace("'", "&#x27;") in page
        assert format_value(check, check.candidate) in page
    assert "refused" in page
    assert not re.search(r"(src|href)=\"(?!data:)", page), "the page must not load anything"


def test_values_have_units() -> None:
    def shown(value: float | None, unit: str = "") -> str:
        check = GateCheck(name="", live=None, candidate=value, limit="", verdict="info", unit=unit)
        return format_value(check, value)

    assert shown(None) == ""
    assert shown(0.123, "share") == "12.3%"
    assert shown(12.34, "ms") == "12.3 ms"
    assert shown(12_345.0) == "12,345"
    assert shown(0.98765) == "0.988"
