"""Checks whether the data of a configuration is ready for training: counts, problems and notes.

Reads the annotations of every set, looks for every photo file and decodes a sample of the photos.
Loads no model. `reir data check` prints the result.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from pydantic import ConfigDict, model_validator

from reir.datasets.dataset import BoxPx, Expression, ReferringDataset, ReferringImage
from reir.datasets.look_alikes import read_look_alikes
from reir.errors import DataError, ImageError, nearest_name
from reir.images.decode import decode, read_bytes
from reir.text import normalize_expression
from reir_training.config import DataConfig, DataSource
from reir_training.data.examples import (
    TRAIN,
    VAL,
    build_photos,
    read_captions,
    read_dataset,
    read_near_misses,
    used_photos,
)
from reir_training.data.leakage import REMEDY, SourceDataset, abbreviate, excluded_ids, find_leaks
from reir_training.presets import PRESETS

Use = Literal["train", "held out", "unused", "evaluation"]

# Decoding all photos of a published data set would take too long for a check before training.
SAMPLE = 20
ROUNDING_PX = 1.0
"""A box may extend this far beyond its photo, because published boxes are rounded."""
MAX_OUTSIDE = 0.01
"""If a larger share of boxes does, they were probably annotated on photos of another size."""
MAX_STRETCH = 0.02
"""If aspect ratios differ relatively by more than this, the file is not the annotated photo."""
ALL, REST, NO_KIND = "all", "rest", "unnamed"


class DataOnlyConfig(DataConfig):
    """The data settings of any training configuration; other settings are checked by name only.

    Raises:
        ConfigError: raised by `load_config` for a key that no training configuration has.
    """

    # `reir data check` does not know the preset, and so not which other settings are allowed.
    model_config = ConfigDict(extra="allow")

    @model_validator(mode="after")
    def _only_known_keys(self) -> DataOnlyConfig:
        known = sorted({key for each in PRESETS.values() for key in each.model_fields})
        for key in self.model_extra or {}:
            if key not in known:
                hint = nearest_name(key, known) or ";"
                raise ValueError(f"unknown key '{key}'{hint} allowed: {', '.join(known)}")
        return self


@dataclass(frozen=True, kw_only=True)
class SplitReport:
    """What one split of a set contains.

    Attributes:
        split: its name; "all" for a set without splits, "rest" for photos that are in no split.
        use: what training uses its photos for.
        photos, instances, expressions, captions: counts.
        expressions_by_kind: counts; "unnamed" for expressions whose kind is not annotated.
        photos_without_expressions: number of photos without expressions, of which training uses
            only boxes and captions.
        missing: photos whose file does not exist.
        sampled: number of photos that were decoded.
        unreadable: sampled files that are not an image or not the annotated photo, with the reason.
        boxes_outside: number of boxes that extend beyond their photo by more than a pixel.
        boxes_empty: number of boxes without area; training ignores them.
        duplicates: number of expressions that repeat another expression of the same instance.
        ambiguous: number of expressions that also describe another instance of the photo.
        leaked: number of photos that are also in an evaluation set.
        mean_words, p95_words: mean and 95th percentile of the number of words per expression.
    """

    split: str
    use: Use
    photos: int
    instances: int
    expressions: int
    expressions_by_kind: Mapping[str, int]
    captions: int
    photos_without_expressions: int
    missing: tuple[str, ...]
    sampled: int
    unreadable: tuple[str, ...]
    boxes_outside: int
    boxes_empty: int
    duplicates: int
    ambiguous: int
    leaked: int
    mean_words: float
    p95_words: float


@dataclass(frozen=True, kw_only=True)
class SetReport:
    """What one set of the configuration contains.

    Attributes:
        label: name of the set in messages.
        folder: folder where its photos should be.
        splits: one report per split; a photo may be in several splits.
    """

    label: str
    folder: str
    splits: tuple[SplitReport, ...]


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """What the data of a configuration contains, and whether training can start.

    Attributes:
        sets: reports of the sets that could be read.
        problems: reasons why training cannot start, each with a remedy.
        notes: irregularities that training handles.
    """

    sets: tuple[SetReport, ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def fit(self) -> bool:
        """Whether training can start."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, the form that `reir data check --json` prints."""
        return {"fit": self.fit, **asdict(self)}


