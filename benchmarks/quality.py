"""Quality of a checkpoint on held-out photos, compared with two baselines on the same candidates.

    python benchmarks/quality.py [--checkpoint DIR] [--seeds DIR DIR ...]

The gallery is all photos of split "val", and the queries are its long expressions. Candidates are
chosen without the query. BR@k follows definition B at IoU .5, with 95% bootstrap intervals over
photos. `rec_*` is the share of the expressions for which `reir localize` finds the right box in the
described photo; `vectors_rec_*` is the same by the vectors of a search. `recall_*` is
the share of long expressions whose box overlaps a candidate by an IoU of .5 or .7. Settings were
chosen on "val"; `test_*` are the same figures for the test photos of the recipe, on which nothing
was chosen. With `--seeds`, the mean and standard deviation over checkpoints that differ only in the
seed. Neither baseline uses anything that we trained:

    a   class match: the candidate whose class name is most similar by MiniLM, times its class score
    b   photo, then box: the best photo by pooled vector (MiniLM vectors of its candidates' class
        names, weighted by class score), and in it the box by class match

An ablation is like (b), with the mean of our own trained instance vectors as the pooled vector.
Human multi-hop expressions are evaluated within their own photo, with separate figures for unseen
photos and for training photos.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import numpy.typing as npt
import torch
from _indexing import TEST_PHOTOS
from _rec import right_boxes
from _report import write_report
from safetensors.torch import load_file
from tokenizers import Tokenizer

from reir.checkpoint import SHIPPED, load_encoder, load_model
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
from reir.query.localize import PixelLocalizer
from reir.query.search import load_extras
from reir_testing import data_dir
from reir_testing.boxes import target_box
from reir_training.data.examples import set_test_photos_aside
from reir_training.nano.start_weights import minilm_files
from reir_training.run.validate import text_vectors

Floats = npt.NDArray[np.float32]
KS = (1, 5, 10)
MAX_TOKENS = 128


def as_an_index() -> torch.autocast:
    """Compute in the precision of indexing on this CPU: bf16 if it is supported, else float32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=fast_dtype() == torch.bfloat16)


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
        with torch.inference_mode(), as_an_index():
            out = model.encode_photos(batch)
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
    with torch.inference_mode(), as_an_index():
        vectors = text_vectors(model, tokenizer, texts)
    iou = pairwise_iou(np.array(targets), gallery.boxes).astype(np.float32)
    return texts, vectors, own, iou


