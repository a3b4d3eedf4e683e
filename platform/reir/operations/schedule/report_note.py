"""How a command that a scheduler started tells it where its report is: in a file, the note."""

from __future__ import annotations

import os
from pathlib import Path

REPORT_NOTE = "REIR_REPORT_NOTE"
"""Environment variable with the path of the note."""


def note_report(page: Path) -> None:
    """Write the path of a report into the note, if a scheduler has started this command."""
    if note := os.environ.get(REPORT_NOTE):
        Path(note).write_text(str(page), encoding="utf-8")


def take_report_note(note: Path) -> str:
    """Return the path of the report, and delete the note; empty if there is none."""
    if not note.exists():
        return ""
    text = note.read_text(encoding="utf-8")
    note.unlink()
    return text
