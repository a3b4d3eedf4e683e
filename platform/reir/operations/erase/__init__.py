"""Erasing photos for good: from all versions, logs and uploads, with a receipt."""
