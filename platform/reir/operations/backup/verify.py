"""Compares a restored version with its backup: ledger, sampled photos, and answers to searches."""

# Shapes: Q queries, N instances, D vector dimension, K best instances

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from reir.operations.backup.format import Counts
from reir.operations.backup.saved import SavedBackup
from reir.records import FloatArray, IndexedImage
from reir.store.contract import InstanceRow, InstanceStore, ServerStore, VersionInfo
from reir.store.validation import instance_id, same_spec

NUM_QUERIES = 50
NUM_HITS = 10
TOLERANCE = 1e-5
"""Difference up to which two scores count as equal."""

MIN_RECALL = 0.99
"""Least recall of the searches of a server, whose index is approximate."""

_NOISE = 0.3
"""Length of the noise that is added to an instance vector to make a query."""
