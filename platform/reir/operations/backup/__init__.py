"""Backups of galleries in open files: written, checked, restored and verified."""
