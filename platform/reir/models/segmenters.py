"""Names of segmenters: parses specs of the form `KIND:SOURCE`, and loads the segmenter of a spec.

    sam2:facebook/sam2.1-hiera-tiny     SAM 2, by hub name or directory

Without a spec, a checkpoint's own mask head is the segmenter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from reir.encoders import EXTRA
from reir.errors import ConfigError, nearest_name

if TYPE_CHECKING:
    from reir.models.interfaces import Segmenter


def load_segmenter_spec(spec: str) -> Segmenter:
    """Load the segmenter of a spec.

    Raises:
        ConfigError: the spec cannot be parsed, or a package that it needs is not installed.
        CheckpointError: the model is missing, incomplete or of another kind.
    """
    kind, _, source = spec.strip().partition(":")
    if kind not in KINDS or not source:
        raise ConfigError(
            f"unknown segmenter {spec!r}{nearest_name(kind, tuple(KINDS)) or ';'} "
            f"use sam2:NAME_OR_DIR, e.g. sam2:facebook/sam2.1-hiera-tiny"
        )
    try:
        return KINDS[kind](source)
    except ImportError as error:
        message = str(error).strip().splitlines()[0]
        raise ConfigError(f"segmenter {spec} needs more packages ({message}); {EXTRA}") from error


def _load_sam2(source: str) -> Segmenter:
    from reir.models.sam2 import load_sam2

    return load_sam2(source)


# At the end of the module, because it refers to the functions above.
KINDS: Mapping[str, Callable[[str], Segmenter]] = {"sam2": _load_sam2}
