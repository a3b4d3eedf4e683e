"""Verification: comparing the first hits with the pixels of their photos."""
