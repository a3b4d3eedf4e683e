"""Operating galleries: versions and their history, canaries, quality gate, backup, erasure."""
