"""Finds users whose feedback the others contradict far more often than they contradict each other.

A verdict is compared if other users say something about the same expression; it is contradicted if
more of them are against it than for it. Somebody is also against an answer who finds the object in
other photos only, unless the two users have an answer to the expression in common.

Outliers are found by a one-sided binomial test of the number of contradicted verdicts, in which

* the expected rate is that of the other users among themselves, and at least `EXPECTED_RATE`;
* the verdicts are judged without one of the other users, namely the one without whom they look
  best. So no single user can make an outlier of another, and between two users nobody is one;
* the level is `LEVEL` for all compared users together (Bonferroni);
* the clearest outlier is taken out, and the others are tested again without it, because its wrong
  answers have contradicted theirs.

This assumes that most users mean well. The model is no witness: feedback is worth most where the
model is wrong.
"""

# Shapes: counts (2,), numbers of compared and of contradicted verdicts

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy.special import bdtrc

from reir.operations.feedback import Feedback
from reir.operations.feedback.agreement import User, Voice, voices_of

EXPECTED_RATE = 0.2
"""Two users who are wrong in one of ten cases contradict each other in about one of five."""
LEVEL = 0.01
"""Probability that any user who errs no more often than that is taken for an outlier."""

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Comparison:
    """A verdict with a box, and what other users think of it.

    Attributes:
        user: whose verdict it is.
        votes: other user -> 1 for it, -1 against it.
    """

    user: User
    votes: Mapping[User, int]

    def counts(self, without: User | None = None) -> Counts:
        """Judge the verdict by the other users, or by all but one of them."""
        balance = sum(vote for user, vote in self.votes.items() if user != without)
        return np.array([balance != 0, balance < 0], dtype=np.int64)

    def among(self, outliers: set[User]) -> Comparison:
        """Return it without the votes of some users."""
        return replace(self, votes={u: vote for u, vote in self.votes.items() if u not in outliers})


@dataclass(frozen=True)
class Standing:
    """How reliable a user is.

    Attributes:
        compared, contradicted: number of verdicts, without the votes of outliers found before.
        p_value: probability of as many contradicted verdicts by chance.
        is_outlier: whether the feedback of this user should be left out.
    """

    compared: int = 0
    contradicted: int = 0
    p_value: float = 1.0
    is_outlier: bool = False


def compare(feedback: Iterable[Feedback]) -> Iterator[Comparison]:
    """Yield the final verdicts of all users, compared with what the others say.

    Args:
        feedback: about one gallery, in the order of time.
    """
    for voices in voices_of(feedback).values():
        for user, own in voices.items():
            others = {other: voice for other, voice in voices.items() if other != user}
            # Who finds the object in a box speaks against somebody who calls that box wrong.
            for sign, verdicts in ((1, own.answers), (-1, own.wrongs)):
                for said in verdicts.values():
                    votes = {other: sign * _vote(v, said, own) for other, v in others.items()}
                    yield Comparison(user, {other: vote for other, vote in votes.items() if vote})


def _vote(voice: Voice, said: Feedback, own: Voice) -> int:
    """Return whether a user is for (1) or against (-1) the place in another user's verdict."""
    vote = voice.vote(said)
    if vote or not voice.answers:
        return vote
    have_one_in_common = any(own.vote(answer) == 1 for answer in voice.answers.values())
    return 0 if have_one_in_common else -1


def standings(comparisons: Sequence[Comparison]) -> dict[User, Standing]:
    """Return how reliable each user is who gave a verdict with a box."""
    left = list(comparisons)
    outliers: dict[User, Standing] = {}
    while tested := _test(left):
        user, worst = min(tested.items(), key=lambda item: item[1].p_value)
        # The level is for all compared users together, and outliers of earlier rounds are some of
        # them.
        num_compared = sum(each.compared > 0 for each in tested.values()) + len(outliers)
        # If nobody was ever compared, the product is 0, which would pass for a clear outlier.
        if worst.compared == 0 or worst.p_value * num_compared > LEVEL:
            break
        outliers[user] = replace(worst, is_outlier=True)
        left = [each.among({user}) for each in left if each.user != user]
    return tested | outliers


def _test(comparisons: Iterable[Comparison]) -> dict[User, Standing]:
    """Test each user once."""
    own: dict[User, Counts] = defaultdict(_zero)
    influence: dict[User, Counts] = defaultdict(_zero)
    without: dict[User, dict[User, Counts]] = defaultdict(lambda: defaultdict(_zero))
    total = _zero()
    for each in comparisons:
        counts = each.counts()
        own[each.user] += counts
        total += counts
        for voter in each.votes:
            # What changes without the votes of this voter: for the author of the verdict, and for
            # the sum over all users.
            change = each.counts(without=voter) - counts
            without[each.user][voter] += change
            influence[voter] += change
    found = {}
    for user, counts in own.items():
        # The other users among themselves: without the verdicts of this user, and without its votes
        # on theirs.
        compared, contradicted = total - counts + influence[user]
        rate = max(EXPECTED_RATE, contradicted / compared if compared else 0.0)
        judged = [counts, *(counts + change for change in without[user].values())]
        p_value = max(_p_value(each, rate) for each in judged)
        found[user] = Standing(int(counts[0]), int(counts[1]), p_value)
    return found


def _p_value(counts: Counts, rate: float) -> float:
    """Return the probability of as many contradicted verdicts or more."""
    compared, contradicted = map(int, counts)
    if contradicted == 0 or rate >= 1:
        return 1.0
    # `bdtrc(k, ...)` is the probability of more than k.
    return float(bdtrc(contradicted - 1, compared, rate))


def _zero() -> Counts:
    return np.zeros(2, dtype=np.int64)