def check_data(
    config: DataConfig, on_set: Callable[[str], None] = lambda _label: None
) -> DataReport:
    """Read and check every set of a configuration.

    Args:
        config: the data settings.
        on_set: called with the label of each set before it is read.
    """
    unread: list[str] = []
    training = list(_readable(config.data, unread, on_set))
    evaluation = list(_readable(config.evaluation, unread, on_set))
    leaks = find_leaks([each.read for each in training], [each.read for each in evaluation])
    leaked = excluded_ids(leaks)
    leaked_ids = [leaked.get(row, frozenset()) for row in range(len(training))]
    trained = [
        each.report(_uses_in_training(each.read.dataset), ids)
        for each, ids in zip(training, leaked_ids, strict=True)
    ]
    measured = [each.report(defaultdict(lambda: "evaluation")) for each in evaluation]
    # The photos of an evaluation set may be on another machine, so their absence is no problem.
    problems = [*unread, *(problem for each in trained for problem in _problems(each))]
    notes = [note for each in (*trained, *measured) for note in _notes(each)]
    if config.exclude_evaluation:
        notes += [f"{leak}; they are excluded from training" for leak in leaks]
    elif leaks:
        problems += [*map(str, leaks), REMEDY]
    refused: list[str] = []
    splits: set[str] = set()
    for source, ids in zip(training, leaked_ids, strict=True):
        try:
            splits |= _usable_splits(source, ids, notes)
        except DataError as error:
            refused.append(str(error))
    problems += refused
    # A source that cannot be used may have such photos, and is a problem of its own already.
    if not unread and not refused and TRAIN not in splits:
        problems.append("no photo is left to train on: add a source to `data`")
    to_train = [split for each in trained for split in each.splits if split.use == "train"]
    if not any(split.expressions or split.captions for split in to_train):
        notes.append("no training photo has expressions or captions, so only boxes are learned")
    return DataReport(sets=(*trained, *measured), problems=tuple(problems), notes=tuple(notes))


def _usable_splits(found: _SourceAnnotations, leaked: frozenset[str], notes: list[str]) -> set[str]:
    """Return the splits with photos that a run can use, and note if only `weak-rec` can.

    Raises:
        DataError: there are none.
    """
    source, dataset = found.read.source, found.read.dataset
    try:
        return {photo.split for photo in build_photos(source, dataset, leaked)}
    except DataError:
        described = [each for each in used_photos(source, dataset, leaked) if each.expressions]
        texts = [text for each in described for text in each.expressions]
        # Boxes that exist but cannot be learned from, such as those of crowds, are another problem.
        if not texts or any(text.instance_id is not None for text in texts):
            raise
        notes.append(
            f"{source.label}: the expressions have no box, so only weak-rec can learn from it"
        )
        return {each.split for each in described}


def _uses_in_training(dataset: ReferringDataset) -> Mapping[str, Use]:
    """Map the name of each split to its use, consistent with `examples.photo_uses`."""
    uses: dict[str, Use] = {TRAIN: "train", VAL: "held out", ALL: "train"}
    rest: Use = "unused" if TRAIN in dataset.splits else "train"
    return {name: uses.get(name, rest) for name in (*dataset.splits, ALL, REST)}


def _readable(
    sources: Iterable[DataSource], unread: list[str], on_set: Callable[[str], None]
) -> Iterator[_SourceAnnotations]:
    """Yield the sets that can be read; append an error message to `unread` for the others."""
    for source in sources:
        on_set(source.label)
        try:
            # The results are not used; a malformed file must not surface only when training starts.
            read_near_misses(source.path)
            read_look_alikes(source.path)
            yield _SourceAnnotations(
                SourceDataset(source, read_dataset(source)), read_captions(source.path)
            )
        except DataError as error:
            unread.append(f"{source.label} ({source.format}) cannot be read: {error}")


@dataclass(frozen=True)
class _SourceAnnotations:
    """All annotations of a set, with its captions by image id."""

    read: SourceDataset
    captions: Mapping[str, Sequence[str]]

    def report(self, uses: Mapping[str, Use], leaked: frozenset[str] = frozenset()) -> SetReport:
        """Check each split."""
        source = self.read.source
        return SetReport(
            label=source.label,
            folder=str(source.path / source.images),
            splits=tuple(
                self._split_report(name, uses[name], dataset, leaked)
                for name, dataset in _splits(self.read.dataset)
            ),
        )

    def _split_report(
        self, name: str, use: Use, dataset: ReferringDataset, leaked: frozenset[str]
    ) -> SplitReport:
        missing = [i for i in dataset.images if not self.read.path_of(i).is_file()]
        # Sorted, because a set of strings has another order in every process, but two checks of the
        # same data should look at the same photos.
        there = sorted(dataset.images_by_id.keys() - {i.image_id for i in missing})
        drawn = np.random.default_rng(0).permutation(len(there))[:SAMPLE]
        sample = [dataset.images_by_id[there[row]] for row in sorted(drawn.tolist())]
        unreadable = [
            f"{image.file_name}: {problem}"
            for image in sample
            if (problem := self._photo_problem(image))
        ]
        described = {text.image_id for text in dataset.expressions}
        # Without expressions, the mean would be NaN, which JSON does not have.
        lengths = [len(text.text.split()) for text in dataset.expressions] or [0]
        duplicates, ambiguous = _count_repeats(dataset.expressions)
        return SplitReport(
            split=name,
            use=use,
            photos=len(dataset.images),
            instances=len(dataset.instances),
            expressions=len(dataset.expressions),
            expressions_by_kind=dict(Counter(t.kind or NO_KIND for t in dataset.expressions)),
            captions=sum(len(self.captions.get(i.image_id, ())) for i in dataset.images),
            photos_without_expressions=len(dataset.images) - len(described),
            missing=tuple(image.file_name for image in missing),
            sampled=len(sample),
            unreadable=tuple(unreadable),
            boxes_outside=sum(
                _extends_beyond(dataset.images_by_id[i.image_id], i.box_xyxy_px)
                for i in dataset.instances
            ),
            boxes_empty=sum(not _has_area(i.box_xyxy_px) for i in dataset.instances),
            duplicates=duplicates,
            ambiguous=ambiguous,
            # A photo may be in several splits, and leaks only from one that is trained on.
            leaked=len(leaked & dataset.images_by_id.keys()) if use == "train" else 0,
            mean_words=round(float(np.mean(lengths)), 2),
            p95_words=round(float(np.percentile(lengths, 95)), 1),
        )

    def _photo_problem(self, image: ReferringImage) -> str:
        """Decode a photo; return what is wrong with it, or an empty string."""
        try:
            found = decode(read_bytes(self.read.path_of(image)))
        except ImageError as error:
            return str(error)
        # Only the aspect ratio counts: boxes are relative to the annotated size, so that a smaller
        # copy of the photo serves as well.
        stretch = found.width_px * image.height_px / (found.height_px * image.width_px)
        if abs(stretch - 1) <= MAX_STRETCH:
            return ""
        return (
            f"{found.width_px} x {found.height_px} px, annotated as "
            f"{image.width_px} x {image.height_px} px"
        )


