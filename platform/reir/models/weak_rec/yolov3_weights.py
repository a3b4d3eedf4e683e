"""Loads the weights of YOLOv3: safetensors of ours or as published, and darknet's files.

The authors of RefCLIP published `yolov3_coco.pth` and `yolov3_vg.pth` (100 classes). The platform
opens no pickles, so convert such a file once, with plain PyTorch:

    weights = torch.load("yolov3_coco.pth", weights_only=True)
    save_file({k: v.contiguous() for k, v in weights.items()}, "yolov3_coco.safetensors")

The "state_dict" of a whole published model can be converted in the same way; its other tensors are
ignored. Every format names or stores the convolutions in the order in which they run, by which they
are matched with those of the model.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from reir.errors import CheckpointError
from reir.models.weak_rec.yolov3 import (
    BOX_NUMBERS,
    GUIDED_SIZES_PX,
    NUM_CLASSES,
    POOLING_SIDES,
    STANDARD_SIZES_PX,
    ConvBlock,
    SpatialPyramidPooling,
    YoloV3,
)

FIRST = "module_list.0.conv.weight"
"""The first tensor of a published file, after a prefix such as "module.visual_encoder."."""
PUBLISHED_HEAD = "module_list.19"
HEAD_NAMES = {
    "guide_wh": "head.guide",
    "Feature_adaption.conv_offset": "head.offsets",
    "Feature_adaption.dconv": "head.adapt",
    "conv": "head.predict",
}
BLOCK_NAMES = {
    "conv.weight": "conv.weight",
    "batch_norm.weight": "norm.weight",
    "batch_norm.bias": "norm.bias",
    "batch_norm.running_mean": "norm.running_mean",
    "batch_norm.running_var": "norm.running_var",
}
UNUSED = "num_batches_tracked"
"""A counter of batch norm that nothing reads, and that some files lack."""
INT_BYTES, FLOAT_BYTES = 4, 4


def load_yolov3(
    path: Path, *, num_classes: int = NUM_CLASSES, paper_parity: bool = False
) -> YoloV3:
    """Load a frozen YOLOv3 with spatial pyramid pooling, in eval mode.

    Args:
        path: a safetensors file of a `YoloV3`, or of published weights that were converted; or a
            `.weights` file of darknet for `yolov3-spp.cfg`, whose head has 3 boxes a cell.
        num_classes: of a `.weights` file, which does not contain it.
        paper_parity: see `YoloV3`.

    Raises:
        CheckpointError: the file is missing, damaged, too short, too long or of another model.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(
            f"there are no weights of YOLOv3 at {path}; give a .safetensors file, or a .weights "
            f"file of darknet"
        )
    if path.suffix == ".weights":
        model = YoloV3(num_classes=num_classes, guided=False, paper_parity=paper_parity)
        read_darknet(path, model)
    else:
        state = _own_names(path, _read_safetensors(path))
        model = _from_state(path, state, paper_parity=paper_parity)
    _check_values(path, model)
    return model


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is not a safetensors file: {error}; convert weights of another format first"
        ) from error


def _check_values(path: Path, model: YoloV3) -> None:
    """Raise an error for values with which a model could not compute, as in a damaged file."""
    for name, tensor in model.state_dict().items():
        if not tensor.isfinite().all() or (name.endswith("running_var") and (tensor < 0).any()):
            raise CheckpointError(
                f"tensor {name!r} in {path} has values that are not finite, or negative variances; "
                f"the file is damaged or of another network"
            )


