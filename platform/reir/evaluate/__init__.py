"""Evaluation: annotated photos and an encoder -> figures with intervals, beside published ones.

Every task encodes its photos first, shard by shard, here or on other machines, and goes on from the
finished shards after a kill (`gallery`, `shards`, `work`). Then `reir`, `rec` and `tir` measure.
"""

from __future__ import annotations

from reir.evaluate.gallery import EncodedGallery, Encoding, Progress, encode_gallery
from reir.evaluate.rec import RecReport, evaluate_rec
from reir.evaluate.reir import ReirReport, evaluate_reir
from reir.evaluate.shards import EncodedShard, Runner, Shard, encode_shard
from reir.evaluate.tir import TirReport, evaluate_tir, texts_of

__all__ = [
    "EncodedGallery",
    "EncodedShard",
    "Encoding",
    "Progress",
    "RecReport",
    "ReirReport",
    "Runner",
    "Shard",
    "TirReport",
    "encode_gallery",
    "encode_shard",
    "evaluate_rec",
    "evaluate_reir",
    "evaluate_tir",
    "texts_of",
]
