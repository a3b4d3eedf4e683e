"""Pseudo-labels: boxes that a localizer found, for sentences of which nobody drew one."""
