"""What users agree on: for each expression, the boxes that most of them call right.

An expression describes one object, so a photo shows it at most once. Of each user, the newest
verdict counts: an answer ("right" or "box") replaces the user's earlier answer in the same photo,
"wrong" withdraws the answer with that box, and "absent" withdraws all earlier answers. Then an
answer counts if more users are for it than against it. A user is for it whose own answer in that
photo overlaps it, and against it whose own answer is elsewhere in the photo, or who calls a box
there wrong. Somebody who did not find the object ("absent") says nothing against those who did.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field

from reir.images.boxes import elementwise_iou
from reir.operations.feedback.records import Feedback
from reir.records import Box
from reir.text import normalize_expression

MIN_IOU = 0.5
"""Two boxes are the same answer if they overlap by so much."""

ANSWERS = ("right", "box")
"""Verdicts that say where the object is."""

User = tuple[str, str]
"""Tenant and pseudonym; everybody without a key has the empty pseudonym."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Where the object of an expression is, as most users say.

    Attributes:
        newest: the newest feedback that says so, whose expression, photo and box count.
        num_for, num_against: number of users.
    """

    newest: Feedback
    num_for: int
    num_against: int


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """What users agree on, and what became of the rest.

    Attributes:
        answers: in the order of their time.
        num_used: feedback that supports one of them.
        left_out: reason -> how much other feedback there is. "replaced": the same user said
            something else later. "outvoted": as many users or more disagree. "wrong" and "absent":
            it says where the object is not.
    """

    answers: tuple[Answer, ...]
    num_used: int
    left_out: dict[str, int]


@dataclass
class Voice:
    """What one user says about one expression, after all feedback.

    Attributes:
        answers: URI of a photo -> the newest answer in it.
        wrongs: photo and box -> the newest verdict "wrong".
        absent: the newest verdict "absent", if no answer came later.
    """

    answers: dict[str, Feedback] = field(default_factory=dict)
    wrongs: dict[tuple[str, Box | None], Feedback] = field(default_factory=dict)
    absent: Feedback | None = None

    def hear(self, said: Feedback) -> None:
        """Take in the next feedback, which may replace earlier feedback."""
        if said.verdict == "absent":
            self.answers.clear()
            self.absent = said
        elif said.verdict == "wrong":
            answer = self.answers.get(said.uri)
            if answer is not None and answer.box == said.box:
                del self.answers[said.uri]
            self.wrongs[said.uri, said.box] = said
        else:
            self.absent = None
            self.wrongs.pop((said.uri, said.box), None)
            self.answers[said.uri] = said

    def vote(self, answer: Feedback) -> int:
        """Return 1 for an answer, -1 against it, or 0.

        Args:
            answer: feedback with a box; its verdict does not matter.
        """
        own = self.answers.get(answer.uri)
        if own is not None:
            return 1 if _overlap(own, answer) else -1
        here = (said for (uri, _), said in self.wrongs.items() if uri == answer.uri)
        return -1 if any(_overlap(said, answer) for said in here) else 0

    def __len__(self) -> int:
        """Return how much feedback counts."""
        return len(self.answers) + len(self.wrongs) + (self.absent is not None)


def voices_of(feedback: Iterable[Feedback]) -> dict[str, dict[User, Voice]]:
    """Return what each user says about each expression, by the normalized expression.

    Args:
        feedback: about one gallery, in the order of time. Users with different keys or tenants are
            different users; everybody without a key is the same user.
    """
    voices: dict[str, dict[User, Voice]] = defaultdict(lambda: defaultdict(Voice))
    for said in feedback:
        voices[normalize_expression(said.expression)][said.tenant, said.user].hear(said)
    return voices


def agree(feedback: Collection[Feedback]) -> Agreement:
    """Return what users agree on.

    Args:
        feedback: see `voices_of`.
    """
    voices = voices_of(feedback)
    counting = sum(len(voice) for users in voices.values() for voice in users.values())
    left_out = Counter(replaced=len(feedback) - counting)
    answers: list[Answer] = []
    num_used = 0
    for users in voices.values():
        found = list(_answers([*users.values()]))
        answers += found
        num_answers = sum(len(voice.answers) for voice in users.values())
        num_used += sum(answer.num_for for answer in found)
        left_out["outvoted"] += num_answers - sum(answer.num_for for answer in found)
        left_out["wrong"] += sum(len(voice.wrongs) for voice in users.values())
        left_out["absent"] += sum(voice.absent is not None for voice in users.values())
    return Agreement(
        answers=tuple(sorted(answers, key=lambda each: each.newest.time)),
        num_used=num_used,
        left_out={reason: number for reason, number in left_out.items() if number},
    )


def _answers(voices: list[Voice]) -> Iterator[Answer]:
    """Yield the answers to one expression that win, at most one for each photo."""
    # A dictionary keeps the order, and a set would not, so the answers always come in the same one.
    for uri in {uri: None for voice in voices for uri in voice.answers}:
        given = [voice.answers[uri] for voice in voices if uri in voice.answers]
        for answer in sorted(given, key=lambda said: said.time, reverse=True):
            votes = [voice.vote(answer) for voice in voices]
            num_for, num_against = votes.count(1), votes.count(-1)
            if num_for > num_against:
                yield Answer(newest=answer, num_for=num_for, num_against=num_against)
                break


def _overlap(one: Feedback, other: Feedback) -> bool:
    assert one.box is not None
    assert other.box is not None
    # Rounding can leave a tiny box without area, which has IoU 0 even with itself.
    return one.box == other.box or float(elementwise_iou([one.box], [other.box])[0]) >= MIN_IOU
