"""Weights files of YOLOv3, written by the formats' descriptions, and what the model computes."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from reir.errors import CheckpointError
from reir.models.weak_rec import yolov3_weights
from reir.models.weak_rec.yolov3 import PIXEL_MEAN, PIXEL_STD, YoloV3
from reir.models.weak_rec.yolov3_weights import load_yolov3, read_darknet

WIDTH, CLASSES = 2, 3


class Conv(NamedTuple):
    """A convolution with batch norm: weight, and scale, bias, mean and variance of the norm."""

    weight: Tensor
    scale: Tensor
    bias: Tensor
    mean: Tensor
    variance: Tensor


def random_conv(c_in: int, c_out: int, kernel: int) -> Conv:
    weight = torch.randn(c_out, c_in, kernel, kernel) * (2 / (c_in * kernel**2)) ** 0.5
    scale, variance = torch.rand(c_out) + 0.5, torch.rand(c_out) + 0.5
    return Conv(weight, scale, torch.randn(c_out) * 0.1, torch.randn(c_out) * 0.1, variance)


def shapes(width: int) -> list[tuple[int, int, int]]:
    """Input and output channels and kernel of the 73 convolutions of yolov3-spp.cfg."""
    w = width
    found = [(3, w, 3)]
    for channels, num_blocks in ((2 * w, 1), (4 * w, 2), (8 * w, 8), (16 * w, 8), (32 * w, 4)):
        half = channels // 2
        found.append((half, channels, 3))
        found += [(channels, half, 1), (half, channels, 3)] * num_blocks
    c = 16 * w
    found += [(2 * c, c, 1), (c, 2 * c, 3), (2 * c, c, 1), (4 * c, c, 1), (c, 2 * c, 3)]
    found += [(2 * c, c, 1), (c, 2 * c, 3)]
    for c in (8 * w, 4 * w):
        found += [(2 * c, c, 1), (3 * c, c, 1), (c, 2 * c, 3), (2 * c, c, 1), (c, 2 * c, 3)]
        found += [(2 * c, c, 1), (c, 2 * c, 3)]
    return found


@pytest.fixture(scope="module")
def convs() -> list[Conv]:
    torch.manual_seed(0)
    return [random_conv(*each) for each in shapes(WIDTH)]


PUBLISHED_POOLING, DARKNET_POOLING = (1, 5, 9, 13), (13, 9, 5, 1)
"""Sides of the pooled neighborhoods in the order in which RefCLIP's code and yolov3-spp.cfg ("route
-1,-3,-5,-6") concatenate them; a side of 1 is the map itself."""


