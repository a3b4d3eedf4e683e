"""Evaluation on annotated photos: metrics with intervals, next to published results.

Each task first encodes its photos in shards, in this process or on Ray workers, and continues from
finished shards after an interruption (`encoded_gallery`, `shards`, `work_folder`). A localizer
instead finds each expression in its own photo (`localized_expressions`). The modules `reir`, `rec`,
`tir`, `resedis`, `sorec` and `probes` then compute the metrics of their task.
"""

from __future__ import annotations

from reir.evaluate.encoded_gallery import EncodedGallery, Encoding, Progress, encode_gallery
from reir.evaluate.probes import ProbeReport, evaluate_probes
from reir.evaluate.rec import RecReport, evaluate_rec, evaluate_rec_localizer
from reir.evaluate.reir import ReirReport, evaluate_reir
from reir.evaluate.resedis import ResedisReport, evaluate_resedis
from reir.evaluate.shards import EncodedShard, Runner, Shard, encode_shard
from reir.evaluate.sorec import SorecReport, evaluate_sorec, evaluate_sorec_localizer
from reir.evaluate.tir import TirReport, evaluate_tir, texts_of

__all__ = [
    "EncodedGallery",
    "EncodedShard",
    "Encoding",
    "ProbeReport",
    "Progress",
    "RecReport",
    "ReirReport",
    "ResedisReport",
    "Runner",
    "Shard",
    "SorecReport",
    "TirReport",
    "encode_gallery",
    "encode_shard",
    "evaluate_probes",
    "evaluate_rec",
    "evaluate_rec_localizer",
    "evaluate_reir",
    "evaluate_resedis",
    "evaluate_sorec",
    "evaluate_sorec_localizer",
    "evaluate_tir",
    "texts_of",
]
