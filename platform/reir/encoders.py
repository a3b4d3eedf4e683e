"""Encoders by name: `KIND:SOURCE` -> an `InstanceEncoder`.

    clare-nano                                    the checkpoint that comes with the package
    clare:DIR, or just DIR                        a checkpoint of `reir train`
    clare-masks:DIR                               the same with masks, if it was trained with them
    owlv2:google/owlv2-base-patch16-ensemble      OWLv2, by hub name or directory
    siglip-crops:google/siglip2-base-patch16-224  boxes of clare-nano, SigLIP on their crops

A gallery version keeps the spec of its encoder, so that a search loads the same one by itself.
Parsing is light; a model and its library are imported when an encoder is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reir.errors import ConfigError, nearest_name

if TYPE_CHECKING:
    from reir.models.seams import InstanceEncoder
    from reir.store.contract import InstanceStore

SHIPPED_KIND, TRAINED_KIND, MASKS_KIND = "clare-nano", "clare", "clare-masks"
EXTRA = "pip install 'reir-platform[clare]'"


@dataclass(frozen=True)
class EncoderSpec:
    """Which encoder, and where its weights are.

    Attributes:
        kind: a key of `KINDS`.
        source: absolute directory or hub name; empty for the shipped checkpoint.
    """

    kind: str
    source: str = ""

    def __str__(self) -> str:
        return f"{self.kind}:{self.source}" if self.source else self.kind


def parse_encoder_spec(text: str) -> EncoderSpec:
    """Parse what `--encoder` takes; a directory is made absolute.

    Raises:
        ConfigError: the kind is not known, or lacks its source.
    """
    text = text.strip()
    if not text or text == SHIPPED_KIND:
        return EncoderSpec(SHIPPED_KIND)
    kind, colon, source = text.partition(":")
    if colon and source and kind in KINDS and kind != SHIPPED_KIND:
        return EncoderSpec(kind, _absolute(source))
    if _is_directory(text):
        return EncoderSpec(TRAINED_KIND, _absolute(text))
    if kind in KINDS:
        example = "" if kind == SHIPPED_KIND else ":NAME_OR_DIR"
        raise ConfigError(f"encoder {text!r} must read {kind}{example}; {_known()}")
    nearest = nearest_name(kind, tuple(KINDS))
    if colon or nearest:
        raise ConfigError(f"unknown kind of encoder {kind!r} in {text!r}{nearest}; {_known()}")
    raise ConfigError(f"encoder {text!r} is no directory and names no kind; {_known()}")


def load_encoder_spec(spec: str | EncoderSpec) -> InstanceEncoder:
    """Load the encoder that a spec names; an empty one is the shipped checkpoint.

    Raises:
        ConfigError: the spec cannot be parsed, or a package that it needs is not installed.
        CheckpointError: the model is not there, incomplete or of another kind.
    """
    parsed = parse_encoder_spec(spec) if isinstance(spec, str) else spec
    try:
        return KINDS[parsed.kind](parsed.source)
    except ImportError as error:
        said = str(error).strip().splitlines()[0]
        raise ConfigError(f"encoder {parsed} needs more packages ({said}); {EXTRA}") from error


def checkpoint_folder(spec: str) -> Path | None:
    """Return the checkpoint directory of a spec, where re-ranker and calibration lie too.

    None for frozen public models, which have neither.

    Raises:
        ConfigError: the spec cannot be parsed.
    """
    from reir.checkpoint import SHIPPED

    parsed = parse_encoder_spec(spec)
    if parsed.kind == SHIPPED_KIND:
        return SHIPPED
    return Path(parsed.source) if parsed.kind in (TRAINED_KIND, MASKS_KIND) else None


def stored_spec(store: InstanceStore, gallery: str) -> str:
    """Return the encoder spec of a gallery's live version; empty where there is none."""
    if gallery not in store.galleries():
        return ""
    live = [each for each in store.versions(gallery) if each.live]
    return live[0].spec.encoder if live else ""


def _load_shipped(_: str) -> InstanceEncoder:
    from reir.checkpoint import load_encoder

    return load_encoder(None)


def _load_trained(source: str) -> InstanceEncoder:
    from reir.checkpoint import load_encoder

    return load_encoder(Path(source))


def _load_masks(source: str) -> InstanceEncoder:
    from reir.checkpoint import load_encoder

    return load_encoder(Path(source), masks=True)


def _load_owlv2(source: str) -> InstanceEncoder:
    from reir.models.owlv2 import load_owlv2

    return load_owlv2(source, **_placed())


def _load_siglip_crops(source: str) -> InstanceEncoder:
    from reir.checkpoint import SHIPPED, load_model, weights_digest
    from reir.models.candidates import CandidateExtractor
    from reir.models.nano_encoder import fast_dtype
    from reir.models.siglip_crops import Detector, load_siglip_crops

    shipped, _ = load_model(SHIPPED)
    extractor = CandidateExtractor(shipped, fast_dtype())
    detector = Detector(extractor.propose, weights_digest(SHIPPED))
    return load_siglip_crops(source, detector, **_placed())


def _placed() -> dict[str, Any]:
    """Return device and precision for a large frozen model: a GPU where there is one."""
    import torch

    from reir.models.nano_encoder import fast_dtype

    if torch.cuda.is_available():
        return {"device": "cuda", "dtype": torch.bfloat16}
    return {"device": "cpu", "dtype": fast_dtype()}


def _is_directory(source: str) -> bool:
    return Path(source).expanduser().is_dir()


def _absolute(source: str) -> str:
    """Return a directory as an absolute path, and anything else, a hub name, as it is."""
    return str(Path(source).expanduser().resolve()) if _is_directory(source) else source


def _known() -> str:
    return f"known are {', '.join(KINDS)}, as in owlv2:google/owlv2-base-patch16-ensemble"


KINDS: Mapping[str, Callable[[str], InstanceEncoder]] = {
    SHIPPED_KIND: _load_shipped,
    TRAINED_KIND: _load_trained,
    MASKS_KIND: _load_masks,
    "owlv2": _load_owlv2,
    "siglip-crops": _load_siglip_crops,
}
