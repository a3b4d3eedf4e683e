"""The cap on the answers of a user, and what is left of feedback after both guards."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pytest

from reir.operations.feedback import Feedback
from reir.operations.feedback.agreement import agree
from reir_training.finetune.trust import cap_of, trusted

A, B = (0.1, 0.1, 0.5, 0.5), (0.6, 0.6, 0.9, 0.9)
NOW = datetime(2026, 11, 25, tzinfo=UTC)


def said(user: str, expression: str, minute: int = 0, **more: Any) -> Feedback:
    values = {"verdict": "right", "uri": "p", "box": A, **more}
    return Feedback(
        user=user, expression=expression, time=NOW + timedelta(minutes=minute), **values
    )


@pytest.mark.parametrize(
    ("num_answers", "cap"),
    [
        ([], 0),
        ([500], 500),  # there is nobody to protect from a single user
        ([100, 100], 100),
        ([100, 100, 100], 100),
        ([1000, 10], 10),
        ([100] * 5, 100),
        ([1000, 25, 25, 25, 25], 33),  # 33 of 133
        ([1000, 1000, 10, 10, 10, 10], 20),
    ],
)
def test_nobody_has_more_than_a_share_of_what_counts(num_answers: list[int], cap: int) -> None:
    assert cap_of(num_answers, max_share=0.25, min_cap=0) == cap
    assert cap_of(num_answers, max_share=0.25, min_cap=20) == max(20, cap)


@pytest.mark.parametrize("seed", range(20))
def test_the_cap_is_the_largest_that_keeps_to_the_share(seed: int) -> None:
    rng = np.random.default_rng(seed)
    numbers = rng.integers(1, 200, rng.integers(1, 8)).tolist()
    share = max(0.25, 1 / len(numbers))
    allowed = [
        cap
        for cap in range(max(numbers) + 1)
        if cap <= share * sum(min(each, cap) for each in numbers) + 1e-6
    ]
    assert cap_of(numbers, max_share=0.25, min_cap=0) == max(allowed)


def test_the_newest_answers_count() -> None:
    """A user whom nobody can check gives most of the answers."""
    feedback = [said("bad", f"bad {n}", minute=n) for n in range(200)]
    feedback += [said(f"u{n % 4}", f"good {n}", minute=200 + n) for n in range(80)]
    found = trusted(feedback)
    assert found.cap == 26  # of 106
    (bad,) = [each for each in found.users if each.user == "bad"]
    assert (bad.decision, bad.answers, bad.left_out) == ("capped", 200, 174)
    kept = [each.expression for each in found.feedback if each.user == "bad"]
    assert kept == [f"bad {n}" for n in range(174, 200)]
    assert found.left_out("capped") == 174
    assert len(found.feedback) == 106
    # A replaced verdict does not come back if the one that replaced it is too old.
    again = [said("bad", "bad 0", minute=-1, box=B), *feedback]
    assert trusted(again).feedback == found.feedback
    assert trusted(feedback, max_share=1).feedback == tuple(feedback)


def test_what_outliers_say_is_left_out_but_not_what_others_say_too() -> None:
    users = ["u0", "u1", "u2"]
    feedback = [said(user, f"{user} {n}", n) for n in range(6) for user in users]
    feedback += [said("bad", f"{user} {n}", 10 + n, box=B) for n in range(6) for user in users]
    feedback += [said("bad", "alone", 20), said("bad", "shared", 20), said("u0", "shared", 21)]
    found = trusted(feedback)
    (bad,) = [each for each in found.users if each.decision == "outlier"]
    assert (bad.user, bad.answers, bad.left_out) == ("bad", 20, 20)
    assert bad.to_dict()["contradicted"] == 18
    agreed = {
        answer.newest.expression: answer.newest.box for answer in agree(found.feedback).answers
    }
    assert agreed == {**{f"{user} {n}": A for n in range(6) for user in users}, "shared": A}
    assert {each.decision for each in found.users if each.user != "bad"} == {"kept"}


def test_users_without_answers_are_listed() -> None:
    feedback = [said("u", "mug"), said("", "cat", verdict="absent", uri="", box=None)]
    users = {each.user: each for each in trusted(feedback).users}
    assert (users[""].answers, users[""].decision, users[""].left_out) == (0, "kept", 0)
    assert trusted(feedback).feedback == tuple(feedback)
