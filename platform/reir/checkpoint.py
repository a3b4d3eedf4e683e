"""Checkpoint directories: `config.json`, `model.safetensors`, `tokenizer.json`.

A relation re-ranker lies beside them as `reranker.json` and `reranker.safetensors`, float32; it
names the digest of the model whose vectors it was trained on, and works with no other.

The sha256 of the weights file is the digest that names a model revision. The published CLARE is
kept as it was trained, `clare-nano` in float16 with its word embeddings in int8 and a scale a row
(they are frozen in training, and make up two fifths of the model). Only safetensors are read, never
a pickle.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from reir.errors import CheckpointError, nearest_name
from reir.models.clare_nano import ClareNano
from reir.models.nano_encoder import ClareNanoEncoder
from reir.models.seams import InstanceEncoder

if TYPE_CHECKING:
    from reir.models.clare import Clare
    from reir.models.reranker import Reranker

SHIPPED = Path(__file__).parent / "checkpoints" / "clare-nano"
CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"
RERANKER_CONFIG, RERANKER_WEIGHTS = "reranker.json", "reranker.safetensors"
FORMAT = 1
NANO, PUBLISHED = "clare-nano", "clare"
MODELS = (NANO, PUBLISHED)
EMBEDDING = "text.tower.words.weight"


def save_checkpoint(
    folder: Path, model: ClareNano | Clare, tokenizer: Tokenizer, about: Mapping[str, Any]
) -> str:
    """Write a checkpoint directory; returns its digest.

    Args:
        folder: created when absent; files in it are replaced.
        model: any precision.
        tokenizer: of the text tower.
        about: JSON values kept under "training" in config.json (data, steps, metrics).
    """
    from dataclasses import asdict

    folder.mkdir(parents=True, exist_ok=True)
    kind = NANO if isinstance(model, ClareNano) else PUBLISHED
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(pack(state) if kind == NANO else state, folder / WEIGHTS)
    tokenizer.save(str(folder / TOKENIZER))
    digest = weights_digest(folder)
    config = {
        "format": FORMAT,
        "model": kind,
        "digest": digest,
        "model_config": asdict(model.config),
        "training": dict(about),
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return digest


def load_encoder(
    path: Path | None = None, *, num_candidates: int | None = None, masks: bool = False
) -> InstanceEncoder:
    """Load a checkpoint as an encoder; None takes the one shipped with the package.

    Args:
        path: checkpoint directory.
        num_candidates: instances kept of a photo; None takes the checkpoint's own number.
        masks: give instances their masks.

    Raises:
        CheckpointError: a file is missing or damaged, the model is of an unknown kind, or masks are
            asked for and it has no mask branch.
    """
    folder = Path(path) if path is not None else SHIPPED
    if read_config(folder)["model"] == PUBLISHED:
        return _load_published(folder, num_candidates, masks)
    if masks:
        raise CheckpointError(
            f"{folder} holds a {NANO}, which gives no masks; clare-base and clare-large can"
        )
    model, tokenizer = load_model(folder)
    return ClareNanoEncoder(model, tokenizer, weights_digest(folder), num_candidates=num_candidates)


def _load_published(folder: Path, num_candidates: int | None, masks: bool) -> InstanceEncoder:
    """Load a CLARE of the published shape, on a GPU where there is one."""
    from reir.models.clare_encoder import ClareEncoder

    model, tokenizer = load_clare(folder)
    if masks and not model.config.masks:
        raise CheckpointError(
            f"{folder} was trained without masks; load it without them, or train it further with "
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
        CheckpointError: as `load_encoder`, or it is a checkpoint of another model.
    """
    config = _config_of(folder, NANO)
    tokenizer = read_tokenizer(folder / TOKENIZER)
    with _naming(folder):
        state = unpack(load_file(folder / WEIGHTS))
        model = ClareNano.from_dict(config["model_config"])
        model.load_state_dict(state)
    return model, tokenizer


def load_clare(folder: Path) -> tuple[Clare, Tokenizer]:
    """Load the model and the tokenizer of a checkpoint of the published CLARE.

    Raises:
        CheckpointError: as `load_encoder`, or it is a checkpoint of another model.
    """
    from reir.models.clare import Clare

    config = _config_of(folder, PUBLISHED)
    tokenizer = read_tokenizer(folder / TOKENIZER)
    with _naming(folder):
        model = Clare.from_dict(config["model_config"])
        model.load_state_dict(load_file(folder / WEIGHTS))
    return model, tokenizer


