"""What users say about searches: recorded exactly once, read, and exported as training data."""

from reir.errors import KeyReused
from reir.operations.feedback.database import (
    add_feedback,
    delete_feedback_before,
    is_recorded,
    read_feedback,
    remove_feedback,
    require_feedback,
    withdraw_feedback,
)
from reir.operations.feedback.records import Feedback, Submission, Verdict

__all__ = [
    "Feedback",
    "KeyReused",
    "Submission",
    "Verdict",
    "add_feedback",
    "delete_feedback_before",
    "is_recorded",
    "read_feedback",
    "remove_feedback",
    "require_feedback",
    "withdraw_feedback",
]
