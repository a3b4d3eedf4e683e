"""`ReferringDataset`: the photos, instances and expressions that every annotation reader returns.

Boxes are xyxy in pixels of the photo at the annotated size. Identifiers are strings, even if the
file has numbers.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType

from reir.errors import DataError, nearest_name
from reir.records import MaskRle

BoxPx = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferringImage:
    """One photo of the gallery.

    Attributes:
        image_id: id of the photo, unique in the dataset.
        file_name: path of the file, relative to the folder of photos.
        width_px, height_px: annotated size. Boxes refer to it, even if the file has another size.
    """

    image_id: str
    file_name: str
    width_px: int
    height_px: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferringInstance:
    """One annotated instance.

    Attributes:
        instance_id: id of the instance, unique in the dataset.
        image_id: id of its photo.
        box_xyxy_px: its box; published files contain some boxes without area.
        category: class name; None if the file has none.
        is_crowd: whether the box covers a group instead of one instance; such boxes are not used
            for training.
        mask: its pixels; None if the file has no mask for it, or masks were not requested.
        score: confidence in [0, 1] of a box that a model found; None for a box that people drew.
    """

    instance_id: str
    image_id: str
    box_xyxy_px: BoxPx
    category: str | None = None
    is_crowd: bool = False
    mask: MaskRle | None = None
    score: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Expression:
    """One sentence about one instance of one photo.

    A sentence about several instances, of one photo or of several, has one `Expression` for each,
    and all of them have the same `query_id`.

    Attributes:
        expression_id: id of the expression, unique in the dataset.
        image_id: id of the photo that it was written for.
        instance_id: id of the instance that it describes; None if the photo has no such instance.
        text: the sentence as written.
        kind: its style according to the file, for example "long".
        split: its split, if the data set splits expressions instead of photos.
        query_id: the same for all instances that a sentence describes; None if it is only one.
    """

    expression_id: str
    image_id: str
    instance_id: str | None
    text: str
    kind: str | None = None
    split: str | None = None
    query_id: str | None = None

    @property
    def query(self) -> str:
        """Id of the query: `query_id`, or the id of the expression if it has none."""
        return self.query_id or self.expression_id


# No slots, unlike the records above, because `cached_property` writes into `__dict__`. That is
# allowed although the class is frozen, since it does not go through `__setattr__`.
@dataclass(frozen=True, kw_only=True)
class ReferringDataset:
    """A validated set of photos, instances and expressions.

    Attributes:
        source: file or folder that it was read from, for messages.
        images: photos of the gallery, including those without expressions.
        instances: all annotated instances of these photos, with or without expressions.
        expressions: expressions in the order of the file. Evaluations that use one expression per
            instance use its first one.
        splits: name of each split -> ids of its photos. A photo may be in several splits.

    Raises:
        DataError: an identifier is used twice or unknown, or the box of a described instance is
            not (partly) inside its photo.
    """

    source: str
    images: tuple[ReferringImage, ...]
    instances: tuple[ReferringInstance, ...]
    expressions: tuple[Expression, ...]
    splits: Mapping[str, frozenset[str]] = field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        """Check identifiers, references and targets."""
        self._check_unique("image", (image.image_id for image in self.images))
        self._check_unique("instance", (instance.instance_id for instance in self.instances))
        self._check_unique("expression", (text.expression_id for text in self.expressions))
        for instance in self.instances:
            if instance.image_id not in self.images_by_id:
                self._fail("instance", instance.instance_id, f"unknown image {instance.image_id!r}")
        for expression in self.expressions:
            problem = self._problem(expression)
            if problem:
                self._fail("expression", expression.expression_id, problem)
        for name, members in self.splits.items():
            if not members <= self.images_by_id.keys():
                unknown = min(members - self.images_by_id.keys())
                self._fail("split", name, f"unknown image {unknown!r}")

    @cached_property
    def images_by_id(self) -> Mapping[str, ReferringImage]:
        """Image id -> photo."""
        return {image.image_id: image for image in self.images}

    @cached_property
    def instances_by_id(self) -> Mapping[str, ReferringInstance]:
        """Instance id -> instance."""
        return {instance.instance_id: instance for instance in self.instances}

    def split(self, name: str) -> ReferringDataset:
        """Return the photos of one split with their instances and expressions, without split names.

        Raises:
            DataError: there is no such split.
        """
        if name not in self.splits:
            raise DataError(
                f"{self.source}: no split {name!r}, it has {sorted(self.splits)}"
                f"{nearest_name(name, list(self.splits))}"
            )
        part = self.of_images(self.splits[name])
        # A photo may be in several splits of a data set that splits expressions, so its other
        # expressions have to be left out.
        own = (text for text in part.expressions if text.split in (None, name))
        # What remains has no splits, so that a caller may define new ones, such as held-out photos.
        kept = tuple(replace(text, split=None) for text in own)
        return replace(part, source=f"{self.source}[{name}]", expressions=kept, splits={})

    def of_images(self, image_ids: Collection[str]) -> ReferringDataset:
        """Return these photos with their instances and expressions."""
        return replace(
            self,
            images=tuple(image for image in self.images if image.image_id in image_ids),
            instances=tuple(item for item in self.instances if item.image_id in image_ids),
            expressions=tuple(text for text in self.expressions if text.image_id in image_ids),
            splits={name: ids.intersection(image_ids) for name, ids in self.splits.items()},
        )

    def first_images(self, num: int | None) -> ReferringDataset:
        """Return the first `num` photos with their instances and expressions; None for all."""
        return self.of_images({image.image_id for image in self.images[:num]})

    def of_kind(self, kind: str) -> ReferringDataset:
        """Return the same photos and instances with the expressions of one kind only."""
        return self.with_expressions(text for text in self.expressions if text.kind == kind)

    def with_targets(self) -> ReferringDataset:
        """Return the dataset without expressions that describe no instance."""
        return self.with_expressions(text for text in self.expressions if text.instance_id)

    def first_expressions(self) -> ReferringDataset:
        """Return the dataset with only the first expression of each instance."""
        first: dict[str, Expression] = {}
        for text in self.expressions:
            first.setdefault(text.instance_id or text.expression_id, text)
        return self.with_expressions(first.values())

    def with_expressions(self, expressions: Iterable[Expression]) -> ReferringDataset:
        """Return the same photos and instances with other expressions about them."""
        return ReferringDataset(
            source=self.source,
            images=self.images,
            instances=self.instances,
            expressions=tuple(expressions),
            splits=self.splits,
        )

    def _problem(self, expression: Expression) -> str:
        """Return what is wrong with an expression; empty if nothing is."""
        image = self.images_by_id.get(expression.image_id)
        if image is None:
            return f"unknown image {expression.image_id!r}"
        if not expression.text.strip():
            return "the text is blank"
        if expression.instance_id is None:
            return ""
        target = self.instances_by_id.get(expression.instance_id)
        if target is None:
            return f"unknown instance {expression.instance_id!r}"
        if target.image_id != image.image_id:
            return (
                f"is about image {image.image_id!r} but its instance {target.instance_id!r} "
                f"is in image {target.image_id!r}"
            )
        # Only the box of a described instance must be usable: published files contain others
        # without area, and many boxes reach a little beyond their photo.
        if not is_inside(image, target.box_xyxy_px):
            return (
                f"expected a target box with an area inside {image.width_px} x "
                f"{image.height_px} px, got {target.box_xyxy_px} (xyxy)"
            )
        return ""

    def _check_unique(self, what: str, identifiers: Iterable[str]) -> None:
        seen: set[str] = set()
        for identifier in identifiers:
            if identifier in seen:
                self._fail(what, identifier, "this id is used twice")
            seen.add(identifier)

    def _fail(self, what: str, identifier: str, problem: str) -> None:
        raise DataError(f"{self.source}: {what} {identifier!r}: {problem}")


def is_inside(image: ReferringImage, box: BoxPx) -> bool:
    """Whether the box has an area, some of which is inside the photo."""
    x1, y1, x2, y2 = box
    wide = min(x2, image.width_px) - max(x1, 0)
    high = min(y2, image.height_px) - max(y1, 0)
    return all(map(math.isfinite, box)) and wide > 0 and high > 0
