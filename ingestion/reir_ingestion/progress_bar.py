"""The progress bar of an indexing run, on standard error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich import progress as bars
from rich.console import RenderableType
from rich.text import Text

from reir.cli.common import messages
from reir.index_report import IndexProgress


@contextmanager
def progress_bar() -> Iterator[Callable[[IndexProgress], None]]:
    """Show the photos done, rate, time left and failures on standard error."""
    columns = (
        bars.TextColumn("photos"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TextColumn("{task.fields[rate]}"),
        bars.TimeRemainingColumn(),
        bars.TextColumn("{task.fields[failures]}"),
    )

    class StageProgress(bars.Progress):
        """The progress bar, and below it the share of the busy time that each stage has."""

        stages = ""

        def get_renderables(self) -> Iterator[RenderableType]:
            yield from super().get_renderables()
            yield Text(self.stages, style="dim")

    with StageProgress(*columns, console=messages()) as bar:
        task = bar.add_task("photos", total=None, rate="", failures="")

        def show(now: IndexProgress) -> None:
            bar.update(
                task,
                completed=now.done,
                total=now.total,
                rate=f"{bar.tasks[0].speed or 0:.1f} photos/s",
                failures=f"[red]{now.failed:,} failed" if now.failed else "",
            )
            shares = (f"{stage} {share}%" for stage, share in now.percent.items())
            bar.stages = f"busy time: {', '.join(shares)}"

        yield show
