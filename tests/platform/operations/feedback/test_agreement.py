"""Which answers of users count: the newest of each, and what most of them say."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from reir.operations.feedback import Feedback
from reir.operations.feedback.agreement import Agreement, agree

A, NEAR_A, B = (0.1, 0.1, 0.5, 0.5), (0.12, 0.1, 0.5, 0.5), (0.6, 0.6, 0.9, 0.9)
NOW = datetime(2026, 11, 24, tzinfo=UTC)


def said(text: str) -> list[Feedback]:
    """Return feedback in the order of time: "USER VERDICT PHOTO BOX" in each line."""
    boxes = {"A": A, "a": NEAR_A, "B": B}
    found = []
    for number, line in enumerate(text.strip().splitlines()):
        user, verdict, *about = line.split()
        place: dict[str, Any] = {}
        if about:
            place = {"uri": about[0], "image_id": about[0], "box": boxes[about[1]]}
        found.append(
            Feedback(
                expression="the Mug" if number % 2 else "the mug",
                verdict=verdict,  # type: ignore[arg-type]
                user=user,
                time=NOW + timedelta(minutes=number),
                **place,
            )
        )
    return found


def outcome(agreement: Agreement) -> list[tuple[str, Any, int, int]]:
    return [
        (each.newest.uri, each.newest.box, each.num_for, each.num_against)
        for each in agreement.answers
    ]


@pytest.mark.parametrize(
    ("text", "answers", "left_out"),
    [
        ("u right p A", [("p", A, 1, 0)], {}),
        ("u box p B", [("p", B, 1, 0)], {}),
        ("u right p A\nu wrong p A", [], {"replaced": 1, "wrong": 1}),
        ("u wrong p A\nu right p A", [("p", A, 1, 0)], {"replaced": 1}),
        ("u wrong p A\nu box p B", [("p", B, 1, 0)], {"wrong": 1}),
        ("u right p A\nu box p B", [("p", B, 1, 0)], {"replaced": 1}),
        ("u right p A\nu right q A", [("p", A, 1, 0), ("q", A, 1, 0)], {}),
        ("u right p A\nu absent", [], {"replaced": 1, "absent": 1}),
        ("u absent\nu right p A", [("p", A, 1, 0)], {"replaced": 1}),
        ("u absent\nu absent", [], {"replaced": 1, "absent": 1}),
        ("u right p A\nv absent", [("p", A, 1, 0)], {"absent": 1}),
        ("u right p A\nv right p a", [("p", NEAR_A, 2, 0)], {}),
        ("u right p A\nv wrong p A", [], {"outvoted": 1, "wrong": 1}),
        ("u right p A\nv box p B", [], {"outvoted": 2}),
        ("u right p A\nv box p B\nw box p a", [("p", NEAR_A, 2, 1)], {"outvoted": 1}),
        ("u right p A\nv wrong p a\nw right p A", [("p", A, 2, 1)], {"wrong": 1}),
        ("u right p A\nv wrong p B", [("p", A, 1, 0)], {"wrong": 1}),
        ("u right p A\nv wrong q A", [("p", A, 1, 0)], {"wrong": 1}),
        # Whoever says the same again and again still has one vote.
        ("u box p B\nu box p B\nu box p B\nv right p A\nw right p A", [("p", A, 2, 1)], None),
    ],
)
def test_conflicts(text: str, answers: Any, left_out: dict[str, int] | None) -> None:
    feedback = said(text)
    agreement = agree(feedback)
    assert outcome(agreement) == answers
    if left_out is not None:
        assert agreement.left_out == left_out
    assert agreement.num_used + sum(agreement.left_out.values()) == len(feedback)


def test_expressions_and_tenants_are_told_apart() -> None:
    feedback = [
        Feedback(expression=text, verdict="right", uri="p", box=box, tenant=tenant, time=NOW)
        for text, box, tenant in (("one", A, ""), ("two", B, ""), ("one", A, "acme"))
    ]
    agreement = agree(feedback)
    assert sorted((each.newest.expression, each.num_for) for each in agreement.answers) == [
        ("one", 2),
        ("two", 1),
    ]
