"""PIZA: progressive-iterative zooming for small instances (docs/piza.md)."""
