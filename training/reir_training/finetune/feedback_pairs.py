"""What a fine-tune learns from feedback: the answers that reliable users agree on."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reir.datasets.dataset import ReferringImage
from reir.datasets.photo_sentences import UnknownPhoto
from reir.errors import DataError
from reir.operations.feedback import read_feedback
from reir.operations.feedback.agreement import Answer, agree
from reir.operations.feedback.export import dataset_of_answers
from reir.store.contract import InstanceStore
from reir_training.finetune.pairs import GalleryPairs
from reir_training.finetune.photos import GalleryPhotos
from reir_training.finetune.trust import MAX_SHARE, UserReport, trusted

if TYPE_CHECKING:
    from rich.console import RenderableType

REASONS = {
    "outlier": "of users whom the others contradict too often",
    "capped": "older than the newest answers of their user that count",
}


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


def feedback_pairs(
    store: InstanceStore, gallery: str, folder: Path, *, max_user_share: float = MAX_SHARE
) -> GalleryPairs:
    """Read what users said about a gallery, and find the photos in its live version.

    Args:
        store: has the gallery.
        gallery: its name.
        folder: folder of the search log.
        max_user_share: share of the answers that one user gives at most; see `cap_of`.

    Raises:
        DataError: there is no feedback, or nothing to learn from; the message says why.
        GalleryNotFound: the gallery has no live version.
    """
    feedback = read_feedback(folder, gallery)
    if not feedback:
        raise DataError(
            f"{folder} has no feedback about gallery '{gallery}'; `reir feedback`, the search page "
            f"and POST /v1/feedback give it"
        )
    trust = trusted(feedback, max_share=max_user_share)
    agreement = agree(trust.feedback)
    left_out = Counter(agreement.left_out)
    left_out.update(outlier=trust.left_out("outlier"), capped=trust.left_out("capped"))
    uris = [answer.newest.uri for answer in agreement.answers]
    photos = GalleryPhotos(store, gallery, store.live_version(gallery), uris)
    kept: list[tuple[Answer, ReferringImage]] = []
    for answer in agreement.answers:
        try:
            kept.append((answer, photos.of(answer.newest.uri)))
        except UnknownPhoto:
            left_out["photo gone"] += answer.num_for
    summary = FeedbackSummary(
        num_feedback=len(feedback),
        num_used=sum(answer.num_for for answer, _ in kept),
        left_out={reason: number for reason, number in left_out.items() if number},
        cap=trust.cap,
        users=trust.users,
    )
    if not kept:
        reasons = ", ".join(f"{num} {why}" for why, num in summary.left_out.items())
        raise DataError(
            f"none of the {len(feedback)} verdicts about gallery '{gallery}' can be learned from: "
            f"{reasons}"
        )
    dataset = dataset_of_answers(kept, f"feedback on {gallery}")
    return GalleryPairs(dataset, photos.uris, feedback=summary)
