"""Reads and writes checkpoint directories: `config.json`, `model.safetensors`, `tokenizer.json`.

The sha256 of the weights file is the digest that identifies a model revision. Weights of the
published CLARE are stored as trained. Those of `clare-nano` are stored in float16, and its word
embeddings, which are frozen in training and make up two fifths of the model, in int8 with a scale
for each row. Weights are safetensors only: opening a pickle could run code.

A directory may also contain a relation re-ranker, a mask head, a zoom policy and a color head
(`reir.checkpoint_parts`), each of which works only with what it was trained on: one model, or some
of its weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from reir.checkpoint_parts import CheckpointPart
from reir.errors import CheckpointError, nearest_name
from reir.models.interfaces import InstanceEncoder
from reir.models.nano.encoder import ClareNanoEncoder
from reir.models.nano.model import ClareNano

# Clare imports `transformers`, which takes longer than a search; only its own checkpoints need it.
if TYPE_CHECKING:
    from reir.models.clare.model import Clare
    from reir.models.nano.color_head import ColorHead
    from reir.models.nano.color_reader import ColorReader
    from reir.models.nano.crop_network import CropNetwork
    from reir.models.nano.mask_head import MaskHead
    from reir.models.nano.segmenter import NanoSegmenter
    from reir.models.query_zoom.policy import ZoomPolicy
    from reir.models.reranker import Reranker

SHIPPED = Path(__file__).parent / "checkpoints" / "clare-nano"
CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"
NANO, PUBLISHED = "clare-nano", "clare"
MODELS = (NANO, PUBLISHED)
# To be incremented by a release whose files earlier releases cannot read, or which cannot read
# theirs. The third format of `clare-nano` has a query bank that adds a dimension to the vectors.
FORMATS = {NANO: 3, PUBLISHED: 1}
RERANKER = CheckpointPart(
    name="reranker",
    label="the re-ranker",
    trained_on="vectors of checkpoint",
    stage="rerank",
)
MASK_HEAD = CheckpointPart(
    name="mask_head", label="the mask head", trained_on="the crop network", stage="masks"
)
QUERY_ZOOM = CheckpointPart(
    name="query_zoom",
    label="the zoom policy",
    trained_on="vectors of checkpoint",
    stage="query-zoom",
)
COLOR_HEAD = CheckpointPart(
    name="color_head",
    label="the color head",
    trained_on="the crop network and the text tower",
    stage="colors",
)
COLOR_INPUTS = ("crop_network.", "text.tower.")
"""Weights that the color head was trained on."""
EMBEDDING = "text.tower.words.weight"


def save_checkpoint(
    folder: Path, model: ClareNano | Clare, tokenizer: Tokenizer, about: Mapping[str, Any]
) -> str:
    """Write a checkpoint directory, and return its digest.

    Args:
        folder: created if it does not exist; files in it are replaced.
        model: in any precision.
        tokenizer: of the text tower.
        about: JSON values to store under "training" in config.json (data, steps, metrics).
    """
    folder.mkdir(parents=True, exist_ok=True)
    kind = NANO if isinstance(model, ClareNano) else PUBLISHED
    # Contiguous, because safetensors refuses other layouts, such as channels-last weights.
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(pack(state) if kind == NANO else state, folder / WEIGHTS)
    tokenizer.save(str(folder / TOKENIZER))
    digest = weights_digest(folder)
    config = {
        "format": FORMATS[kind],
        "model": kind,
        "digest": digest,
        "model_config": asdict(model.config),
        "training": dict(about),
    }
    # Written last, because `read_config` refuses a folder without it: a run that is interrupted
    # before leaves no new folder that looks like a checkpoint.
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return digest


def load_encoder(
    path: Path | None = None, *, num_candidates: int | None = None, masks: bool = False
) -> InstanceEncoder:
    """Load the encoder of a checkpoint.

    Args:
        path: checkpoint directory; None for the one that comes with the package.
        num_candidates: instances to keep per photo; None for the number in the checkpoint.
        masks: also compute the masks of instances.

    Raises:
        CheckpointError: a file is missing or damaged, the model is of an unknown kind, or `masks`
            is set and the model has no mask branch.
    """
    folder = Path(path) if path is not None else SHIPPED
    if read_config(folder)["model"] == PUBLISHED:
        return _load_published(folder, num_candidates, masks)
    model, tokenizer = load_model(folder)
    encoder = ClareNanoEncoder(
        model, tokenizer, weights_digest(folder), num_candidates=num_candidates
    )
    return _with_masks(encoder, folder) if masks else encoder


def _with_masks(encoder: InstanceEncoder, folder: Path) -> InstanceEncoder:
    """Let the mask head of a checkpoint give the instances of an encoder their masks."""
    from reir.models.masked_encoder import MaskedEncoder

    segmenter = load_segmenter(folder)
    if segmenter is None:
        raise CheckpointError(
            f"{folder} has no mask head; load it without masks, or train one with "
            f"`reir train --stage masks --init {folder}`"
        )
    return MaskedEncoder(encoder, segmenter)


def _load_published(folder: Path, num_candidates: int | None, masks: bool) -> InstanceEncoder:
    """Load an encoder of the published CLARE, on a GPU if there is one."""
    from reir.models.clare.encoder import ClareEncoder

    model, tokenizer = load_clare(folder)
    if masks and not model.config.masks:
        raise CheckpointError(
            f"{folder} was trained without masks; load it without masks, or train it further with "
            f"`reir train --init {folder} --set shape.masks=true`"
        )
    if on_gpu := torch.cuda.is_available():
        model.cuda()
    return ClareEncoder(
        model,
        tokenizer,
        weights_digest(folder),
        num_candidates=num_candidates,
        half=on_gpu,
        masks=masks,
    )


def load_model(folder: Path) -> tuple[ClareNano, Tokenizer]:
    """Load the model (float32) and the tokenizer of a `clare-nano` checkpoint.

    Raises:
        CheckpointError: as for `load_encoder`, or it is a checkpoint of another model.
    """
    config = _read_config_of(folder, NANO)
    tokenizer = read_tokenizer(folder / TOKENIZER)
    with _checkpoint_errors(folder):
        state = unpack(load_file(folder / WEIGHTS))
        model = ClareNano.from_dict(config["model_config"])
        model.load_state_dict(state)
    return model, tokenizer


def load_clare(folder: Path) -> tuple[Clare, Tokenizer]:
    """Load the model and the tokenizer of a checkpoint of the published CLARE.

    Raises:
        CheckpointError: as for `load_encoder`, or it is a checkpoint of another model.
    """
    from reir.models.clare.model import Clare

    config = _read_config_of(folder, PUBLISHED)
    tokenizer = read_tokenizer(folder / TOKENIZER)
    with _checkpoint_errors(folder):
        model = Clare.from_dict(config["model_config"])
        model.load_state_dict(load_file(folder / WEIGHTS))
    return model, tokenizer


def save_reranker(folder: Path, reranker: Reranker, digest: str, about: Mapping[str, Any]) -> None:
    """Write a re-ranker into the checkpoint directory of the model with this digest."""
    RERANKER.save(folder, reranker, asdict(reranker.config), digest, about)


def load_reranker(folder: Path | None = None, digest: str | None = None) -> Reranker | None:
    """Load the re-ranker of a checkpoint in eval mode; None if the checkpoint has none.

    Args:
        folder: checkpoint directory; None for the one that comes with the package.
        digest: of the model whose vectors will be ranked; None for the model in `folder`.

    Raises:
        CheckpointError: it was trained on the vectors of another model, or cannot be loaded.
    """
    from reir.models.reranker import Reranker, RerankerConfig

    folder = Path(folder) if folder is not None else SHIPPED
    if not RERANKER.is_in(folder):
        return None
    expected = digest or weights_digest(folder)  # a known digest saves hashing the whole file
    return RERANKER.load(folder, lambda shape: Reranker(RerankerConfig(**shape)), expected)


def save_zoom_policy(folder: Path, policy: ZoomPolicy, digest: str, about: Any) -> None:
    """Write a zoom policy into the checkpoint directory of the model with this digest."""
    QUERY_ZOOM.save(folder, policy, asdict(policy.config), digest, about)


def load_zoom_policy(folder: Path, digest: str) -> ZoomPolicy | None:
    """Load the zoom policy of a checkpoint in eval mode; None if the checkpoint has none.

    Args:
        folder: checkpoint directory.
        digest: of the model that encodes the looks.

    Raises:
        CheckpointError: it was trained on the vectors of another model, or cannot be loaded.
    """
    from reir.models.query_zoom.policy import ZoomPolicy, ZoomPolicyConfig

    if not QUERY_ZOOM.is_in(folder):
        return None
    return QUERY_ZOOM.load(folder, lambda shape: ZoomPolicy(ZoomPolicyConfig(**shape)), digest)


def save_mask_head(folder: Path, head: MaskHead, network: CropNetwork, about: Any) -> None:
    """Write a mask head into the checkpoint directory of the model with this crop network."""
    MASK_HEAD.save(folder, head, asdict(head.config), module_digest(network), about)


def load_segmenter(folder: Path | None = None) -> NanoSegmenter | None:
    """Load the segmenter of a checkpoint of `clare-nano`; None if the checkpoint has none.

    Args:
        folder: checkpoint directory; None for the one that comes with the package.

    Raises:
        CheckpointError: the mask head was trained with another crop network, or cannot be loaded.
    """
    from reir.models.nano.crop_network import CropNetwork
    from reir.models.nano.encoder import fast_dtype
    from reir.models.nano.mask_head import MaskHead, MaskHeadConfig
    from reir.models.nano.segmenter import NanoSegmenter

    folder = Path(folder) if folder is not None else SHIPPED
    if not MASK_HEAD.is_in(folder):
        return None
    config = _read_config_of(folder, NANO)
    with _checkpoint_errors(folder):
        network = CropNetwork(config["model_config"]["crop_network"])
        network.load_state_dict(_read_tensors(folder / WEIGHTS, "crop_network."))
    network.eval().requires_grad_(False)

    def build(shape: dict[str, Any]) -> MaskHead:
        return MaskHead(MaskHeadConfig(**shape), network.level_channels)

    head = MASK_HEAD.load(folder, build, module_digest(network))
    return NanoSegmenter(network, head, fast_dtype())


def save_color_head(folder: Path, head: ColorHead, about: Any) -> None:
    """Write a color head into the checkpoint directory of its model."""
    digest = stored_digest(folder, COLOR_INPUTS)
    COLOR_HEAD.save(folder, head, asdict(head.config), digest, about)


def load_color_reader(
    folder: Path | None = None, encoder: InstanceEncoder | None = None
) -> ColorReader | None:
    """Load the color reader of a checkpoint of `clare-nano`; None if the checkpoint has none.

    Args:
        folder: checkpoint directory; None for the one that comes with the package.
        encoder: of this checkpoint, whose model the reader then shares instead of loading it again.

    Raises:
        CheckpointError: the color head was trained with another model, or cannot be loaded.
    """
    from reir.models.nano.color_reader import ColorReader, color_head_for

    folder = Path(folder) if folder is not None else SHIPPED
    if not COLOR_HEAD.is_in(folder):
        return None
    shared = encoder.parts if isinstance(encoder, ClareNanoEncoder) else None
    model, tokenizer = shared or load_model(folder)
    digest = stored_digest(folder, COLOR_INPUTS)
    head = COLOR_HEAD.load(folder, lambda shape: color_head_for(model, shape), digest)
    return ColorReader(model, tokenizer, head)


def stored_digest(folder: Path, prefixes: tuple[str, ...]) -> str:
    """Return the sha256 of the weights in a checkpoint whose names start with a prefix."""
    sha = hashlib.sha256()
    with safe_open(folder / WEIGHTS, framework="np") as file:
        # Sorted, so that the digest does not depend on the order in which the file has the weights.
        for name in sorted(file.keys()):
            if name.startswith(prefixes):
                sha.update(name.encode() + file.get_tensor(name).tobytes())
    return sha.hexdigest()


def module_digest(module: nn.Module) -> str:
    """Return the sha256 of the weights of a module, rounded as in a checkpoint."""
    sha = hashlib.sha256()
    for name, value in module.state_dict().items():
        sha.update(name.encode() + value.to(torch.float16).cpu().numpy().tobytes())
    return sha.hexdigest()


def _read_tensors(path: Path, prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names start with `prefix`, in float32 and without the prefix."""
    with safe_open(path, framework="pt") as file:
        names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
        return {name.removeprefix(prefix): file.get_tensor(name).float() for name in names}


