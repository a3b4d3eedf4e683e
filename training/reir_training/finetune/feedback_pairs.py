"""What a fine-tune learns from feedback: the answers that reliable users agree on."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from reir.datasets.dataset import ReferringImage
from reir.errors import DataError, UnknownPhoto
from reir.operations.feedback import require_feedback
from reir.operations.feedback.agreement import Answer, agree
from reir.operations.feedback.export import dataset_of_answers
from reir.store.contract import InstanceStore
from reir_training.finetune.pairs import GalleryPairs
from reir_training.finetune.photos import GalleryPhotos
from reir_training.finetune.trust import MAX_SHARE, FeedbackSummary, trusted


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
    feedback = require_feedback(folder, gallery)
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