def _from_state(path: Path, state: Mapping[str, Tensor], *, paper_parity: bool) -> YoloV3:
    """Build the model whose sizes the tensors have, and load them."""
    guided = "head.guide.weight" in state
    num_boxes = len(GUIDED_SIZES_PX if guided else STANDARD_SIZES_PX)
    for name in ("stem.conv.weight", "head.predict.weight"):
        if name not in state or state[name].ndim != 4 or not state[name].numel():
            raise CheckpointError(
                f"{path} has no weights of YOLOv3: tensor {name!r}, of 4 axes, is missing"
            )
    num_predicted = len(state["head.predict.weight"])
    num_classes = num_predicted // num_boxes - BOX_NUMBERS
    if num_classes < 1 or num_predicted % num_boxes:
        raise CheckpointError(
            f"the head in {path} predicts {num_predicted} numbers, but {num_boxes} boxes with "
            f"classes were expected to have a multiple of {num_boxes}, at least "
            f"{num_boxes * (BOX_NUMBERS + 1)}"
        )
    model = YoloV3(
        num_classes=num_classes,
        guided=guided,
        width=len(state["stem.conv.weight"]),
        paper_parity=paper_parity,
    )
    expected = {k: v for k, v in model.state_dict().items() if not k.endswith(UNUSED)}
    missing = sorted(expected.keys() - state.keys())
    if missing:
        raise CheckpointError(
            f"{path} lacks {len(missing)} of the {len(expected)} tensors of YOLOv3 with spatial "
            f"pyramid pooling, the first is {missing[0]!r}"
        )
    for name, tensor in expected.items():
        if state[name].shape != tensor.shape:
            raise CheckpointError(
                f"tensor {name!r} in {path} has shape {tuple(state[name].shape)}, expected is "
                f"{tuple(tensor.shape)}"
            )
    # Not strict, because the counters of batch norm are left out.
    model.load_state_dict({name: state[name] for name in expected}, strict=False)
    return model


# ---------------------------------------------------------------------------- the published weights


