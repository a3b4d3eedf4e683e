"""Names of encoders: parses specs of the form `KIND:SOURCE`, and loads the encoder of a spec.

    clare-nano                                    the checkpoint that comes with the package
    clare:DIR, or just DIR                        a checkpoint written by `reir train`
    clare-masks, or clare-masks:DIR               one of these, with the masks of its instances
    owlv2:google/owlv2-base-patch16-ensemble      OWLv2, by hub name or directory
    siglip-crops:google/siglip2-base-patch16-224  boxes of clare-nano, SigLIP on their crops
    siglip-relations:NAME_OR_DIR                  the same, with the neighbors of each instance

A gallery version stores the spec of its encoder, so that searches load the same encoder. Parsing is
fast; a model and its library are imported only when an encoder is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reir.errors import ConfigError, nearest_name

if TYPE_CHECKING:
    from reir.models.interfaces import InstanceEncoder
    from reir.store.contract import InstanceStore

SHIPPED_KIND, TRAINED_KIND, MASKS_KIND = "clare-nano", "clare", "clare-masks"
OF_PACKAGE = (SHIPPED_KIND, MASKS_KIND)
"""Kinds that need no source: without one, they mean the checkpoint of the package."""
EXTRA = "pip install 'reir-platform[clare]'"


@dataclass(frozen=True)
class EncoderSpec:
    """The kind of an encoder, and where its weights are.

    Attributes:
        kind: a key of `KINDS`.
        source: absolute directory or hub name; empty for the checkpoint of the package.
    """

    kind: str
    source: str = ""

    def __str__(self) -> str:
        return f"{self.kind}:{self.source}" if self.source else self.kind


def parse_encoder_spec(text: str) -> EncoderSpec:
    """Parse the value of `--encoder`; a directory becomes an absolute path.

    Raises:
        ConfigError: the kind is unknown, or its source is missing.
    """
    text = text.strip()
    if not text or text in OF_PACKAGE:
        return EncoderSpec(text or SHIPPED_KIND)
    # At the first colon only, since a source may contain colons itself.
    kind, colon, source = text.partition(":")
    if colon and source and kind in KINDS and kind != SHIPPED_KIND:
        return EncoderSpec(kind, _absolute(source))
    if _is_directory(text):
        return EncoderSpec(TRAINED_KIND, _absolute(text))
    if kind in KINDS:
        example = "" if kind == SHIPPED_KIND else ":DIR" if kind == MASKS_KIND else ":NAME_OR_DIR"
        raise ConfigError(f"encoder {text!r} must have the form {kind}{example}; {_known_kinds()}")
    nearest = nearest_name(kind, tuple(KINDS))
    if colon or nearest:
        raise ConfigError(
            f"unknown kind of encoder {kind!r} in {text!r}{nearest or ';'} {_known_kinds()}"
        )
    raise ConfigError(f"encoder {text!r} is neither a directory nor a kind; {_known_kinds()}")


def load_encoder_spec(spec: str | EncoderSpec) -> InstanceEncoder:
    """Load the encoder of a spec; an empty spec stands for the shipped checkpoint.

    Raises:
        ConfigError: the spec cannot be parsed, or a package that it needs is not installed.
        CheckpointError: the model is missing, incomplete or of another kind.
    """
    parsed = parse_encoder_spec(spec) if isinstance(spec, str) else spec
    try:
        return KINDS[parsed.kind](parsed.source)
    # The optional packages are imported by the loaders, not when this module is.
    except ImportError as error:
        message = str(error).strip().splitlines()[0]
        raise ConfigError(f"encoder {parsed} needs more packages ({message}); {EXTRA}") from error


def checkpoint_folder(spec: str) -> Path | None:
    """Return the checkpoint directory of a spec, which may contain a re-ranker and a calibration.

    It is None for frozen public models, which have neither.

    Raises:
        ConfigError: the spec cannot be parsed.
    """
    from reir.checkpoint import SHIPPED

    parsed = parse_encoder_spec(spec)
    if not parsed.source:
        return SHIPPED
    return Path(parsed.source) if parsed.kind in (TRAINED_KIND, MASKS_KIND) else None


def with_masks(spec: str) -> str:
    """Return the spec of the same encoder with masks.

    Raises:
        ConfigError: the encoder has none, or the spec cannot be parsed.
    """
    parsed = parse_encoder_spec(spec)
    if checkpoint_folder(spec) is None:
        raise ConfigError(
            f"encoder {parsed} has no masks; use the shipped checkpoint or one of `reir train`"
        )
    return str(EncoderSpec(MASKS_KIND, parsed.source))


def stored_spec(store: InstanceStore, gallery: str, version: str = "") -> str:
    """Return the encoder spec of a version, by default of the live one; empty if there is none."""
    if gallery not in store.galleries():
        return ""
    found = (each for each in store.versions(gallery) if each.name == version or not version)
    return next((each.spec.encoder for each in found if version or each.live), "")


def _load_shipped(_: str) -> InstanceEncoder:
    from reir.checkpoint import load_encoder

    return load_encoder(None)


def _load_trained(source: str) -> InstanceEncoder:
    from reir.checkpoint import load_encoder

    return load_encoder(Path(source))


def _load_masks(source: str) -> InstanceEncoder:
    from reir.checkpoint import load_encoder

    return load_encoder(Path(source) if source else None, masks=True)


def _load_owlv2(source: str) -> InstanceEncoder:
    from reir.models.owlv2 import load_owlv2

    return load_owlv2(source, **_device_options())


def _load_siglip_crops(source: str, *, relation_share: float = 0.0) -> InstanceEncoder:
    from reir.checkpoint import SHIPPED, load_model, weights_digest
    from reir.models.nano.candidates import CandidateExtractor
    from reir.models.nano.encoder import fast_dtype
    from reir.models.siglip_crops import Detector, load_siglip_crops

    # SigLIP detects nothing itself. The detector of clare-nano comes with the package.
    shipped, _ = load_model(SHIPPED)
    extractor = CandidateExtractor(shipped, fast_dtype())
    detector = Detector(extractor.propose, weights_digest(SHIPPED))
    return load_siglip_crops(source, detector, relation_share=relation_share, **_device_options())


def _load_siglip_relations(source: str) -> InstanceEncoder:
    from reir.models.siglip_crops import RELATION_SHARE

    return _load_siglip_crops(source, relation_share=RELATION_SHARE)


def _device_options() -> dict[str, Any]:
    """Return the device and precision for a large frozen model: a GPU if there is one."""
    import torch

    from reir.models.nano.encoder import fast_dtype

    if torch.cuda.is_available():
        return {"device": "cuda", "dtype": torch.bfloat16}
    return {"device": "cpu", "dtype": fast_dtype()}


def _is_directory(source: str) -> bool:
    return Path(source).expanduser().is_dir()


def _absolute(source: str) -> str:
    """Return a directory as an absolute path, and a hub name unchanged."""
    # The spec is stored with the gallery, and a search may run in another working directory.
    return str(Path(source).expanduser().resolve()) if _is_directory(source) else source


def _known_kinds() -> str:
    return f"use one of {', '.join(KINDS)}, e.g. owlv2:google/owlv2-base-patch16-ensemble"


# At the end of the module, because it refers to the functions above.
KINDS: Mapping[str, Callable[[str], InstanceEncoder]] = {
    SHIPPED_KIND: _load_shipped,
    TRAINED_KIND: _load_trained,
    MASKS_KIND: _load_masks,
    "owlv2": _load_owlv2,
    "siglip-crops": _load_siglip_crops,
    "siglip-relations": _load_siglip_relations,
}
