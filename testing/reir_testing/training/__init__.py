"""Helpers that the tests and benchmarks of training share."""
