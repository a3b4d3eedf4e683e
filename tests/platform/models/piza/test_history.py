"""The history encoder."""

from __future__ import annotations

import torch

from reir.models.piza.history import HistoryEncoder

WHOLE, HALF, SMALL = [0.0, 0, 1, 1], [0.5, 0, 1, 0.5], [0.6, 0.1, 0.61, 0.12]
NOTHING = [0.0, 0, 0, 0]


def test_padding_does_not_change_a_history() -> None:
    torch.manual_seed(0)
    encoder = HistoryEncoder().eval()
    alone = encoder(torch.tensor([[WHOLE, HALF]]), torch.tensor([[True, True]]))
    padded = encoder(
        torch.tensor([[WHOLE, HALF, NOTHING], [WHOLE, HALF, SMALL]]),
        torch.tensor([[True, True, False], [True, True, True]]),
    )
    for single, several in zip(alone, padded, strict=True):
        torch.testing.assert_close(single[0], several[0])
    assert not torch.allclose(padded.summary[0], padded.summary[1])
    torch.testing.assert_close(padded.summary.norm(dim=1), torch.ones(2))


def test_released_size() -> None:
    # The release contains the transformer layer twice, and 277,490 parameters.
    encoder = HistoryEncoder()
    layer = sum(each.numel() for each in encoder.layer.parameters())
    assert sum(each.numel() for each in encoder.parameters()) == 277_490 - layer
