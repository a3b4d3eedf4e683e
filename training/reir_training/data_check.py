"""Is a data configuration fit for training? Counts and findings, before hours are spent.

Reads every declared set in full, looks for every photo, decodes a few. Knows no model; prints
nothing (`reir data check` does).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from pydantic import ConfigDict, model_validator

from reir.datasets.records import BoxPx, Expression, ReferringDataset, ReferringImage
from reir.errors import DataError, ImageError, nearest_name
from reir.images import decode, read_bytes
from reir.text import normalise_expression
from reir_training.config import ClareTrainConfig, DataConfig, DataSource, TrainConfig
from reir_training.examples import (
    TRAIN,
    VAL,
    read_captions,
    read_dataset,
    read_near_misses,
    use_of_photos,
)
from reir_training.leakage import REMEDY, ReadSet, find_leaks, left_out, shortened

Use = Literal["train", "held out", "unused", "evaluation"]

SAMPLE = 20
OVERHANG_PX = 1.0
"""By so much a box may reach beyond its photo: published boxes are rounded."""
MAX_OVERHANGING = 0.01
"""Share of such boxes above which they were made for photos of another size."""
MAX_STRETCH = 0.02
"""Relative difference of aspect ratios above which a file is not the photo that was annotated."""
ALL, REST, NO_KIND = "all", "rest", "unnamed"


class DataPart(DataConfig):
    """The data of any training configuration; other settings are known by name alone.

    Raises:
        ConfigError: by `load_config`, when a key belongs to no training configuration.
    """

    model_config = ConfigDict(extra="allow")

    @model_validator(mode="after")
    def _only_known_keys(self) -> DataPart:
        known = sorted({*TrainConfig.model_fields, *ClareTrainConfig.model_fields})
        for key in self.model_extra or {}:
            if key not in known:
                hint = nearest_name(key, known) or ";"
                raise ValueError(f"unknown key '{key}'{hint} allowed: {', '.join(known)}")
        return self


@dataclass(frozen=True, kw_only=True)
class SplitReport:
    """What one split of one set holds.

    Attributes:
        split: its name; "all" where the set has none, "rest" for photos that are in no split.
        use: what becomes of its photos.
        photos, instances, expressions, captions: counts.
        expressions_by_kind: "unnamed" where the file says nothing of kinds.
        photos_without_expressions: training learns from their boxes and captions.
        missing: photos whose file is not there.
        sampled: photos decoded.
        unreadable: of these, which are no image, or not the photo that was annotated, and why.
        boxes_outside: boxes that reach beyond their photo by more than a pixel.
        boxes_empty: boxes without area; training leaves them out.
        duplicates: expressions that repeat another one about the same instance.
        ambiguous: expressions that are also said of another instance of the photo.
        leaked: photos that an evaluation set holds too.
        mean_words, p95_words: length of the expressions.
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
    """What one declared set holds.

    Attributes:
        label: names it in messages.
        folder: where its photos should be.
        splits: each on its own; a photo may be in several.
    """

    label: str
    folder: str
    splits: tuple[SplitReport, ...]


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """What a data configuration holds.

    Attributes:
        sets: those that could be read.
        problems: why training must not start, each with what to do.
        notes: what training copes with.
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
        config: what is declared.
        on_set: told the label of each set before it is read.
    """
    unread: list[str] = []
    training = list(_readable(config.data, unread, on_set))
    evaluation = list(_readable(config.evaluation, unread, on_set))
    leaks = find_leaks([each.read for each in training], [each.read for each in evaluation])
    leaked = left_out(leaks)
    leaked_ids = [leaked.get(row, frozenset()) for row in range(len(training))]
    trained = [
        each.report(_uses_in_training(each.read.dataset), ids)
        for each, ids in zip(training, leaked_ids, strict=True)
    ]
    measured = [each.report(defaultdict(lambda: "evaluation")) for each in evaluation]
    problems = [*unread, *(problem for each in trained for problem in _problems(each))]
    notes = [note for each in (*trained, *measured) for note in _notes(each)]
    if config.exclude_evaluation:
        notes += [f"{leak}; left out" for leak in leaks]
    elif leaks:
        problems += [*map(str, leaks), REMEDY]
    if not unread and not any(map(_photos_to_train, training, leaked_ids)):
        problems.append("no photo is left to train on; add a source to data")
    to_train = [split for each in trained for split in each.splits if split.use == "train"]
    if not any(split.expressions or split.captions for split in to_train):
        notes.append("nothing to train on has expressions or captions: only boxes are learned")
    return DataReport(sets=(*trained, *measured), problems=tuple(problems), notes=tuple(notes))


def _photos_to_train(found: _FoundSet, leaked: frozenset[str]) -> int:
    """Photos that are left in the end."""
    use = use_of_photos(found.read.dataset)
    return sum(what == TRAIN for image_id, what in use.items() if image_id not in leaked)


def _uses_in_training(dataset: ReferringDataset) -> Mapping[str, Use]:
    """Name of a split -> its use, as `reir_training.examples.use_of_photos` has it."""
    uses: dict[str, Use] = {TRAIN: "train", VAL: "held out", ALL: "train"}
    rest: Use = "unused" if TRAIN in dataset.splits else "train"
    return {name: uses.get(name, rest) for name in (*dataset.splits, ALL, REST)}


