"""Outliers among users: who is found, who is not, and the test by its definition."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import pytest
from scipy.stats import binom

from reir.datasets.dataset import ReferringDataset
from reir.operations.feedback import Feedback
from reir.operations.feedback.agreement import User
from reir.operations.feedback.records import user_of
from reir_testing.feedback.simulated_users import (
    Manner,
    SimulatedUser,
    simulate_feedback,
    users_with_hostile,
)
from reir_testing.scenes import make_scenes, to_dataset
from reir_training.finetune.reliability import (
    EXPECTED_RATE,
    LEVEL,
    Comparison,
    compare,
    standings,
)

A, B = (0.1, 0.1, 0.5, 0.5), (0.6, 0.6, 0.9, 0.9)


@pytest.fixture(scope="module")
def scenes() -> ReferringDataset:
    return to_dataset(make_scenes(60, 0), per_instance=1)


def simulated(
    dataset: ReferringDataset, users: list[SimulatedUser], num: int, seed: int = 0
) -> list[Feedback]:
    uris = {each.image_id: f"file:///{each.image_id}" for each in dataset.images}
    return simulate_feedback(dataset, uris, users, num, seed)


def outliers(feedback: Iterable[Feedback]) -> set[str]:
    found = standings(list(compare(feedback)))
    return {user for (_, user), standing in found.items() if standing.is_outlier}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("manner", ["shifted", "random"])
def test_one_hostile_user_among_five_is_found(
    scenes: ReferringDataset, manner: Manner, seed: int
) -> None:
    feedback = simulated(scenes, users_with_hostile(5, manner), 250, seed)
    assert outliers(feedback) == {user_of("hostile")}


@pytest.mark.parametrize("seed", range(10))
def test_honest_users_with_errors_are_kept(scenes: ReferringDataset, seed: int) -> None:
    users = [SimulatedUser(f"user {number}") for number in range(5)]
    assert outliers(simulated(scenes, users, 500, seed)) == set()


def test_somebody_who_errs_alone_is_kept(scenes: ReferringDataset) -> None:
    """The others never contradict each other, but one of ten errors is expected of anybody."""
    users = [*(SimulatedUser(f"user {n}", error=0) for n in range(4)), SimulatedUser("last")]
    feedback = simulated(scenes, users, 500)
    found = standings(list(compare(feedback)))
    assert found["", user_of("last")].contradicted > 0
    assert outliers(feedback) == set()


def said(
    user: str, expression: str, box: tuple[float, float, float, float], **more: str
) -> Feedback:
    values = {"verdict": "right", "uri": "p", **more}
    return Feedback(user=user, expression=expression, box=box, **values)  # type: ignore[arg-type]


def test_between_two_users_nobody_is_an_outlier() -> None:
    feedback = [said(user, f"{n}", box) for n in range(30) for user, box in (("u", A), ("v", B))]
    assert outliers(feedback) == set()


def test_nobody_can_frame_another_user() -> None:
    """The attacker contradicts all that the victim says, and the victim errs once besides."""
    feedback = [said(user, f"{n}", box) for n in range(30) for user, box in (("v", A), ("bad", B))]
    feedback += [said(user, f"v{n}", A) for n in range(6) for user in ("v", "u")]
    feedback += [said("v", "error", B), said("u", "error", A)]
    feedback += [said(user, f"u{n}", A) for n in range(30) for user in ("u", "w")]
    assert outliers(feedback) == set()
    # Contradicted by a third user as well, it is the attacker who is found.
    feedback += [said(user, f"w{n}", box) for n in range(8) for user, box in (("w", A), ("bad", B))]
    assert outliers(feedback) == {"bad"}


def test_calling_everything_wrong_is_found() -> None:
    users = [f"u{number}" for number in range(4)]
    feedback = [said(user, f"{user} {n}", A) for user in users for n in range(5)]
    feedback += [said("bad", f"{user} {n}", A, verdict="wrong") for user in users for n in range(5)]
    assert outliers(feedback) == {"bad"}


def test_answers_in_other_photos_are_compared() -> None:
    one, other = said("u", "mug", A), said("v", "mug", A, uri="q")
    assert {each.user[1]: dict(each.votes) for each in compare([one, other])} == {
        "u": {("", "v"): -1},
        "v": {("", "u"): -1},
    }
    # They agree on one photo, so a second right photo contradicts nobody.
    both = [one, other, said("v", "mug", A)]
    assert [(e.user[1], dict(e.votes)) for e in compare(both)] == [
        ("u", {("", "v"): 1}),
        ("v", {}),
        ("v", {("", "u"): 1}),
    ]


def count(votes: Iterable[Mapping[User, int]], without: set[User]) -> tuple[int, int]:
    """Return how many verdicts are compared and contradicted, without the votes of some users."""
    sums = [sum(vote for user, vote in each.items() if user not in without) for each in votes]
    return sum(each != 0 for each in sums), sum(each < 0 for each in sums)


def slow_p_value(user: User, comparisons: list[Comparison], gone: set[User]) -> float:
    own = [each.votes for each in comparisons if each.user == user]
    others = [e.votes for e in comparisons if e.user != user and e.user not in gone]
    compared, contradicted = count(others, gone | {user})
    rate = max(EXPECTED_RATE, contradicted / compared if compared else 0)
    accusers = {voter for votes in own for voter in votes} - gone
    values = []
    for without in (set[User](), *({accuser} for accuser in accusers)):
        num, bad = count(own, gone | without)
        values.append(float(binom.sf(bad - 1, num, rate)))
    return max(values)


@pytest.mark.parametrize("seed", range(6))
def test_standings_are_those_of_the_definition(seed: int) -> None:
    rng = np.random.default_rng(seed)
    users = [("", f"u{number}") for number in range(6)]
    hostile = users[: seed % 3]
    comparisons = []
    for _ in range(200):
        owner = users[rng.integers(6)]
        votes = {}
        for voter in users:
            if voter != owner and rng.random() < 0.4:
                is_against = rng.random() < (0.9 if {owner, voter} & {*hostile} else 0.15)
                votes[voter] = -1 if is_against else 1
        comparisons.append(Comparison(owner, votes))
    gone: set[User] = set()
    while True:
        values = {u: slow_p_value(u, comparisons, gone) for u in users if u not in gone}
        worst = min(values, key=values.__getitem__)
        if values[worst] * len(users) > LEVEL:
            break
        gone.add(worst)
    found = standings(comparisons)
    assert {user for user, standing in found.items() if standing.is_outlier} == gone
    assert gone >= {*hostile}
    for user, value in values.items():
        assert found[user].p_value == pytest.approx(value, rel=1e-9)
        own = [each.votes for each in comparisons if each.user == user]
        assert (found[user].compared, found[user].contradicted) == count(own, gone)
