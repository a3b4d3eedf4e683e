"""Errors about one photo: the answer of a model cannot be used, or there is none, or none yet."""

from __future__ import annotations

from reir.errors import ReirError


class AnswerRefused(ReirError):
    """A model answered, but the answer cannot be used; the message says why."""


class ModelUnavailable(ReirError):
    """A model did not answer; another run may succeed. The message says why."""


class AnswerPending(ReirError):
    """The question waits for the next batch; ask again after it."""
