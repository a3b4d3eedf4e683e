"""Helpers for tests of readers and evaluations."""
