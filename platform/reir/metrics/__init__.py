"""Evaluation metrics on plain arrays."""

from __future__ import annotations

from reir.metrics.bootstrap import Interval, bootstrap_intervals
from reir.metrics.rec import RecHits, rec_hits
from reir.metrics.reir import UNRANKED, Gallery, Queries, ReirRanks, reir_ranks, top_instances
from reir.metrics.tir import image_ranks

__all__ = [
    "UNRANKED",
    "Gallery",
    "Interval",
    "Queries",
    "RecHits",
    "ReirRanks",
    "bootstrap_intervals",
    "image_ranks",
    "rec_hits",
    "reir_ranks",
    "top_instances",
]
