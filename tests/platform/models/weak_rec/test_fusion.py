"""Multi-scale fusion against the published order of its steps."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from reir.models.weak_rec.fusion import MultiScaleFusion


def random_maps(batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return (
        torch.randn(batch, 8, 3, 2),
        torch.randn(batch, 4, 6, 4),
        torch.randn(batch, 2, 12, 8),
    )


def doubled(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)


def halved(x: Tensor) -> Tensor:
    return (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4


def test_maps_are_fused_to_the_finest_and_back() -> None:
    fusion, (coarse, middle, fine) = MultiScaleFusion((8, 4, 2), 6).eval(), random_maps()

    def convolved(path: nn.Sequential, x: Tensor) -> Tensor:
        for block in list(path)[1:]:
            x = block(x)
        return x

    m = torch.cat([convolved(fusion.up_to_middle, doubled(coarse)), middle], 1)
    f = torch.cat([convolved(fusion.up_to_fine, doubled(m)), fine], 1)
    m = torch.cat([convolved(fusion.down_to_middle, halved(f)), m], 1)
    c = fusion.project(torch.cat([convolved(fusion.down_to_coarse, halved(m)), coarse], 1))
    got = fusion((coarse, middle, fine))
    assert got.shape == (2, 6, 6)
    for row in range(3):
        for column in range(2):
            torch.testing.assert_close(got[:, 2 * row + column], c[:, :, row, column])


def test_every_weight_is_trained() -> None:
    fusion = MultiScaleFusion((8, 4, 2), 6)
    fusion(random_maps()).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in fusion.parameters())


def test_published_sizes() -> None:
    with torch.device("meta"):
        fusion = MultiScaleFusion()
        maps = [torch.zeros(2, c, s, s) for c, s in ((1024, 13), (512, 26), (256, 52))]
    assert fusion(maps).shape == (2, 169, 1024)
    blocks = {name: tuple(p.shape) for name, p in fusion.named_parameters() if p.ndim == 4}
    assert blocks == {
        "up_to_middle.1.conv.weight": (512, 1024, 1, 1),
        "up_to_middle.2.conv.weight": (512, 512, 3, 3),
        "up_to_fine.1.conv.weight": (512, 1024, 1, 1),
        "up_to_fine.2.conv.weight": (512, 512, 3, 3),
        "down_to_middle.1.conv.weight": (512, 768, 1, 1),
        "down_to_middle.2.conv.weight": (512, 512, 3, 3),
        "down_to_coarse.1.conv.weight": (512, 1536, 1, 1),
        "down_to_coarse.2.conv.weight": (512, 512, 3, 3),
        "project.conv.weight": (1024, 1536, 1, 1),
    }
