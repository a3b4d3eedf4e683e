"""Does zooming find small instances that the same model without zoom misses?

    python benchmarks/piza.py [--base DIR] [--epochs 12]        an hour and a half on two cores
    python benchmarks/piza.py --base DIR                        40 minutes

A small model of GroundingDINO's shape is trained on ordinary generated scenes, or read from
`--base`. Then `reir train --preset piza` trains adapters of it on large generated scenes, whose
small instances cover .02 to .1 % of the photo: Adapter+ without zoom, PIZA-Adapter+ whose adapters
are told nothing about the search, and PIZA-Adapter+, each with the same number of steps. All of
them, and the base itself (`zero_shot`), search held-out scenes. `piza.zoom_ratio` is the mAcc of
PIZA-Adapter+ divided by that of Adapter+ without zoom.

The benchmark also kills and resumes a training of a tiny model at a random step, and compares a
step of two workers with that of one.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from _report import write_report

from reir.models.localizers import load_localizer_spec
from reir_testing.piza.large_scenes import PHOTOS, make_large_scenes, save_large_scenes
from reir_testing.piza.small_base import SIDE_PX, WIDTH, save_small_base, train_small_base
from reir_testing.training.kills import TrainCommand, compare, run_killed
from reir_testing.training.tiny import tiny_piza_settings
from reir_testing.training.workers import CASES, step_alone, steps_of_workers
from reir_training.config import DataSource
from reir_training.data.examples import build_photos, read_dataset
from reir_training.piza.validate import validate_localizer

BASE_STEPS = 2000
TRAIN_SCENES, VAL_SCENES = 90, 20
TRAIN_SEED, VAL_SEED = 10, 20
ARMS: Mapping[str, Mapping[str, str]] = {
    "adapter": {"method": "adapter"},
    "zoom_only": {"method": "piza-adapter", "inserted": "nothing"},
    "piza": {"method": "piza-adapter"},
}
