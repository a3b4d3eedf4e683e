"""Judges of expressions: rules, and models."""
