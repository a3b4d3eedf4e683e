"""Crop networks against a plain numpy evaluation of the same weights, cell by cell."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from reir.models.nano.crop_network import (
    CropNetwork,
    CropNetworkName,
    InvertedResidual,
    SameConv,
    same_padding,
)

Array = npt.NDArray[np.float64]
# expansion, channels, stride and kernel of all blocks, written out
BLOCKS: dict[CropNetworkName, list[tuple[int, int, int, int]]] = {
    "efficientnet_lite0": [
        *[(1, 16, 1, 3), (6, 24, 2, 3), (6, 24, 1, 3), (6, 40, 2, 5), (6, 40, 1, 5)],
        *[(6, 80, 2, 3), (6, 80, 1, 3), (6, 80, 1, 3)],
        *[(6, 112, 1, 5), (6, 112, 1, 5), (6, 112, 1, 5)],
        *[(6, 192, 2, 5), (6, 192, 1, 5), (6, 192, 1, 5), (6, 192, 1, 5), (6, 320, 1, 3)],
    ],
}


def network_named(name: CropNetworkName) -> CropNetwork:
    torch.manual_seed(0)
    network = CropNetwork(name).eval()
    for parameter in network.parameters():  # keep activations away from zero through 50 layers
        nn.init.normal_(parameter, std=(2 / max(parameter[0].numel(), 1)) ** 0.5 / 1.1)
    return network


@pytest.fixture(scope="module")
def network() -> CropNetwork:
    return network_named("efficientnet_lite0")


def slow_conv(x: Array, weight: Array, bias: Array, stride: int, *, each_channel: bool) -> Array:
    """(c_in, H, W) -> (c_out, ceil(H/stride), ceil(W/stride)), one output cell at a time.

    Output cell (i, j) sees the window that TensorFlow's SAME gives it; cells outside are zero.
    """
    kernel = weight.shape[2]
    height, width = -(-x.shape[1] // stride), -(-x.shape[2] // stride)
    top = max((height - 1) * stride + kernel - x.shape[1], 0) // 2
    left = max((width - 1) * stride + kernel - x.shape[2], 0) // 2
    padded = np.zeros((x.shape[0], x.shape[1] + 2 * kernel, x.shape[2] + 2 * kernel))
    padded[:, top : top + x.shape[1], left : left + x.shape[2]] = x
    out = np.zeros((len(weight), height, width))
    for i in range(height):
        for j in range(width):
            y0, x0 = i * stride, j * stride
            window = padded[:, y0 : y0 + kernel, x0 : x0 + kernel]
            product = (
                (weight[:, 0] * window).sum((1, 2))
                if each_channel
                else np.tensordot(weight, window, axes=3)
            )
            out[:, i, j] = product + bias
    return out


class SlowNetwork:
    """Consumes the convolutions in the order of execution."""

    def __init__(self, name: CropNetworkName, network: CropNetwork) -> None:
        self.layers = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
        self.blocks = BLOCKS[name]
        self.used = 0

    def conv(self, x: Array, stride: int = 1, *, each: bool = False, act: bool = True) -> Array:
        layer = self.layers[self.used]
        self.used += 1
        assert layer.bias is not None
        weight, bias = layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy()
        y = slow_conv(x, weight, bias, stride, each_channel=each)
        return y.clip(0, 6) if act else y

    def __call__(self, x: Array) -> Array:
        x = self.conv(x, 2)
        channels = 32
        for expansion, c_out, stride, kernel in self.blocks:
            y = self.conv(x) if expansion > 1 else x
            assert self.layers[self.used].kernel_size == (kernel, kernel)
            y = self.conv(self.conv(y, stride, each=True), act=False)
            x = x + y if stride == 1 and channels == c_out else y
            channels = c_out
        return self.conv(x)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (33, 50), (96, 31)])
@pytest.mark.parametrize("name", BLOCKS)
def test_the_network_equals_the_slow_reference(
    name: CropNetworkName, height: int, width: int
) -> None:
    network = network_named(name)
    random = torch.Generator().manual_seed(height)
    image = torch.rand(1, 3, height, width, generator=random) * 255
    slow = SlowNetwork(name, network)
    expected = slow((image[0].double().numpy() - 127) / 128)
    assert slow.used == len(slow.layers) == 3 * len(BLOCKS[name]) + 1
    with torch.inference_mode():
        found = network(image)
    assert found.shape == (1, 1280, -(-height // 32), -(-width // 32))
    assert np.abs(expected).mean() > 0.01  # otherwise the comparison would show nothing
    np.testing.assert_allclose(found[0].numpy(), expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (6, 7), (9, 8)])
@pytest.mark.parametrize("each_channel", [False, True])
def test_same_conv_equals_the_slow_reference(
    height: int, width: int, kernel: int, stride: int, each_channel: bool
) -> None:
    torch.manual_seed(0)
    layer = SameConv(4, 4, kernel, stride=stride, groups=4 if each_channel else 1)
    x = torch.randn(1, 4, height, width)
    assert layer.bias is not None
    expected = slow_conv(
        x[0].double().numpy(),
        layer.weight.detach().double().numpy(),
        layer.bias.detach().double().numpy(),
        stride,
        each_channel=each_channel,
    )
    np.testing.assert_allclose(layer(x)[0].detach().numpy(), expected, atol=1e-5)


def test_the_odd_cell_of_padding_goes_to_the_end() -> None:
    assert same_padding(8, 3, 2) == (0, 1)
    assert same_padding(9, 3, 2) == (1, 1)
    assert same_padding(8, 3, 1) == (1, 1)
    assert same_padding(8, 1, 2) == (0, 0)


def test_only_blocks_that_keep_the_shape_are_residual(network: CropNetwork) -> None:
    blocks = [m for m in network.modules() if isinstance(m, InvertedResidual)]
    channels = [32, *(b.project.out_channels for b in blocks)]
    plan = BLOCKS["efficientnet_lite0"]
    assert [c for _, c, _, _ in plan] == channels[1:]
    assert [b.residual for b in blocks] == [
        False,
        *(
            before == after and stride == 1
            for (before, after), (_, _, stride, _) in zip(
                pairwise(channels[1:]), plan[1:], strict=True
            )
        ),
    ]


def test_a_crop_gives_the_same_features_alone_and_in_a_batch(network: CropNetwork) -> None:
    crops = torch.rand(5, 3, 96, 96, generator=torch.Generator().manual_seed(2)) * 255
    with torch.inference_mode():
        together = network(crops)
        for i in range(len(crops)):
            alone = network(crops[i : i + 1])[0]
            torch.testing.assert_close(alone, together[i], rtol=1e-4, atol=1e-4)


def test_the_memory_layout_does_not_change_the_output(network: CropNetwork) -> None:
    crops = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(3)) * 255
    last = CropNetwork("efficientnet_lite0").eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    last.load_state_dict(network.state_dict())
    with torch.inference_mode():
        found = last(crops.contiguous(memory_format=torch.channels_last))
        torch.testing.assert_close(found, network(crops), rtol=1e-4, atol=1e-4)


def test_no_crops_give_no_features(network: CropNetwork) -> None:
    with torch.inference_mode():
        assert network(torch.zeros(0, 3, 96, 96)).shape == (0, 1280, 3, 3)


def test_a_saved_network_is_loaded_bit_for_bit(network: CropNetwork, tmp_path: Path) -> None:
    save_file(network.state_dict(), tmp_path / "network.safetensors")
    loaded = CropNetwork("efficientnet_lite0").eval()
    loaded.load_state_dict(load_file(tmp_path / "network.safetensors"))
    x = torch.rand(1, 3, 64, 64) * 255
    with torch.inference_mode():
        assert torch.equal(loaded(x), network(x))
