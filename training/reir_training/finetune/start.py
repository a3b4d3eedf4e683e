"""The model from which a fine-tune starts: that of the live version of a gallery."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from reir.checkpoint import NANO, read_config, weights_digest
from reir.encoders import MASKS_KIND, checkpoint_folder, parse_encoder_spec, stored_spec
from reir.errors import ConfigError
from reir.store.contract import InstanceStore


@dataclass(frozen=True)
class StartModel:
    """A checkpoint of `clare-nano`.

    Attributes:
        folder: checkpoint directory.
        digest: sha256 of its weights.
        masks: whether the gallery was indexed with the masks of its instances.
    """

    folder: Path
    digest: str
    masks: bool = False


def start_model_of(store: InstanceStore, gallery: str) -> StartModel:
    """Return the checkpoint that the live version of a gallery was indexed with.

    Raises:
        ConfigError: it is no `clare-nano`, or its weights have changed since.
        CheckpointError: it is incomplete.
        GalleryNotFound: there is no such gallery, or none of its versions is live.
    """
    spec = stored_spec(store, gallery, store.live_version(gallery))
    folder = checkpoint_folder(spec)
    if folder is None or read_config(folder)["model"] != NANO:
        raise ConfigError(
            f"gallery '{gallery}' was indexed with {spec}, but only {NANO} can be fine-tuned; "
            f"build a version with it first: reir reindex {gallery} --encoder {NANO}"
        )
    digest = weights_digest(folder)
    indexed = next(each.spec.digest for each in store.versions(gallery) if each.live)
    if digest != indexed:
        raise ConfigError(
            f"gallery '{gallery}' was indexed with weights {indexed[:12]}, but {folder} has "
            f"{digest[:12]} now; index it again first: reir reindex {gallery}"
        )
    return StartModel(folder, digest, parse_encoder_spec(spec).kind == MASKS_KIND)