def _own_names(path: Path, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Rename published tensors; those that the model does not use are left out."""
    first = next((name for name in state if name.endswith(FIRST)), None)
    if first is None:
        return state
    prefix = first.removesuffix(FIRST)
    published = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    marker = ".batch_norm.weight"
    theirs = [name.removesuffix(marker) for name in published if name.endswith(marker)]
    ours = _block_names()
    if len(theirs) != len(ours):
        raise CheckpointError(
            f"{path} has {len(theirs)} convolutions with batch norm, but YOLOv3 with spatial "
            f"pyramid pooling has {len(ours)}"
        )
    names = {
        f"{their}.{inner}": f"{our}.{own}"
        # In the order of the numbers; as text, module 10 would come before module 2.
        for their, our in zip(sorted(theirs, key=_position), ours, strict=True)
        for inner, own in BLOCK_NAMES.items()
    }
    names |= {
        f"{PUBLISHED_HEAD}.{their}.{kind}": f"{our}.{kind}"
        for their, our in HEAD_NAMES.items()
        for kind in ("weight", "bias")
    }
    return {names[name]: tensor for name, tensor in published.items() if name in names}


def _position(name: str) -> tuple[int, ...]:
    """Return the numbers in a name: "module_list.6.module_list.3.0" -> (6, 3, 0)."""
    return tuple(int(part) for part in name.split(".") if part.isdigit())


def _block_names() -> list[str]:
    with torch.device("meta"):  # only the names matter
        model = YoloV3()
    return [name for name, module in model.named_modules() if isinstance(module, ConvBlock)]


# -------------------------------------------------------------------------------- darknet's format


def read_darknet(path: Path, model: YoloV3) -> None:
    """Fill a model with a standard head from a `.weights` file of darknet.

    After a header, the file contains the float32 parameters of the convolutions in the order of the
    network's description: bias, scale, mean and variance of the batch norm, or the bias of a
    convolution without it, and then the weights. The finer heads, which the model lacks, are
    skipped.

    Raises:
        CheckpointError: the number of parameters is not that of the model.
    """
    order = _darknet_order(model)
    expected = sum(_num_floats(part) for part in order)
    header = _header_bytes(path)
    size = os.path.getsize(path)
    if size != header + expected * FLOAT_BYTES:
        state = "truncated" if size < header + expected * FLOAT_BYTES else "too long"
        raise CheckpointError(
            f"{path} is {state}, or of another network: YOLOv3 with spatial pyramid pooling and "
            f"{_num_classes(model)} classes (yolov3-spp.cfg) has {expected} parameters, which make "
            f"{header + expected * FLOAT_BYTES} bytes with the header, but the file has {size}"
        )
    floats = torch.from_numpy(np.fromfile(path, "<f4", offset=header))
    values_of_parts = torch.split(floats, [_num_floats(part) for part in order])
    for part, values in zip(order, values_of_parts, strict=True):
        if not isinstance(part, int):
            _fill(_darknet_tensors(part), values)
    _reorder_pooled(model)


def _header_bytes(path: Path) -> int:
    """Return the size of the header: three integers, and the number of training photos.

    Raises:
        CheckpointError: the file is shorter than a header.
    """
    version = np.fromfile(path, "<i4", count=3)
    if len(version) < 3:
        raise CheckpointError(
            f"{path} has {os.path.getsize(path)} bytes, which is less than the header of a "
            f".weights file; copy or download it again"
        )
    # Since version 0.2, the number of photos has 8 bytes.
    major, minor = int(version[0]), int(version[1])
    return 3 * INT_BYTES + (8 if major * 10 + minor >= 2 else 4)


def _darknet_order(model: YoloV3) -> Sequence[ConvBlock | nn.Conv2d | int]:
    """Return the convolutions in darknet's order; a number stands for a head to skip."""
    head = model.head.predict
    before_head: list[nn.Module] = [model.stem, *model.stages, model.coarse, model.expand]
    finer = [
        # Each output of a finer head has a bias, and a weight for each channel of its map.
        head.out_channels * (branch.expand.conv.out_channels + 1)
        for branch in (model.middle, model.fine)
    ]
    return [
        *(block for part in before_head for block in _blocks(part)),
        head,
        *_blocks(model.middle),
        finer[0],
        *_blocks(model.fine),
        finer[1],
    ]


def _blocks(part: nn.Module) -> list[ConvBlock]:
    # `modules` keeps the order of declaration, which in all of these parts is the order of running.
    return [module for module in part.modules() if isinstance(module, ConvBlock)]


def _darknet_tensors(part: ConvBlock | nn.Conv2d) -> list[Tensor]:
    """Return the tensors of a convolution in darknet's order."""
    if isinstance(part, ConvBlock):
        norm = part.norm
        tensors = [norm.bias, norm.weight, norm.running_mean, norm.running_var, part.conv.weight]
    else:
        tensors = [part.bias, part.weight]
    return [each for each in tensors if each is not None]


def _num_floats(part: ConvBlock | nn.Conv2d | int) -> int:
    return part if isinstance(part, int) else sum(t.numel() for t in _darknet_tensors(part))


def _num_classes(model: YoloV3) -> int:
    return model.head.predict.out_channels // len(STANDARD_SIZES_PX) - BOX_NUMBERS


@torch.no_grad()
def _reorder_pooled(model: YoloV3) -> None:
    """Adapt the convolution that follows the pooling to the order of the model's pooled maps.

    "route -1,-3,-5,-6" in yolov3-spp.cfg concatenates the maxima of the largest neighborhood first
    and the map itself last. `SpatialPyramidPooling` has the opposite order, as RefCLIP's code.
    """
    at = next(n for n, part in enumerate(model.coarse) if isinstance(part, SpatialPyramidPooling))
    after = model.coarse[at + 1]
    assert isinstance(after, ConvBlock), "the pooled maps are read by a convolution"
    of_maps = after.conv.weight.chunk(1 + len(POOLING_SIDES), dim=1)
    after.conv.weight.copy_(torch.cat(of_maps[::-1], dim=1))


@torch.no_grad()
def _fill(tensors: Sequence[Tensor], values: Tensor) -> None:
    parts = torch.split(values, [tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view_as(tensor))