def _read_config_of(folder: Path, kind: str) -> dict[str, Any]:
    config = read_config(folder)
    if config["model"] != kind:
        raise CheckpointError(
            f"{folder} is a checkpoint of {config['model']!r}, but one of {kind!r} is needed"
        )
    return config


@contextmanager
def _checkpoint_errors(folder: Path) -> Iterator[None]:
    """Turn errors about weights that do not fit into a `CheckpointError` that names the folder."""
    try:
        yield
    # safetensors: a damaged file. RuntimeError: from `load_state_dict`, names or shapes differ.
    # TypeError and ValueError: the configuration has unknown keys, or values out of range.
    except (SafetensorError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            # Only the first line: torch goes on to list every weight that does not fit.
            f"cannot load checkpoint {folder}: {str(error).splitlines()[0]}; "
            f"{WEIGHTS} and {CONFIG} must come from the same `reir train` run"
        ) from error


def read_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer, with padding and truncation disabled, since `tokenize` does both.

    Raises:
        CheckpointError: the file is not a tokenizer.
    """
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain `Exception`
        raise CheckpointError(f"{path} is not a tokenizer: {error}") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json after checking that the directory is complete.

    Raises:
        CheckpointError: a file is missing, or a value in config.json is unknown.
    """
    missing = [name for name in (CONFIG, WEIGHTS, TOKENIZER) if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder} is not a checkpoint: {', '.join(missing)} missing; "
            f"a checkpoint contains {CONFIG}, {WEIGHTS} and {TOKENIZER}"
        )
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        kind, version, _ = config["model"], config["format"], config["model_config"]
    except KeyError as error:
        raise CheckpointError(
            f"{folder / CONFIG} is not a checkpoint config: key {error} is missing"
        ) from error
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{folder / CONFIG} is not a checkpoint config: {error}") from error
    if kind not in MODELS:
        raise CheckpointError(
            f"{folder} is a checkpoint of unknown model {kind!r}; known are {', '.join(MODELS)}"
            f"{nearest_name(str(kind), MODELS)}"
        )
    if version != FORMATS[kind]:
        remedy = (
            "an earlier release wrote it: train the model again with `reir train`, and index its "
            "galleries again with `reir reindex`"
            if isinstance(version, int) and version < FORMATS[kind]
            else "update reir-platform"
        )
        raise CheckpointError(
            f"{folder} has format {version}, but this release reads format {FORMATS[kind]} of "
            f"{kind}; {remedy}"
        )
    return dict(config)


