"""What the relation re-ranker adds to the dual stream on held-out photos, and what it costs.

    python benchmarks/rerank.py [--checkpoint DIR]

The gallery is all photos of split "val", and the queries are its long expressions; `test_*` are the
same figures for the test photos of the recipe. The re-ranker
reorders the best 50 photos of the dual stream, from what the index holds of them. BR@k follows
definition B at IoU .5; REC judges the top box within the expression's own photo. Gains are in
percentage points, with 95% bootstrap intervals over photos of the difference between both answers
to the same query. The cost is that of one query's 50 photos with 30 instances each, on one core:
elapsed time, and CPU time, which other work on the machine lengthens less.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from _indexing import TEST_PHOTOS
from _report import write_report

from reir.checkpoint import SHIPPED, load_encoder, load_reranker
from reir.datasets.dataset import ReferringDataset
from reir.datasets.photos import read_photos
from reir.evaluate.rerank_metrics import (
    NUM_PHOTOS,
    dual_scores,
    hits_at,
    hits_in_photo,
    reranked_scores,
)
from reir.images.boxes import elementwise_iou
from reir.images.decode import read_image
from reir.metrics.bootstrap import bootstrap_intervals
from reir.models.interfaces import EncodedExpression, TokenEncoder
from reir.models.reranker import PhotoInstances, Reranker
from reir_testing import data_dir
from reir_testing.boxes import target_box
from reir_training.data.examples import set_test_photos_aside

KS = (1, 5, 10)
BATCH = 8
ROUNDS, WARM_UP, NUM_INSTANCES = 40, 5, 30


def encode_photos(
    encoder: TokenEncoder, dataset: ReferringDataset, folder: Path
) -> list[PhotoInstances]:
    """Return what the index would hold of every photo."""
    out = []
    for start in range(0, len(dataset.images), BATCH):
        some = dataset.images[start : start + BATCH]
        images = [read_image(folder / image.file_name) for image in some]
        for found in encoder.encode_images(images):
            out.append(PhotoInstances(found.vectors, found.boxes, found.objectness))
    return out


def successes(
    reranker: Reranker,
    texts: Sequence[EncodedExpression],
    photos: Sequence[PhotoInstances],
    dataset: ReferringDataset,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Return success (M, 4) at 1, 5, 10 and in the photo, without and with it, and photos (M,)."""
    row_of = {image.image_id: i for i, image in enumerate(dataset.images)}
    own = np.array([row_of[e.image_id] for e in dataset.expressions])
    targets = [target_box(dataset, each) for each in dataset.expressions]
    owner = np.repeat(np.arange(len(photos)), [len(photo.boxes) for photo in photos])
    inside = owner[None] == own[:, None]
    boxes = np.concatenate([photo.boxes for photo in photos])
    fits = (elementwise_iou(boxes[None], np.array(targets)[:, None]) >= 0.5) & inside
    arms = (dual_scores(texts, photos), reranked_scores(reranker, texts, photos, own))
    without, with_it = (
        np.stack([*(hits_at(s, fits, k) for k in KS), hits_in_photo(s, fits, inside)], axis=1)
        for s in arms
    )
    return without, with_it, own


def gains(
    kind: str,
    without: npt.NDArray[np.float32],
    with_it: npt.NDArray[np.float32],
    own: npt.NDArray[np.int64],
) -> dict[str, float]:
    """Print and return the figures of one kind of expressions, and what the re-ranker adds."""
    # Intervals of the difference, since both answers succeed or fail on the same expressions.
    spans = bootstrap_intervals(with_it - without, clusters=own)
    names = [*(f"br{k}" for k in KS), "rec"] if kind == "long" else ["rec_short"]
    columns = range(4) if kind == "long" else [3]
    figures: dict[str, float] = {}
    for name, column in zip(names, columns, strict=True):
        before, after = 100 * without[:, column].mean(), 100 * with_it[:, column].mean()
        gain = spans[column]
        print(
            f"{name:10s} {before:6.2f} -> {after:6.2f}   {100 * gain.mean:+.2f} "
            f"[{100 * gain.low:+.2f}, {100 * gain.high:+.2f}]"
        )
        figures |= {
            f"{name}_without": round(float(before), 2),
            name: round(float(after), 2),
            f"{name}_gain": round(100 * gain.mean, 2),
            f"{name}_gain_low": round(100 * gain.low, 2),
            f"{name}_gain_high": round(100 * gain.high, 2),
        }
    return figures


def cost_ms(
    reranker: Reranker, text: EncodedExpression, photos: Sequence[PhotoInstances]
) -> tuple[list[float], list[float]]:
    """Return milliseconds and CPU milliseconds of queries of 50 photos with 30 instances."""
    # The worst case: photos with fewer instances cost less.
    full = [photo for photo in photos if len(photo.boxes) >= NUM_INSTANCES][:NUM_PHOTOS]
    passed, cpu = [], []
    for _ in range(WARM_UP + ROUNDS):
        started, started_cpu = time.perf_counter(), time.thread_time()
        reranker.score([text], [full])
        cpu.append((time.thread_time() - started_cpu) * 1e3)
        passed.append((time.perf_counter() - started) * 1e3)
    return passed[WARM_UP:], cpu[WARM_UP:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=SHIPPED)
    args = parser.parse_args()
    root = data_dir()
    if root is None:
        raise SystemExit("the shared photos are needed: set REIR_DATA")
    torch.set_num_threads(1)
    encoder, reranker = load_encoder(args.checkpoint), load_reranker(args.checkpoint)
    if reranker is None or not isinstance(encoder, TokenEncoder):
        raise SystemExit(f"{args.checkpoint} has no re-ranker")
    everything = read_photos(root / "photos")
    tested = set_test_photos_aside(everything, TEST_PHOTOS)
    figures: dict[str, float] = {"rerank.num_photos": NUM_PHOTOS}
    for prefix, dataset in (("test_", tested.split("test")), ("", everything.split("val"))):
        photos = encode_photos(encoder, dataset, root / "photos" / "images")
        for kind in ("short", "long"):
            asked = dataset.of_kind(kind)
            texts = encoder.encode_tokens([e.text for e in asked.expressions])
            gained = gains(kind, *successes(reranker, texts, photos, asked))
            figures |= {f"rerank.{prefix}{name}": value for name, value in gained.items()}
    # The cost grows with the number of words.
    longest = max(texts, key=lambda each: len(each.states))
    passed, cpu = cost_ms(reranker, longest, photos)
    figures["rerank.ms_50_photos"] = round(statistics.median(passed), 2)
    figures["rerank.ms_50_photos_best"] = round(min(passed), 2)
    figures["rerank.cpu_ms_50_photos"] = round(statistics.median(cpu), 2)
    figures["rerank.weights_kib"] = round(sum(p.numel() for p in reranker.parameters()) / 256, 1)
    for key in ("ms_50_photos", "ms_50_photos_best", "cpu_ms_50_photos", "weights_kib"):
        print(f"rerank.{key} = {figures[f'rerank.{key}']}")
    write_report("rerank", figures)


if __name__ == "__main__":
    main()
