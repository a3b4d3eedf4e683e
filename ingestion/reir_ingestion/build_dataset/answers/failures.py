"""Errors about one photo: the answer of a model cannot be used, or there is none."""

from __future__ import annotations

from reir.errors import ReirError


class AnswerRefused(ReirError):
    """A model answered, but the answer cannot be used; the message says why."""


class ModelUnavailable(ReirError):
    """A model did not answer; another run may succeed. The message says why."""
