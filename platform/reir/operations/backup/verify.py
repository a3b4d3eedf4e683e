"""Compares a restored version with its backup: ledger, sampled photos, and answers to searches."""

# Shapes: Q queries, N instances, D vector dimension

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from reir.operations.backup.saved import SavedBackup
from reir.records import FloatArray, IndexedImage
from reir.store.contract import InstanceRow, InstanceStore, ServerStore, VersionInfo
from reir.store.validation import instance_id, same_spec

NUM_QUERIES = 50
NUM_HITS = 10

TOLERANCE = 1e-5
"""Difference up to which two scores count as equal."""

MIN_RECALL = 0.99
"""Least mean recall of a server, which searches an approximate index."""

_NOISE = 0.3
"""Length of the noise that is added to an instance vector, of a length around 1, for a query."""

_KEPT = 64
"""Number of best instances that are known for each query, so that ties can be recognized."""


class Sample:
    """Queries, their exact answers, and photos, all from a backup."""

    def __init__(self, backup: SavedBackup) -> None:
        """Choose instances of a backup, always the same ones, and make a query of each.

        Raises:
            DataError: a file of the backup is damaged.
        """
        rng = np.random.default_rng(0)
        total = backup.manifest.counts.instances
        rows = rng.choice(max(1, total), min(NUM_QUERIES, total), replace=False)
        ids, vectors = backup.instances(sorted(rows.tolist()) if total else [])
        noise = rng.standard_normal(vectors.shape, dtype=np.float32)
        # The expected length of D independent standard normal values is about the square root of D.
        noise *= np.float32(_NOISE / np.sqrt(vectors.shape[1]))
        self.queries_QD: FloatArray = np.asarray(vectors + noise, dtype=np.float32)
        self.photos: dict[str, IndexedImage] = {}
        self._photo_ids = set(ids)
        self._best: list[list[tuple[float, str]]] = [[] for _ in ids]

    def add(self, images: Sequence[IndexedImage]) -> None:
        """Include photos of the backup in the exact answers; to be called with all of them."""
        for image in images:
            if image.record.image_id in self._photo_ids:
                self.photos[image.record.image_id] = image
        vectors = [each.instances.vectors for each in images if each.instances is not None]
        if not self._best or not vectors:
            return
        scores_QN = self.queries_QD @ np.concatenate(vectors).T
        ids = [
            instance_id(each.record.image_id, number)
            for each in images
            for number in range(each.record.num_instances)
        ]
        for best, scores_N in zip(self._best, scores_QN, strict=True):
            top = np.argsort(-scores_N)[:_KEPT]
            best += [(float(scores_N[n]), ids[n]) for n in top]
            best.sort(key=lambda item: -item[0])
            del best[_KEPT:]

    def recalls(self, answers: Sequence[Sequence[InstanceRow]]) -> list[float]:
        """Return the share of its right hits that each answer has."""
        return [_recall(hits, best) for hits, best in zip(answers, self._best, strict=True)]


@dataclass(frozen=True)
class Verdict:
    """How a version compares with a backup.

    Attributes:
        problems: what differs, in sentences; empty if nothing does.
        queries: number of searches that were compared.
        recall: mean share of the right hits that the searches returned; 1 without searches.
    """

    problems: tuple[str, ...]
    queries: int
    recall: float


def verify(
    store: InstanceStore, gallery: str, info: VersionInfo, backup: SavedBackup, sample: Sample
) -> Verdict:
    """Compare a version with a backup, all photos of which were added to `sample`.

    Raises:
        DataError: a file of the backup is damaged.
    """
    version = info.name
    problems = [difference] if (difference := difference_of(store, gallery, info, backup)) else []
    stored = store.get_indexed(gallery, version, list(sample.photos))
    wrong = [key for key, image in sample.photos.items() if not same_image(stored.get(key), image)]
    if wrong:
        problems.append(
            f"{len(wrong)} of {len(sample.photos)} photos that were compared have other instances "
            f"than in the backup, such as {sample.photos[wrong[0]].record.uri}"
        )
    recalls = [1.0]
    if len(sample.queries_QD):
        answers = store.search(gallery, version, sample.queries_QD, NUM_HITS)
        recalls = sample.recalls(answers)
    recall = float(np.mean(recalls))
    least = MIN_RECALL if isinstance(store, ServerStore) else 1.0
    if recall < least:
        problems.append(
            f"searches returned {recall:.1%} of the nearest instances of the backup; at least "
            f"{least:.0%} are expected"
        )
    return Verdict(tuple(problems), len(sample.queries_QD), recall)


def difference_of(
    store: InstanceStore, gallery: str, info: VersionInfo, backup: SavedBackup
) -> str:
    """Describe how the ledger of a version differs from that of a backup; "" if they agree.

    Raises:
        DataError: a file of the backup is damaged.
    """
    if not same_spec(info.spec, backup.manifest.spec):
        return f"version '{info.name}' has {info.spec}, and the backup {backup.manifest.spec}"
    found = info.num_images, info.num_instances
    wanted = backup.num_photos, backup.num_instances
    if found != wanted:
        return (
            f"version '{info.name}' has {found[0]:,} photos with {found[1]:,} instances, and the "
            f"backup {wanted[0]:,} with {wanted[1]:,}"
        )
    for records in backup.record_parts():
        stored = store.get_images(gallery, info.name, [each.image_id for each in records])
        differing = [each for each in records if stored.get(each.image_id) != each]
        if differing:
            return (
                f"version '{info.name}' has other ledger rows than the backup, such as that of "
                f"{differing[0].uri}"
            )
    return ""


def _recall(hits: Sequence[InstanceRow], best: Sequence[tuple[float, str]]) -> float:
    """Return the share of the right hits in an answer; either of two equal scores is right.

    Args:
        hits: the answer.
        best: score and id of the best instances by an exact scan, best first.
    """
    num_wanted = min(NUM_HITS, len(best))
    if not num_wanted:
        return float(not hits)
    least = best[num_wanted - 1][0]
    exact = {key: score for score, key in best}
    right = {
        hit.instance_id
        for hit in hits
        # An instance that is not among the many best ones may still be as good as the last one.
        if hit.score >= least - TOLERANCE
        and abs(hit.score - exact.get(hit.instance_id, least)) <= TOLERANCE
    }
    # These have to be found. The remaining places may be taken by any instances that tie for last.
    needed = {key for score, key in best[:num_wanted] if score > least + TOLERANCE}
    num_tied = min(len(right - needed), num_wanted - len(needed))
    return (len(right & needed) + num_tied) / num_wanted


def same_image(one: IndexedImage | None, other: IndexedImage) -> bool:
    """Whether two images are identical, bit by bit."""
    if one is None or one.record != other.record:
        return False
    first, second = one.instances, other.instances
    if first is None or second is None:
        return first is second
    return (first.masks or ()) == (second.masks or ()) and all(
        getattr(first, name).tobytes() == getattr(second, name).tobytes()
        for name in ("boxes", "objectness", "vectors", "image_vector")
    )
