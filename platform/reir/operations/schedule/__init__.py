"""Schedules of one machine: which `reir` command runs when, and how its runs ended."""