def _splits(dataset: ReferringDataset) -> Iterator[tuple[str, ReferringDataset]]:
    """Yield each split with its name, then the photos that are in no split."""
    if not dataset.splits:
        yield ALL, dataset
        return
    for name in dataset.splits:
        yield name, dataset.split(name)
    rest = dataset.images_by_id.keys() - frozenset().union(*dataset.splits.values())
    if rest:
        # A split only for this report, so that `split` selects the expressions and instances, too.
        yield REST, replace(dataset, splits={REST: frozenset(rest)}).split(REST)


def _count_repeats(expressions: Iterable[Expression]) -> tuple[int, int]:
    """Count the duplicate expressions and the ambiguous ones.

    An expression is a duplicate if the same instance has it already, and ambiguous if another
    instance of the photo has it, too.
    """
    instances_of: dict[tuple[str, str], Counter[str | None]] = defaultdict(Counter)
    for each in expressions:
        instances_of[each.image_id, normalize_expression(each.text)][each.instance_id] += 1
    duplicates = sum(count - 1 for of in instances_of.values() for count in of.values())
    return duplicates, sum(of.total() for of in instances_of.values() if len(of) > 1)


def _extends_beyond(image: ReferringImage, box: BoxPx) -> bool:
    x1, y1, x2, y2 = box
    right, bottom = image.width_px + ROUNDING_PX, image.height_px + ROUNDING_PX
    return min(x1, y1) < -ROUNDING_PX or x2 > right or y2 > bottom


def _has_area(box: BoxPx) -> bool:
    x1, y1, x2, y2 = box
    return x2 > x1 and y2 > y1


def _problems(found: SetReport) -> Iterator[str]:
    """Yield the reasons why a set cannot be used for training."""
    # Nobody needs the files of splits that a run does not use, such as those of "test".
    used = [split for split in found.splits if split.use != "unused"]
    photos = sum(split.photos for split in used)
    if missing := [name for split in used for name in split.missing]:
        yield (
            f"{found.label}: {len(missing)} of {photos} photos are not in {found.folder}: "
            f"{abbreviate(missing)}; download them, or set `images` to the folder that they are in"
        )
    if unreadable := [line for split in used for line in split.unreadable]:
        sampled = sum(split.sampled for split in used)
        yield (
            f"{found.label}: {len(unreadable)} of {sampled} sampled photos cannot be used: "
            f"{abbreviate(unreadable)}; download them again"
        )
    boxes = sum(split.instances for split in used)
    outside = sum(split.boxes_outside for split in used)
    if outside > MAX_OUTSIDE * boxes:
        yield (
            f"{found.label}: {outside} of {boxes} boxes extend beyond their photo, but at most "
            f"{MAX_OUTSIDE:.0%} may; check that the photos have the size that was annotated"
        )


def _notes(found: SetReport) -> Iterator[str]:
    """Yield the irregularities in a set that training handles."""
    for split in found.splits:
        name = f"{found.label}, split {split.split}" if len(found.splits) > 1 else found.label
        if split.missing and split.use in ("evaluation", "unused"):
            yield f"{name}: {len(split.missing)} of {split.photos} photos are not in {found.folder}"
        if split.boxes_outside:
            yield f"{name}: {split.boxes_outside} boxes extend beyond their photo and are clipped"
        if split.boxes_empty:
            yield f"{name}: {split.boxes_empty} boxes without area are ignored"
        if split.duplicates:
            yield f"{name}: {split.duplicates} expressions are duplicates for the same instance"
        if split.ambiguous:
            yield f"{name}: {split.ambiguous} expressions describe several instances of their photo"
