"""Re-indexing a gallery: build a version beside the live one, check it, switch to it."""
