"""Quality of a checkpoint on held-out photos, compared with two baselines on the same candidates.

    python benchmarks/quality.py [--checkpoint DIR]

The gallery is all photos of split "val", and the queries are its long expressions. Candidates are
chosen without the query. BR@k follows definition B at IoU .5, with 95% bootstrap intervals over
photos. Neither baseline uses anything that we trained:

    a   class match: the candidate whose class name is most similar by MiniLM, times its class score
    b   photo, then box: the best photo by pooled vector (MiniLM vectors of its candidates' class
        names, weighted by class score), and in it the box by class match

An ablation is like (b), with the mean of our own trained instance vectors as the pooled vector.
Human multi-hop expressions are evaluated within their own photo, with separate figures for unseen
photos and for training photos.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from _report import write_report
from safetensors.torch import load_file
from tokenizers import Tokenizer

from reir.checkpoint import SHIPPED, load_model
from reir.datasets.coco_classes import COCO_CLASSES
from reir.datasets.dataset import ReferringDataset
from reir.datasets.photos import read_human_expressions, read_photos
from reir.images.boxes import pairwise_iou
from reir.images.decode import read_image
from reir.metrics.bootstrap import bootstrap_intervals
from reir.models.nano.candidates import CandidateExtractor
from reir.models.nano.encoder import fast_dtype, tokenize
from reir.models.nano.model import ClareNano
from reir.models.nano.sentence_tower import SentenceTower, from_bert
from reir_testing import data_dir
from reir_testing.boxes import target_box
from reir_training.nano.start_weights import minilm_files

Floats = npt.NDArray[np.float32]
KS = (1, 5, 10)
MAX_TOKENS = 128


@dataclass
class Gallery:
    """Candidates of all photos: vectors (J, D), boxes (J, 4), class scores (J, 80), photo (J,)."""

    vectors: Floats
    boxes: Floats
    classes: Floats
    photo: npt.NDArray[np.int64]
    row_of: dict[str, int]


def encode_gallery(model: ClareNano, dataset: ReferringDataset, folder: Path, num: int) -> Gallery:
    extract = CandidateExtractor(model.eval(), fast_dtype())
    parts: list[tuple[Floats, Floats, Floats]] = []
    photo: list[int] = []
    for row, image in enumerate(dataset.images):
        batch = extract([read_image(folder / image.file_name)], num)
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            out = model.visual(batch)
        n = int(batch.valid.sum())
        parts.append(
            (
                out.vectors[0, :n].numpy(),
                out.boxes[0, :n].numpy(),
                batch.class_scores[0, :n].numpy(),
            )
        )
        photo += [row] * n
    vectors, boxes, classes = (np.concatenate(p) for p in zip(*parts, strict=True))
    rows = {image.image_id: i for i, image in enumerate(dataset.images)}
    return Gallery(vectors, boxes, classes, np.array(photo), rows)


class Sentences:
    """The sentence encoder that the text tower started from, for the class-match baseline."""

    def __init__(self) -> None:
        files = minilm_files()
        shape = {"num_layers": 6, "max_tokens": MAX_TOKENS}
        self._tower = SentenceTower(**shape).eval()
        self._tower.load_state_dict(from_bert(load_file(files.weights), **shape))
        self._tokenizer = Tokenizer.from_file(str(files.tokenizer))
        self._tokenizer.no_padding()

    def encode(self, texts: list[str]) -> Floats:
        ids, mask = tokenize(self._tokenizer, texts, MAX_TOKENS)
        with torch.inference_mode():
            states = self._tower(ids, mask)
        mean = (states * mask[..., None]).sum(1)
        unit: Floats = torch.nn.functional.normalize(mean, dim=-1).numpy()
        return unit


def class_match(gallery: Gallery, texts_MC: Floats, classes_KC: Floats) -> Floats:
    """Return (M, J): the maximum over classes of sentence similarity times class score."""
    similar = texts_MC @ classes_KC.T
    return np.stack([(gallery.classes * row).max(axis=1) for row in similar])


def image_then_box(gallery: Gallery, texts: Floats, vectors: Floats, by_class: Floats) -> Floats:
    """Return (M, J): photos in the order of their pooled instance vectors, one box each."""
    num = int(gallery.photo.max()) + 1
    pooled = np.zeros((num, vectors.shape[1]), dtype=np.float32)
    np.add.at(pooled, gallery.photo, vectors)
    pooled /= np.linalg.norm(pooled, axis=1, keepdims=True)
    # Only one box of a photo is an answer, as in a real two-stage system; all others rank last.
    by_photo = texts @ pooled.T
    scores = np.full_like(by_class, -np.inf)
    starts = np.searchsorted(gallery.photo, np.arange(num + 1))
    for i in range(num):
        own = slice(starts[i], starts[i + 1])
        if own.stop > own.start:
            best = starts[i] + by_class[:, own].argmax(axis=1)
            scores[np.arange(len(scores)), best] = by_photo[:, i]
    return scores


def found(gallery: Gallery, scores: Floats, own: npt.NDArray[np.int64], iou: Floats) -> Floats:
    """Return (M, 3): success at 1, 5 and 10 by definition B."""
    top = np.argsort(-scores, axis=1, kind="stable")[:, : max(KS)]
    right = (gallery.photo[top] == own[:, None]) & (np.take_along_axis(iou, top, 1) >= 0.5)
    hits: Floats = np.stack([right[:, :k].any(axis=1) for k in KS], axis=1).astype(np.float32)
    return hits


def in_photo(gallery: Gallery, scores: Floats, own: npt.NDArray[np.int64], iou: Floats) -> Floats:
    """Return (M,): whether the best box within the true photo is correct."""
    inside = np.where(gallery.photo[None] == own[:, None], scores, -np.inf)
    fits: Floats = (iou[np.arange(len(iou)), inside.argmax(axis=1)] >= 0.5).astype(np.float32)
    return fits


def ask(
    model: ClareNano, tokenizer: Tokenizer, dataset: ReferringDataset, gallery: Gallery
) -> tuple[list[str], Floats, npt.NDArray[np.int64], Floats]:
    """Return texts, expression vectors (M, D), true photo (M,) and IoU with every box (M, J)."""
    texts = [e.text for e in dataset.expressions]
    own = np.array([gallery.row_of[e.image_id] for e in dataset.expressions])
    targets = [target_box(dataset, each) for each in dataset.expressions]
    vectors = []
    for i in range(0, len(texts), 128):
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            vectors.append(model.text(*tokenize(tokenizer, texts[i : i + 128], 64)).float().numpy())
    iou = pairwise_iou(np.array(targets), gallery.boxes).astype(np.float32)
    return texts, np.concatenate(vectors), own, iou


def human_rec(
    model: ClareNano, tokenizer: Tokenizer, folder: Path, held_out: ReferringDataset, num: int
) -> dict[str, float]:
    """Return P@.5 of human expressions within their photo, separately for training photos.

    No model was trained on these expressions, but most of their photos are training photos.
    """
    # Expressions without an instance have no right box, so they are left out.
    human = read_human_expressions(folder).with_targets()
    about = {expression.image_id for expression in human.expressions}
    unseen = about & held_out.images_by_id.keys()
    figures: dict[str, float] = {}
    for name, ids in (("unseen", unseen), ("training", about - unseen)):
        photos = human.of_images(ids)
        num_asked = len(photos.expressions)
        crowd = encode_gallery(model, photos, folder / "images", num)
        _, vectors, own, iou = ask(model, tokenizer, photos, crowd)
        rec = in_photo(crowd, vectors @ crowd.vectors.T, own, iou)
        (span,) = bootstrap_intervals(rec[:, None], clusters=own)
        print(
            f"human expressions, {name} photos: {num_asked} about {len(photos.images)} photos, "
            f"P@.5 {100 * span.mean:.1f} [{100 * span.low:.1f}, {100 * span.high:.1f}]"
        )
        figures |= {
            f"human_{name}": num_asked,
            f"rec_human_{name}": round(100 * span.mean, 2),
            f"rec_human_{name}_low": round(100 * span.low, 2),
            f"rec_human_{name}_high": round(100 * span.high, 2),
        }
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=SHIPPED)
    parser.add_argument("--num-candidates", type=int, default=None)
    args = parser.parse_args()
    root = data_dir()
    if root is None:
        raise SystemExit("the shared photos are needed: set REIR_DATA")
    folder = root / "photos"
    model, tokenizer = load_model(args.checkpoint)
    num = args.num_candidates or model.config.num_candidates
    held_out = read_photos(folder).split("val")
    gallery = encode_gallery(model, held_out, folder / "images", num)
    figures: dict[str, float] = {"quality.num_candidates": num}

    texts, vectors, own, iou = ask(model, tokenizer, held_out.of_kind("long"), gallery)
    # All arms rank the same candidates, so they differ only in how they rank them.
    encoder = Sentences()
    sentences, names = encoder.encode(texts), encoder.encode(list(COCO_CLASSES))
    by_class = class_match(gallery, sentences, names)
    arms = {
        "br": vectors @ gallery.vectors.T,
        "baseline_a_br": by_class,
        "baseline_b_br": image_then_box(gallery, sentences, gallery.classes @ names, by_class),
        "ablation_b_br": image_then_box(gallery, vectors, gallery.vectors, by_class),
    }
    print(f"{len(held_out.images)} photos, {len(gallery.photo)} instances, {len(texts)} queries")
    br1 = {}
    for name, scores in arms.items():
        spans = bootstrap_intervals(found(gallery, scores, own, iou), clusters=own)
        rec = in_photo(gallery, scores, own, iou)
        br1[name] = spans[0].mean
        cells = "  ".join(
            f"{100 * s.mean:5.1f} [{100 * s.low:.1f}, {100 * s.high:.1f}]" for s in spans
        )
        print(f"{name:14s} @1/5/10  {cells}   P@.5 in photo {100 * rec.mean():.1f}")
        for k, span in zip(KS, spans, strict=True):
            figures[f"quality.{name}{k}_50"] = round(100 * span.mean, 2)
            if name == "br":
                figures[f"quality.br{k}_50_low"] = round(100 * span.low, 2)
                figures[f"quality.br{k}_50_high"] = round(100 * span.high, 2)
                figures["quality.rec_long"] = round(100 * float(rec.mean()), 2)
    # Compared with the better of the two baselines.
    baseline = max(br1["baseline_a_br"], br1["baseline_b_br"])
    figures["quality.baseline_ratio"] = round(br1["br"] / baseline, 2)
    figures["quality.ablation_ratio"] = round(br1["br"] / br1["ablation_b_br"], 2)

    _, vectors, own, iou = ask(model, tokenizer, held_out.of_kind("short"), gallery)
    rec = in_photo(gallery, vectors @ gallery.vectors.T, own, iou)
    figures["quality.rec_short"] = round(100 * float(rec.mean()), 2)
    for name, value in human_rec(model, tokenizer, folder, held_out, num).items():
        figures[f"quality.{name}"] = value
    for key in ("baseline_ratio", "ablation_ratio", "rec_short"):
        print(f"quality.{key} = {figures[f'quality.{key}']}")
    write_report("quality", figures)


if __name__ == "__main__":
    main()
