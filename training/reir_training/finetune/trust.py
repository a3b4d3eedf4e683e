"""Whose feedback a fine-tune learns from, so that no single user can move the model.

Two guards, before `reir.operations.feedback.agreement` counts the votes:

* All feedback of outliers is left out; see `reir_training.finetune.reliability`. What an outlier
  and others say still counts, through the others.
* Of each user, only so many of the newest answers count that nobody has more than a share of the
  answers that count. This limits users who are never compared with anybody.
"""

# Shapes: U users

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from reir.operations.feedback import Feedback
from reir.operations.feedback.agreement import User, voices_of
from reir_training.finetune.reliability import Standing, compare, standings

if TYPE_CHECKING:
    from rich.console import RenderableType

MAX_SHARE, MIN_CAP = 0.25, 20
REASONS = {
    "outlier": "of users whom the others contradict too often",
    "capped": "older than the newest answers of their user that count",
}

Decision = Literal["kept", "capped", "outlier"]


@dataclass(frozen=True, kw_only=True)
class UserReport:
    """How reliable a user is, and what follows.

    Attributes:
        user: the first 8 characters of the pseudonym; empty for everybody without an API key.
        tenant: its tenant; empty if there is none.
        answers: number of answers, "right" or "box", that no later verdict replaces.
        standing: how often others contradict this user.
        decision: all feedback of an "outlier" is left out, and the older of a "capped" user.
        left_out: how much feedback that is.
    """

    user: str
    tenant: str
    answers: int
    standing: Standing
    decision: Decision
    left_out: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "user": self.user,
            "tenant": self.tenant,
            "answers": self.answers,
            "compared": self.standing.compared,
            "contradicted": self.standing.contradicted,
            "p_value": self.standing.p_value,
            "decision": self.decision,
            "left_out": self.left_out,
        }


@dataclass(frozen=True, kw_only=True)
class Trusted:
    """The feedback to learn from.

    Attributes:
        feedback: what is left, in the order of time.
        cap: how many answers of each user count at most.
        users: all users, those with most answers first.
    """

    feedback: tuple[Feedback, ...]
    cap: int
    users: tuple[UserReport, ...]

    def left_out(self, decision: Decision) -> int:
        """Return how much feedback is left out because of one decision."""
        return sum(each.left_out for each in self.users if each.decision == decision)


def trusted(
    feedback: Sequence[Feedback], *, max_share: float = MAX_SHARE, min_cap: int = MIN_CAP
) -> Trusted:
    """Leave out outliers, and the older answers of users who have too many.

    Args:
        feedback: about one gallery, in the order of time.
        max_share, min_cap: see `cap_of`.
    """
    known = standings(list(compare(feedback)))
    answers = _places_of_answers(feedback)
    # Every user with an answer has a standing, since an answer is a verdict with a box.
    honest = [len(places) for user, places in answers.items() if not known[user].is_outlier]
    cap = cap_of(honest, max_share=max_share, min_cap=min_cap)
    all_places: dict[User, list[int]] = defaultdict(list)
    for place, said in enumerate(feedback):
        all_places[said.tenant, said.user].append(place)
    kept: list[int] = []
    users = []
    for user, places in all_places.items():
        standing, own = known.get(user, Standing()), answers.get(user, [])
        decision, first = _decide(standing, own, cap, end=len(feedback))
        newest = [place for place in places if place >= first]
        kept += newest
        users.append(
            UserReport(
                user=user[1][:8],
                tenant=user[0],
                answers=len(own),
                standing=standing,
                decision=decision,
                left_out=len(places) - len(newest),
            )
        )
    return Trusted(
        feedback=tuple(feedback[place] for place in sorted(kept)),
        cap=cap,
        users=tuple(sorted(users, key=lambda each: -each.answers)),
    )


def cap_of(num_answers: Sequence[int], *, max_share: float, min_cap: int) -> int:
    """Return how many answers of each user count.

    It is the largest number for which nobody has more than the share of all answers that count.

    Args:
        num_answers: (U,) number of answers of each user.
        max_share: share in (0, 1]; that of an equal division, if that is more.
        min_cap: so many count at least.
    """
    if not num_answers:
        return min_cap
    share = max(max_share, 1 / len(num_answers))
    cap = max(num_answers)
    # Lowering the cap lowers the number of all answers, so this ends at the largest solution.
    # The small number is for rounding: `int(1 / 49 * 49)` is 0.
    while cap > (allowed := int(share * sum(min(each, cap) for each in num_answers) + 1e-6)):
        cap = allowed
    return max(cap, min_cap)


def _places_of_answers(feedback: Sequence[Feedback]) -> Mapping[User, list[int]]:
    """Return where the answers of each user are that no later verdict replaces."""
    # By identity, because the voices contain these very objects, and two of them may be equal.
    place_of = {id(said): place for place, said in enumerate(feedback)}
    places: dict[User, list[int]] = defaultdict(list)
    for voices in voices_of(feedback).values():
        for user, voice in voices.items():
            places[user] += [place_of[id(said)] for said in voice.answers.values()]
    return {user: sorted(found) for user, found in places.items() if found}


def _decide(
    standing: Standing, answers: Sequence[int], cap: int, *, end: int
) -> tuple[Decision, int]:
    """Return what happens to a user, and the place from which on its feedback counts."""
    if standing.is_outlier:
        return "outlier", end
    if len(answers) > cap:
        # A cut in time: all older verdicts are left out, so that no answer comes back that one of
        # them replaced or withdrew.
        return "capped", answers[-cap]
    return "kept", 0


@dataclass(frozen=True, kw_only=True)
class FeedbackSummary:
    """What became of the feedback about a gallery, which a report shows.

    Attributes:
        num_feedback: all of it.
        num_used: feedback that supports an answer to learn from.
        left_out: reason -> number of other feedback; see `Agreement` and `Decision`. "photo gone":
            the live version no longer has the photo.
        cap: how many answers of each user count at most.
        users: how reliable each user is.
    """

    num_feedback: int
    num_used: int
    left_out: dict[str, int]
    cap: int
    users: tuple[UserReport, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "feedback": self.num_feedback,
            "used": self.num_used,
            "left_out": self.left_out,
            "cap": self.cap,
            "users": [each.to_dict() for each in self.users],
        }

    def table(self) -> RenderableType:
        """Return it for the terminal: reasons, and users that were left out or could be."""
        from rich.console import Group
        from rich.text import Text

        from reir.cli.common import new_table, plural
        from reir.cli.feedback import REASONS as OTHER_REASONS

        reasons = {**OTHER_REASONS, **REASONS}
        lines = [f"{self.num_used:,} of {plural(self.num_feedback, 'verdict')} are learned from."]
        lines += [f"Left out: {num:,} ({reasons[why]})." for why, num in self.left_out.items()]
        numbers = ("answers", "compared", "contradicted (%)", "p-value")
        table = new_table("user", *numbers, "decision", right=numbers)
        for each in self.users:
            standing = each.standing
            share = 100 * standing.contradicted / standing.compared if standing.compared else None
            table.add_row(
                "/".join(filter(None, (each.tenant, each.user or "without a key"))),
                f"{each.answers:,}",
                f"{standing.compared:,}",
                "" if share is None else f"{share:.0f}",
                f"{standing.p_value:.2g}",
                each.decision,
            )
        return Group(Text("\n".join(lines)), "", table)