def human_rec(
    localizer: PixelLocalizer, folder: Path, held_out: ReferringDataset
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
        rec = 1.0 * right_boxes(localizer, photos, folder / "images", photos.expressions)
        own = np.unique([each.image_id for each in photos.expressions], return_inverse=True)[1]
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


@dataclass
class Asked:
    """M queries: texts, vectors (M, D), the photo of each (M,), and IoU with all boxes (M, J)."""

    gallery: Gallery
    texts: list[str]
    vectors: Floats
    own: npt.NDArray[np.int64]
    iou: Floats

    @property
    def scores(self) -> Floats:
        """(M, J) inner products."""
        found: Floats = self.vectors @ self.gallery.vectors.T
        return found

    @property
    def recall(self) -> Floats:
        """(M, 2): whether a candidate of the photo overlaps the box by an IoU of .5 and of .7."""
        inside = np.where(self.gallery.photo[None] == self.own[:, None], self.iou, 0.0).max(axis=1)
        reached: Floats = np.stack([inside >= 0.5, inside >= 0.7], axis=1).astype(np.float32)
        return reached


def long_and_short(
    model: ClareNano, tokenizer: Tokenizer, dataset: ReferringDataset, folder: Path, num: int
) -> tuple[Asked, Asked]:
    """Encode photos, and ask for both kinds of expressions in them."""
    gallery = encode_gallery(model, dataset, folder / "images", num)
    long, short = (
        Asked(gallery, *ask(model, tokenizer, dataset.of_kind(kind), gallery))
        for kind in ("long", "short")
    )
    return long, short


def split_figures(long: Asked, short: Asked) -> dict[str, float]:
    """Return BR@k, precision within the photo by vectors, and recall of the candidates."""
    of_long = {
        **{f"br{k}_50": hits for k, hits in zip(KS, _found(long).T, strict=True)},
        "vectors_rec_long": in_photo(long.gallery, long.scores, long.own, long.iou),
        "recall_50": long.recall[:, 0],
        "recall_70": long.recall[:, 1],
    }
    rec = in_photo(short.gallery, short.scores, short.own, short.iou)
    return in_figures(of_long, long.own) | in_figures({"vectors_rec_short": rec}, short.own)


def localized_figures(
    localizer: PixelLocalizer, dataset: ReferringDataset, folder: Path
) -> dict[str, float]:
    """Return the precision of `reir localize` within the described photos."""
    figures: dict[str, float] = {}
    for kind in ("long", "short"):
        asked = dataset.of_kind(kind).expressions
        rec = right_boxes(localizer, dataset, folder / "images", asked).astype(np.float32)
        of_photo = np.unique([each.image_id for each in asked], return_inverse=True)[1]
        figures |= in_figures({f"rec_{kind}": rec}, of_photo)
    return figures


def in_figures(values: Mapping[str, Floats], photos: npt.NDArray[np.int64]) -> dict[str, float]:
    """Return the means and intervals of (M,) values by name; (M,) photos of the expressions."""
    columns = np.stack(list(values.values()), axis=1)
    figures: dict[str, float] = {}
    for name, span in zip(values, bootstrap_intervals(columns, clusters=photos), strict=True):
        for end, value in (("", span.mean), ("_low", span.low), ("_high", span.high)):
            # Recall is a share, everything else is in percent.
            percent = not name.startswith("recall")
            figures[name + end] = round(100 * value, 2) if percent else round(value, 4)
    return figures


def _found(asked: Asked) -> Floats:
    return found(asked.gallery, asked.scores, asked.own, asked.iou)


def baselines(long: Asked) -> dict[str, float]:
    """Return BR@k of the baselines and of the ablation, and ratios to them."""
    # All arms rank the same candidates, so they differ only in how they rank them.
    encoder, gallery = Sentences(), long.gallery
    sentences, names = encoder.encode(long.texts), encoder.encode(list(COCO_CLASSES))
    by_class = class_match(gallery, sentences, names)
    arms = {
        "br": long.scores,
        "baseline_a_br": by_class,
        "baseline_b_br": image_then_box(gallery, sentences, gallery.classes @ names, by_class),
        "ablation_b_br": image_then_box(gallery, long.vectors, gallery.vectors, by_class),
    }
    rates = {
        name: found(gallery, scores, long.own, long.iou).mean(axis=0)
        for name, scores in arms.items()
    }
    # Compared with the better of the two baselines.
    best = max(rates["baseline_a_br"][0], rates["baseline_b_br"][0])
    return {
        **{
            f"{name}{k}_50": round(100 * float(rate), 2)
            for name, values in rates.items()
            if name != "br"
            for k, rate in zip(KS, values, strict=True)
        },
        "baseline_ratio": round(float(rates["br"][0] / best), 2),
        "ablation_ratio": round(float(rates["br"][0] / rates["ablation_b_br"][0]), 2),
    }


def over_seeds(folders: list[Path], held_out: ReferringDataset, photos: Path) -> dict[str, float]:
    """Return mean and standard deviation of the figures of several checkpoints."""
    each = []
    for folder in folders:
        model, tokenizer = load_model(folder)
        num = model.config.num_candidates
        found = split_figures(*long_and_short(model, tokenizer, held_out, photos, num))
        each.append(found | localized_figures(localizer_of(folder), held_out, photos))
        print(f"{folder.name}: {each[-1]}", flush=True)
    names = [name for name in each[0] if not name.endswith(("_low", "_high"))]
    figures: dict[str, float] = {"seeds": len(each)}
    for name in names:
        values = [one[name] for one in each]
        figures[f"seeds_{name}_mean"] = round(mean(values), 2)
        figures[f"seeds_{name}_deviation"] = round(stdev(values), 2)
    return figures


def localizer_of(folder: Path) -> PixelLocalizer:
    """Return the localizer of a checkpoint."""
    encoder = load_encoder(folder)
    return load_extras(folder, encoder).localizer(encoder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=SHIPPED)
    parser.add_argument("--num-candidates", type=int, default=None)
    parser.add_argument("--seeds", type=Path, nargs="*", default=[])
    args = parser.parse_args()
    root = data_dir()
    if root is None:
        raise SystemExit("the shared photos are needed: set REIR_DATA")
    folder = root / "photos"
    model, tokenizer = load_model(args.checkpoint)
    num = args.num_candidates or model.config.num_candidates
    everything = read_photos(folder)
    held_out = everything.split("val")
    long, short = long_and_short(model, tokenizer, held_out, folder, num)
    localizer = localizer_of(args.checkpoint)
    figures: dict[str, float] = {"num_candidates": num, **split_figures(long, short)}
    figures |= localized_figures(localizer, held_out, folder)
    figures |= baselines(long) | human_rec(localizer, folder, held_out)
    tested = set_test_photos_aside(everything, TEST_PHOTOS).split("test")
    measured = split_figures(*long_and_short(model, tokenizer, tested, folder, num))
    measured |= localized_figures(localizer, tested, folder)
    figures |= {"test_photos": TEST_PHOTOS} | {f"test_{k}": v for k, v in measured.items()}
    if args.seeds:
        figures |= over_seeds(args.seeds, held_out, folder)
    for name, value in figures.items():
        print(f"quality.{name} = {value}")
    write_report("quality", {f"quality.{name}": value for name, value in figures.items()})


if __name__ == "__main__":
    main()
