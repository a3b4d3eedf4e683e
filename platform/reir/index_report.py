"""Progress of an indexing run, and the report at its end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import accumulate, pairwise
from typing import Any, Literal

from rich.table import Table

Stage = Literal["list", "read", "decode", "encode", "store"]
STAGES: tuple[Stage, ...] = ("list", "read", "decode", "encode", "store")

MAX_KINDS = 8
"""Number of kinds of skipped files that are named in a table; the others are counted together."""


@dataclass(frozen=True)
class IndexProgress:
    """Progress of a run.

    Attributes:
        done: images whose state is in the ledger.
        total: images in the source; None until the listing has ended.
        failed: images among `done` that could not be indexed.
        shares: stage -> its fraction of the busy time of all stages; the fractions sum to 1.
    """

    done: int
    total: int | None
    failed: int
    # Not compared, because measured times differ from run to run.
    shares: Mapping[Stage, float] = field(default_factory=dict, compare=False)

    @property
    def percent(self) -> Mapping[Stage, int]:
        """The shares as whole percentages that sum to 100."""
        # Rounding the running totals keeps the sum at 100; rounding each share would not.
        ends = [round(100 * end) for end in accumulate(self.shares.values())]
        parts = (end - start for start, end in pairwise([0, *ends]))
        return dict(zip(self.shares, parts, strict=True))


@dataclass(frozen=True, kw_only=True, repr=False)
class IndexReport:
    """What a run did with every image of the source, and the time and memory it took.

    Each listed image is counted once: new, changed, unchanged, failed or erased.

    Attributes:
        gallery, version: the version that was written.
        num_images: ledger rows of the version after the run, from all sources.
        num_instances: instance rows of the version after the run.
        kept_versions: other versions of the gallery -> their ledger rows, oldest first.
        new: images indexed for the first time.
        changed: images indexed again, because the content changed or the last attempt failed.
        unchanged: images indexed earlier and left as they are.
        failed: reason -> images that cannot be indexed, including those from earlier runs.
        failed_before: how many of `failed` are from earlier runs and were not tried again.
        unlisted: folders, archives and lines of the source that could not be listed; their images
            are left as they are.
        erased: images that `reir erase` has deleted, and that are therefore left out.
        skipped: suffix -> files in the folder that are not images, as in `LocalSource.skipped`.
        duplicates: images among the new, changed and unchanged ones whose content another image
            already held.
        merged: images that two concurrent runs both stored; they are duplicates now.
        near_duplicates: images of the gallery that look like another one but are not identical.
        missing: images of the gallery whose file is gone from the source; still searchable.
        removed: such images that were deleted from the gallery.
        instances: instances written by this run.
        read: number of files that this run opened.
        read_bytes: total size of those files.
        sizes: longer side of the indexed photos -> number of images and of instances.
        seconds: wall time.
        stage_seconds: stage -> busy seconds, summed over threads; stages overlap.
        peak_rss_bytes: peak memory of this process.
    """

    gallery: str
    version: str
    num_images: int
    num_instances: int
    kept_versions: Mapping[str, int]
    new: int
    changed: int
    unchanged: int
    failed: Mapping[str, int]
    failed_before: int
    unlisted: int
    erased: int
    duplicates: int
    merged: int
    near_duplicates: int
    missing: int
    removed: int
    instances: int
    read: int
    read_bytes: int
    sizes: Mapping[str, Mapping[str, int]]
    seconds: float
    stage_seconds: Mapping[str, float]
    peak_rss_bytes: int
    skipped: Mapping[str, int] = field(default_factory=dict)

    @property
    def num_failed(self) -> int:
        """Images that cannot be indexed."""
        return sum(self.failed.values())

    @property
    def num_listed(self) -> int:
        """Images in the source."""
        return self.new + self.changed + self.unchanged + self.num_failed + self.erased

    @property
    def images_per_s(self) -> float:
        """Files opened per second; 0.0 when nothing was read."""
        return self.read / self.seconds if self.seconds > 0 else 0.0

    def __repr__(self) -> str:
        return (
            f"IndexReport(gallery {self.gallery!r}, {self.new} new, {self.changed} changed, "
            f"{self.unchanged} unchanged, {self.num_failed} failed, {self.instances} instances "
            f"written, {self.seconds:.1f} s)"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, the form that `reir index --json` prints."""
        derived = {
            "num_failed": self.num_failed,
            "num_listed": self.num_listed,
            "images_per_s": round(self.images_per_s, 3),
        }
        return asdict(self) | derived

    def table(self) -> Table:
        """Return the summary for a terminal."""
        table = Table(title=f"gallery {self.gallery}, version {self.version}", show_header=False)
        table.add_column(style="bold")
        table.add_column(justify="right")
        table.add_column(style="dim")
        for name, value, remark in self._rows():
            table.add_row(name, value, remark)
        return table

    def _rows(self) -> Iterator[tuple[str, str, str]]:
        yield "new", f"{self.new:,}", ""
        yield "changed", f"{self.changed:,}", ""
        yield "unchanged", f"{self.unchanged:,}", ""
        earlier = f"{self.failed_before:,} in an earlier run" if self.failed_before else ""
        yield "failed", f"{self.num_failed:,}", earlier
        for reason, count in sorted(self.failed.items()):
            yield f"  {reason}", f"{count:,}", ""
        for name, number, remark in self._exceptions():
            if number:
                yield name, f"{number:,}", remark
        yield "instances written", f"{self.instances:,}", ""
        for size, counts in self.sizes.items():
            instances = f"{counts['instances']:,} instances"
            yield f"  photos of {size} px", f"{counts['images']:,}", instances
        rate = f"{self.images_per_s:,.1f} images/s" if self.read else ""
        yield "time", f"{self.seconds:,.1f} s", rate
        busy = ", ".join(f"{name} {self.stage_seconds[name]:.1f}" for name in STAGES)
        yield "busy seconds", f"{sum(self.stage_seconds.values()):,.1f}", busy
        yield "peak memory", f"{self.peak_rss_bytes / 2**20:,.0f} MiB", "of this process"

    def _exceptions(self) -> Iterator[tuple[str, int, str]]:
        """Yield the counts that are 0 in most runs, with a remark."""
        yield "not listed", self.unlisted, "folders, archives or lines; see warnings"
        yield "erased", self.erased, "left out; --include-erased indexes them again"
        yield "skipped", sum(self.skipped.values()), format_counts(self.skipped)
        yield "duplicates", self.duplicates, "same content as another photo"
        yield "merged", self.merged, "two concurrent runs stored them; now duplicates"
        yield "near duplicates", self.near_duplicates, "in the whole gallery"
        yield "gone from source", self.missing, "still searchable; --prune removes them"
        yield "removed", self.removed, "their files are gone from source"


def format_counts(numbers: Mapping[str, int]) -> str:
    """Return, for example, ".mov 12, hidden 3 and 4 others", the largest numbers first."""
    ordered = sorted(numbers.items(), key=lambda each: (-each[1], each[0]))
    text = ", ".join(f"{name} {number:,}" for name, number in ordered[:MAX_KINDS])
    rest = sum(number for _, number in ordered[MAX_KINDS:])
    return f"{text} and {rest:,} others" if rest else text
