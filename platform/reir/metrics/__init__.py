"""Evaluation metrics on plain arrays."""

from __future__ import annotations

from reir.metrics.bootstrap import Interval, bootstrap_intervals
from reir.metrics.rec import RecHits, rec_hits
from reir.metrics.reir import (
    UNRANKED,
    Gallery,
    Queries,
    ReirRanks,
    ranked_instances,
    reir_ranks,
    top_instances,
)
from reir.metrics.sorec import SorecScores, sorec_scores
from reir.metrics.tir import image_ranks

__all__ = [
    "UNRANKED",
    "Gallery",
    "Interval",
    "Queries",
    "RecHits",
    "ReirRanks",
    "SorecScores",
    "bootstrap_intervals",
    "image_ranks",
    "ranked_instances",
    "rec_hits",
    "reir_ranks",
    "sorec_scores",
    "top_instances",
]