def weights_digest(folder: Path) -> str:
    """Return the sha256 of the weights file, in hex."""
    with (folder / WEIGHTS).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pack(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Compress a state dict: float16, and word embeddings as int8 with a scale for each row."""
    out = {k: v.to(torch.float16).contiguous() for k, v in state.items() if v.is_floating_point()}
    out |= {k: v.contiguous() for k, v in state.items() if not v.is_floating_point()}
    rows = state[EMBEDDING].float()
    # One scale per row, since the lengths of word vectors differ. The minimum avoids a division by
    # 0 for a row of zeros.
    scale = (rows.abs().amax(dim=1, keepdim=True) / 127).clamp(min=1e-8)
    del out[EMBEDDING]
    out[f"{EMBEDDING}.int8"] = (rows / scale).round().to(torch.int8)
    out[f"{EMBEDDING}.scale"] = scale
    return out


def unpack(packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inverse of `pack`, in float32.

    Raises:
        ValueError: the embedding is missing.
    """
    state = dict(packed)
    try:
        rows, scale = state.pop(f"{EMBEDDING}.int8"), state.pop(f"{EMBEDDING}.scale")
    except KeyError as error:
        raise ValueError(f"tensor {error} is missing") from error
    state[EMBEDDING] = rows.float() * scale.float()
    return {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