def save_reranker(folder: Path, reranker: Reranker, digest: str, about: Mapping[str, Any]) -> None:
    """Write a re-ranker into the checkpoint directory of the model that it was trained on.

    Args:
        folder: of the checkpoint; nothing else in it changes.
        reranker: any device.
        digest: of that model.
        about: JSON values kept under "training" (data, steps, metrics).
    """
    from dataclasses import asdict

    save_file(
        {k: v.float().cpu().contiguous() for k, v in reranker.state_dict().items()},
        folder / RERANKER_WEIGHTS,
    )
    config = {
        "format": FORMAT,
        "digest": digest,
        "model_config": asdict(reranker.config),
        "training": dict(about),
    }
    text = json.dumps(config, indent=2, sort_keys=True)
    (folder / RERANKER_CONFIG).write_text(text + "\n", encoding="utf-8")


def load_reranker(folder: Path | None = None, digest: str | None = None) -> Reranker | None:
    """Load the re-ranker of a checkpoint in eval mode; None where it has none.

    Args:
        folder: checkpoint directory; None takes the one shipped with the package.
        digest: of the model whose vectors are to be ranked; None reads it from the checkpoint.

    Raises:
        CheckpointError: it was trained on the vectors of another model, or does not load.
    """
    from reir.models.reranker import Reranker, RerankerConfig

    folder = Path(folder) if folder is not None else SHIPPED
    if not (folder / RERANKER_WEIGHTS).is_file():
        return None
    expected = digest or weights_digest(folder)
    try:
        config = json.loads((folder / RERANKER_CONFIG).read_text(encoding="utf-8"))
        trained_on = config["digest"]
        reranker = Reranker(RerankerConfig(**config["model_config"]))
        reranker.load_state_dict(load_file(folder / RERANKER_WEIGHTS))
    except (OSError, SafetensorError, RuntimeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"the re-ranker in {folder} does not load: {str(error).splitlines()[0]}; "
            f"{RERANKER_WEIGHTS} and {RERANKER_CONFIG} must come from one `reir train` run"
        ) from error
    if trained_on != expected:
        raise CheckpointError(
            f"the re-ranker in {folder} was trained on vectors of checkpoint {trained_on[:12]}, "
            f"the one in use is {expected[:12]}; train one with `reir train --stage rerank "
            f"--init {folder}`, or delete {RERANKER_WEIGHTS}"
        )
    return reranker.eval().requires_grad_(False)


def _config_of(folder: Path, kind: str) -> dict[str, Any]:
    config = read_config(folder)
    if config["model"] != kind:
        raise CheckpointError(
            f"{folder} holds a model {config['model']!r} where {kind!r} is needed; "
            f"give a checkpoint of {kind}"
        )
    return config


@contextmanager
def _naming(folder: Path) -> Iterator[None]:
    """Turn what weights that do not fit raise into an error that names the checkpoint."""
    try:
        yield
    except (SafetensorError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"checkpoint {folder} does not load: {str(error).splitlines()[0]}; "
            f"{WEIGHTS} and {CONFIG} must come from the same `reir train` run"
        ) from error


def read_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer, without padding or truncation, which `tokenise` does itself.

    Raises:
        CheckpointError: the file is no tokenizer.
    """
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(f"{path} is not a tokenizer: {error}") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json after checking that the directory is complete.

    Raises:
        CheckpointError: naming the file that is missing or the value that is not known.
    """
    missing = [name for name in (CONFIG, WEIGHTS, TOKENIZER) if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder} is not a checkpoint: {', '.join(missing)} missing; "
            f"a checkpoint holds {CONFIG}, {WEIGHTS} and {TOKENIZER}"
        )
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        kind, version, _ = config["model"], config["format"], config["model_config"]
    except KeyError as error:
        raise CheckpointError(
            f"{folder / CONFIG} is not a checkpoint config: no {error}"
        ) from error
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{folder / CONFIG} is not a checkpoint config: {error}") from error
    if kind not in MODELS:
        raise CheckpointError(
            f"{folder} holds a model {kind!r}, known are {', '.join(MODELS)}"
            f"{nearest_name(str(kind), MODELS)}"
        )
    if version != FORMAT:
        raise CheckpointError(
            f"{folder} has format {version}, this release reads {FORMAT}; update reir-platform"
        )
    return dict(config)


def weights_digest(folder: Path) -> str:
    """Sha256 of the weights file, hex."""
    with (folder / WEIGHTS).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pack(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict -> what is written: float16, word embeddings as int8 rows with their scale."""
    out = {k: v.to(torch.float16).contiguous() for k, v in state.items() if v.is_floating_point()}
    out |= {k: v.contiguous() for k, v in state.items() if not v.is_floating_point()}
    rows = state[EMBEDDING].float()
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
