"""Names of localizers: parses specs of the form `KIND:SOURCE`, and loads the localizer of a spec.

grounding-dino:IDEA-Research/grounding-dino-tiny    GroundingDINO or MM-GroundingDINO, by hub
                                                    name or directory
piza:DIR                                            adapters written by `reir train --preset piza`,
                                                    which zoom in on small instances
weak:DIR                                            model that was trained without boxes, by
                                                    `reir train --preset weak-rec`
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from reir.encoders import EXTRA
from reir.errors import ConfigError, nearest_name

if TYPE_CHECKING:
    from reir.models.interfaces import ExpressionLocalizer


def load_localizer_spec(spec: str) -> ExpressionLocalizer:
    """Load the localizer of a spec.

    Raises:
        ConfigError: the spec cannot be parsed, or a package that it needs is not installed.
        CheckpointError: the model is missing, incomplete or of another kind.
    """
    kind, source = parse_localizer_spec(spec)
    try:
        return KINDS[kind](source)
    except ImportError as error:
        message = str(error).strip().splitlines()[0]
        raise ConfigError(f"localizer {spec} needs more packages ({message}); {EXTRA}") from error


def parse_localizer_spec(spec: str) -> tuple[str, str]:
    """Return the kind of a localizer, a key of `KINDS`, and where its weights are.

    Raises:
        ConfigError: the kind is unknown, or its source is missing.
    """
    kind, _, source = spec.strip().partition(":")
    if kind not in KINDS or not source:
        raise ConfigError(
            f"unknown localizer {spec!r}{nearest_name(kind, tuple(KINDS)) or ';'} use "
            f"KIND:NAME_OR_DIR with kind {' or '.join(KINDS)}, "
            f"e.g. grounding-dino:IDEA-Research/grounding-dino-tiny"
        )
    return kind, source


def _load_grounding_dino(source: str) -> ExpressionLocalizer:
    from reir.models.grounding_dino import load_grounding_dino

    return load_grounding_dino(source)


def _load_piza(source: str) -> ExpressionLocalizer:
    from reir.models.piza.looks import load_zooming_localizer

    return load_zooming_localizer(source)


def _load_weak(source: str) -> ExpressionLocalizer:
    from reir.models.weak_rec.localizer import load_weak_localizer

    return load_weak_localizer(source)


# At the end of the module, because it refers to the functions above.
KINDS: Mapping[str, Callable[[str], ExpressionLocalizer]] = {
    "grounding-dino": _load_grounding_dino,
    "piza": _load_piza,
    "weak": _load_weak,
}