def maps_of(
    convs: list[Conv], x: Tensor, pooling: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the network of yolov3-spp.cfg, but for its heads, in float64."""
    left = iter([Conv(*(t.double() for t in each)) for each in convs])

    def conv(x: Tensor, stride: int = 1) -> Tensor:
        c = next(left)
        x = F.conv2d(x, c.weight, None, stride, c.weight.shape[-1] // 2)
        x = F.batch_norm(x, c.mean, c.variance, c.scale, c.bias)
        return torch.where(x > 0, x, 0.1 * x)

    x, stages = conv(x), []
    for num_blocks in (1, 2, 8, 8, 4):
        x = conv(x, 2)
        for _ in range(num_blocks):
            x = x + conv(conv(x))
        stages.append(x)
    x = conv(conv(conv(x)))
    x = torch.cat([F.max_pool2d(x, side, 1, side // 2) for side in pooling], 1)
    x = conv(conv(conv(x)))
    maps = [conv(x)]
    for skipped in (stages[3], stages[2]):
        x = conv(x).repeat_interleave(2, -1).repeat_interleave(2, -2)
        x = torch.cat([x, skipped], 1)
        for _ in range(5):
            x = conv(x)
        maps.append(conv(x))
    assert next(left, None) is None
    return maps[0], maps[1], maps[2]


# ---------------------------------------------------------------------------------- darknet's files


def darknet_bytes(convs: list[Conv], heads: list[tuple[Tensor, Tensor]], minor: int = 2) -> bytes:
    """Write a `.weights` file; the heads are (weight, bias) in order of their stride from 32."""
    out = [struct.pack("<iii", 0, minor, 5), struct.pack("<q" if minor >= 2 else "<i", 32_013_312)]
    after = {59: heads[0], 66: heads[1], 73: heads[2]}

    def write(*tensors: Tensor) -> None:
        out.extend(t.numpy().astype("<f4").tobytes() for t in tensors)

    for number, conv in enumerate(convs, start=1):
        write(conv.bias, conv.scale, conv.mean, conv.variance, conv.weight)
        if number in after:
            weight, bias = after[number]
            write(bias, weight)
    return b"".join(out)


@pytest.fixture(scope="module")
def heads() -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    out = 3 * (5 + CLASSES)
    return [(torch.randn(out, c * WIDTH, 1, 1) * 0.1, torch.randn(out) * 0.1) for c in (32, 16, 8)]


def tiny() -> YoloV3:
    return YoloV3(num_classes=CLASSES, guided=False, width=WIDTH)


@pytest.mark.parametrize("minor", [1, 2], ids=["short header", "long header"])
def test_darknet_file(
    tmp_path: Path, convs: list[Conv], heads: list[tuple[Tensor, Tensor]], minor: int
) -> None:
    path = tmp_path / "tiny.weights"
    path.write_bytes(darknet_bytes(convs, heads, minor))
    model = tiny()
    read_darknet(path, model)
    model.double()
    # The coarsest map has 7 x 7 cells, so the maxima of all neighborhoods differ.
    colors = torch.rand(1, 3, 224, 224, dtype=torch.float64)
    mean, std = (colors.new_tensor(v)[:, None, None] for v in (PIXEL_MEAN, PIXEL_STD))
    output = model((colors - mean) / std)
    maps = maps_of(convs, colors, DARKNET_POOLING)
    torch.testing.assert_close(output.maps, maps)
    weight, bias = (t.double() for t in heads[0])
    logits = F.conv2d(maps[0], weight, bias).reshape(1, 3, 5 + CLASSES, 7, 7)
    want = logits[:, :, 4].sigmoid().flatten(2).transpose(1, 2)
    torch.testing.assert_close(output.confidence, want)


def test_published_darknet_file_has_the_known_size(tmp_path: Path) -> None:
    # yolov3-spp.weights of 80 classes has 252,209,544 bytes.
    path = tmp_path / "yolov3-spp.weights"
    with path.open("wb") as file:
        file.write(struct.pack("<iiiq", 0, 2, 0, 0))
        file.truncate(252_209_544)
    model = load_yolov3(path)
    assert model.head.predict.out_channels == 255
    assert not model.training
    assert not model.fine.expand.conv.weight.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b[:-4], "truncated"),
        (lambda b: b[:-3], "truncated"),
        (lambda b: b[:20], "truncated"),
        (lambda b: b[:7], "less than the header"),
        (lambda b: b[:0], "less than the header"),
        (lambda b: b + b"\0" * 4, "too long"),
    ],
    ids=["one number short", "within a number", "header alone", "in the header", "empty", "long"],
)
def test_darknet_files_of_wrong_size_are_refused(
    tmp_path: Path,
    convs: list[Conv],
    heads: list[tuple[Tensor, Tensor]],
    change: object,
    message: str,
) -> None:
    path = tmp_path / "tiny.weights"
    assert callable(change)
    path.write_bytes(change(darknet_bytes(convs, heads)))
    with pytest.raises(CheckpointError, match=message) as error:
        read_darknet(path, tiny())
    assert str(path) in str(error.value)


def test_darknet_file_of_other_classes_names_both_sizes(
    tmp_path: Path, convs: list[Conv], heads: list[tuple[Tensor, Tensor]]
) -> None:
    path = tmp_path / "tiny.weights"
    content = darknet_bytes(convs, heads)
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"7 classes.*the file has") as error:
        read_darknet(path, YoloV3(num_classes=7, guided=False, width=WIDTH))
    assert str(len(content)) in str(error.value)
    # three heads have 4 more classes for each of 3 boxes
    more = 4 * sum(12 * (c * WIDTH + 1) for c in (32, 16, 8))
    assert f"{len(content) + more} bytes" in str(error.value)


# ------------------------------------------------------------------------------- published tensors


def published_names() -> Iterator[str]:
    """The convolutions with batch norm of the published state dict, in the order they run."""
    blocks = {2: 1, 4: 2, 6: 8, 8: 8, 10: 4, 11: 1, 25: 1, 34: 1}
    not_convs = {13, 16, 19, 21, 24, 28, 30, 33, 37}  # pooling, drop block, heads, upsampling
    for i in range(38):
        if i in blocks:
            for j in range(blocks[i]):
                yield f"module_list.{i}.module_list.{j}.0"
                yield f"module_list.{i}.module_list.{j}.1"
        elif i not in not_convs:
            yield f"module_list.{i}"


def published_state(convs: list[Conv]) -> dict[str, Tensor]:
    torch.manual_seed(2)
    state = {}
    for name, conv in zip(published_names(), convs, strict=True):
        state[f"{name}.conv.weight"] = conv.weight
        state[f"{name}.batch_norm.weight"] = conv.scale
        state[f"{name}.batch_norm.bias"] = conv.bias
        state[f"{name}.batch_norm.running_mean"] = conv.mean
        state[f"{name}.batch_norm.running_var"] = conv.variance
        state[f"{name}.batch_norm.num_batches_tracked"] = torch.tensor(7)
    for i, c in ((19, 32 * WIDTH), (28, 16 * WIDTH), (37, 8 * WIDTH)):
        parts = {
            "guide_wh": (8, c, 1, 1),
            "Feature_adaption.conv_offset": (72, 2, 1, 1),
            "Feature_adaption.dconv": (c, c, 3, 3),
            "conv": (4 * (5 + CLASSES), c, 1, 1),
        }
        for name, shape in parts.items():
            state[f"module_list.{i}.{name}.weight"] = torch.randn(shape) * 0.1
            state[f"module_list.{i}.{name}.bias"] = torch.randn(shape[0]) * 0.1
    return state


def saved(tmp_path: Path, state: dict[str, Tensor]) -> Path:
    path = tmp_path / "yolov3.safetensors"
    save_file({name: value.contiguous() for name, value in state.items()}, path)
    return path


@pytest.mark.parametrize("prefix", ["", "module.", "module.visual_encoder."])
def test_published_tensors(tmp_path: Path, convs: list[Conv], prefix: str) -> None:
    state = published_state(convs)
    others = {"module.lang_encoder.sa_list.0.norm1.weight": torch.ones(3)} if prefix else {}
    path = saved(tmp_path, {f"{prefix}{name}": value for name, value in state.items()} | others)
    model, pixels = load_yolov3(path).double(), torch.randn(1, 3, 224, 224, dtype=torch.float64)
    output, maps = model(pixels), maps_of(convs, pixels, PUBLISHED_POOLING)
    torch.testing.assert_close(output.maps, maps)
    weight, bias = (state[f"module_list.19.guide_wh.{k}"].double() for k in ("weight", "bias"))
    want = 128 * F.conv2d(maps[0], weight, bias)[:, 7].exp()
    torch.testing.assert_close(model.head(maps[0])[1][:, 3, 1], want)
    for theirs, ours in (("Feature_adaption.dconv", "adapt"), ("conv", "predict")):
        for kind in ("weight", "bias"):
            got = model.head.state_dict()[f"{ours}.{kind}"]
            assert torch.equal(got, state[f"module_list.19.{theirs}.{kind}"])
    assert output.boxes.shape == (1, 49, 4, 4)


def test_saved_models_are_loaded_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    for guided in (True, False):
        model = YoloV3(num_classes=5, guided=guided, width=WIDTH)
        path = saved(tmp_path, model.state_dict())
        again, pixels = load_yolov3(path, paper_parity=True), torch.randn(1, 3, 64, 64)
        assert again.paper_parity
        assert not again.training
        assert torch.equal(again(pixels).boxes, model(pixels).boxes)
        assert torch.equal(again(pixels).confidence, model(pixels).confidence)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no weights of YOLOv3 at .*absent"):
        load_yolov3(tmp_path / "absent.safetensors")
    with pytest.raises(CheckpointError, match="no weights of YOLOv3"):
        load_yolov3(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\x80\x02}q\x00.", b"a" * 100])
def test_damaged_safetensors_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "yolov3.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        load_yolov3(path)


def test_truncated_safetensors_are_refused(tmp_path: Path, convs: list[Conv]) -> None:
    path = saved(tmp_path, published_state(convs))
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        load_yolov3(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("module_list.0.conv.weight", "has no weights of YOLOv3"),
        ("module_list.6.module_list.3.0.batch_norm.weight", "has 72 convolutions"),
        ("module_list.6.module_list.3.0.conv.weight", "lacks 1 of the .* tensors"),
        ("module_list.19.conv.weight", "'head.predict.weight', of 4 axes, is missing"),
        ("module_list.19.guide_wh.bias", "lacks 1 of the .* tensors.*'head.guide.bias'"),
    ],
)
def test_missing_tensors_are_named(
    tmp_path: Path, convs: list[Conv], name: str, message: str
) -> None:
    state = published_state(convs)
    del state[name]
    with pytest.raises(CheckpointError, match=message):
        load_yolov3(saved(tmp_path, state))


def test_wrong_shapes_are_named(tmp_path: Path, convs: list[Conv]) -> None:
    state = published_state(convs)
    state["module_list.12.conv.weight"] = torch.zeros(5, 64, 1, 1)
    with pytest.raises(
        CheckpointError, match=r"'coarse.2.conv.weight'.*\(5, 64, 1, 1\).*\(32, 64, 1, 1\)"
    ):
        load_yolov3(saved(tmp_path, state))


@pytest.mark.parametrize("tensor", [torch.tensor(1.0), torch.zeros(0, 3, 3, 3)])
def test_tensors_without_a_size_are_refused(
    tmp_path: Path, convs: list[Conv], tensor: Tensor
) -> None:
    path = saved(tmp_path, published_state(convs) | {"module_list.0.conv.weight": tensor})
    with pytest.raises(CheckpointError, match=r"'stem.conv.weight', of 4 axes, is missing"):
        load_yolov3(path)


def test_heads_without_classes_are_refused(tmp_path: Path, convs: list[Conv]) -> None:
    for num in (20, 26):
        state = published_state(convs)
        state["module_list.19.conv.weight"] = torch.zeros(num, 64, 1, 1)
        with pytest.raises(CheckpointError, match=f"predicts {num} numbers"):
            load_yolov3(saved(tmp_path, state))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite_are_refused(
    tmp_path: Path, convs: list[Conv], value: float
) -> None:
    state = published_state(convs)
    state["module_list.12.conv.weight"] = torch.full((32, 64, 1, 1), value)
    with pytest.raises(CheckpointError, match=r"'coarse.2.conv.weight'.*not finite"):
        load_yolov3(saved(tmp_path, state))


def test_negative_variances_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heads: list[tuple[Tensor, Tensor]]
) -> None:
    torch.manual_seed(0)
    convs = [random_conv(*each) for each in shapes(WIDTH)]
    convs[1].variance[0] = -1
    path = tmp_path / "tiny.weights"
    path.write_bytes(darknet_bytes(convs, heads))
    monkeypatch.setattr(yolov3_weights, "YoloV3", lambda **_: tiny())
    with pytest.raises(CheckpointError, match=r"'stages.0.0.norm.running_var'.*negative"):
        load_yolov3(path)


def test_the_files_of_these_tests_have_the_known_sizes() -> None:
    found = shapes(32)
    assert len(list(published_names())) == len(found) == 73
    assert (found[58], found[65], found[72]) == ((512, 1024, 3), (256, 512, 3), (128, 256, 3))
    floats = sum(c_in * c_out * k * k + 4 * c_out for c_in, c_out, k in found)
    floats += sum(255 * (c + 1) for c in (1024, 512, 256))
    assert 4 * floats + 20 == 252_209_544