def _readable(
    sources: Iterable[DataSource], unread: list[str], on_set: Callable[[str], None]
) -> Iterator[_FoundSet]:
    """Yield the sets that can be read; the others leave a line in `unread`."""
    for source in sources:
        on_set(source.label)
        try:
            read_near_misses(source.path)
            yield _FoundSet(ReadSet(source, read_dataset(source)), read_captions(source.path))
        except DataError as error:
            unread.append(f"{source.label} ({source.format}) cannot be read: {error}")


@dataclass(frozen=True)
class _FoundSet:
    """All annotations of a set: `captions` by image id."""

    read: ReadSet
    captions: Mapping[str, Sequence[str]]

    def report(self, uses: Mapping[str, Use], leaked: frozenset[str] = frozenset()) -> SetReport:
        """Check split by split."""
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
        there = sorted(dataset.images_by_id.keys() - {i.image_id for i in missing})
        drawn = np.random.default_rng(0).permutation(len(there))[:SAMPLE]
        sample = [dataset.images_by_id[there[row]] for row in sorted(drawn.tolist())]
        unreadable = [
            f"{image.file_name}: {problem}" for image in sample if (problem := self._decoded(image))
        ]
        described = {text.image_id for text in dataset.expressions}
        lengths = [len(text.text.split()) for text in dataset.expressions] or [0]
        duplicates, ambiguous = _repeated(dataset.expressions)
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
                _reaches_out(dataset.images_by_id[i.image_id], i.box_xyxy_px)
                for i in dataset.instances
            ),
            boxes_empty=sum(not _has_area(i.box_xyxy_px) for i in dataset.instances),
            duplicates=duplicates,
            ambiguous=ambiguous,
            leaked=len(leaked & dataset.images_by_id.keys()) if use == "train" else 0,
            mean_words=round(float(np.mean(lengths)), 2),
            p95_words=round(float(np.percentile(lengths, 95)), 1),
        )

    def _decoded(self, image: ReferringImage) -> str:
        """What is wrong with a photo, empty when nothing is."""
        try:
            found = decode(read_bytes(self.read.path_of(image)))
        except ImageError as error:
            return str(error)
        stretch = found.width_px * image.height_px / (found.height_px * image.width_px)
        if abs(stretch - 1) <= MAX_STRETCH:
            return ""
        return (
            f"{found.width_px} x {found.height_px} px, annotated as "
            f"{image.width_px} x {image.height_px} px"
        )


def _splits(dataset: ReferringDataset) -> Iterator[tuple[str, ReferringDataset]]:
    """Yield each split by name, and what is in none."""
    if not dataset.splits:
        yield ALL, dataset
        return
    for name in dataset.splits:
        yield name, dataset.split(name)
    rest = dataset.images_by_id.keys() - frozenset().union(*dataset.splits.values())
    if rest:
        yield REST, replace(dataset, splits={REST: frozenset(rest)}).split(REST)


def _repeated(expressions: Iterable[Expression]) -> tuple[int, int]:
    """Expressions that repeat an earlier one of their instance, and those said of several."""
    said: dict[tuple[str, str], Counter[str | None]] = defaultdict(Counter)
    for each in expressions:
        said[each.image_id, normalise_expression(each.text)][each.instance_id] += 1
    duplicates = sum(count - 1 for of in said.values() for count in of.values())
    return duplicates, sum(of.total() for of in said.values() if len(of) > 1)


def _reaches_out(image: ReferringImage, box: BoxPx) -> bool:
    x1, y1, x2, y2 = box
    right, bottom = image.width_px + OVERHANG_PX, image.height_px + OVERHANG_PX
    return min(x1, y1) < -OVERHANG_PX or x2 > right or y2 > bottom


def _has_area(box: BoxPx) -> bool:
    x1, y1, x2, y2 = box
    return x2 > x1 and y2 > y1


def _problems(found: SetReport) -> Iterator[str]:
    """Yield why a set cannot be trained on."""
    used = [split for split in found.splits if split.use != "unused"]
    photos = sum(split.photos for split in used)
    if missing := [name for split in used for name in split.missing]:
        yield (
            f"{found.label}: {len(missing)} of {photos} photos are not in {found.folder}: "
            f"{shortened(missing)}; fetch them, or set images to the folder they are in"
        )
    if unreadable := [line for split in used for line in split.unreadable]:
        sampled = sum(split.sampled for split in used)
        yield (
            f"{found.label}: {len(unreadable)} of {sampled} sampled photos cannot be used: "
            f"{shortened(unreadable)}; fetch them anew"
        )
    boxes = sum(split.instances for split in used)
    outside = sum(split.boxes_outside for split in used)
    if outside > MAX_OVERHANGING * boxes:
        yield (
            f"{found.label}: {outside} of {boxes} boxes reach beyond their photo, at most "
            f"{MAX_OVERHANGING:.0%} are taken; were they made for photos of another size?"
        )


def _notes(found: SetReport) -> Iterator[str]:
    """Yield what is odd in a set and does not stop training."""
    for split in found.splits:
        name = f"{found.label}, split {split.split}" if len(found.splits) > 1 else found.label
        if split.missing and split.use in ("evaluation", "unused"):
            yield f"{name}: {len(split.missing)} of {split.photos} photos are not in {found.folder}"
        if split.boxes_outside:
            yield f"{name}: {split.boxes_outside} boxes reach beyond their photo and are cut"
        if split.boxes_empty:
            yield f"{name}: {split.boxes_empty} boxes without area are left out"
        if split.duplicates:
            yield f"{name}: {split.duplicates} expressions repeat one of the same instance"
        if split.ambiguous:
            yield f"{name}: {split.ambiguous} expressions are said of several instances of a photo"
