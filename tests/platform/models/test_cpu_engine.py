"""OpenVINO gives the output of torch, for any batch size, in threads, and tells nobody."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

from reir.models.cpu_engine import CpuEngine
from reir.models.nano.crop_network import PLANS, CropNetwork, CropNetworkName


class Pooled(nn.Module):
    """A crop network on pixels, with two outputs."""

    def __init__(self, name: CropNetworkName) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = CropNetwork(name)

    def forward(self, squares: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        maps = self.network(squares.permute(0, 3, 1, 2).float())
        return maps.mean((2, 3)), maps.amax((2, 3))


def crops(number: int, side_px: int = 64) -> torch.Tensor:
    random = torch.Generator().manual_seed(number)
    return torch.randint(0, 256, (number, side_px, side_px, 3), generator=random).byte()


@pytest.mark.parametrize("side_px", [32, 50, 96])
@pytest.mark.parametrize("name", PLANS)
def test_outputs_equal_those_of_torch(name: CropNetworkName, side_px: int) -> None:
    module = Pooled(name).eval()
    engine = CpuEngine(module, crops(1, side_px), dtype=torch.float32)
    for number in (1, 5):
        with torch.inference_mode():
            expected = module(crops(number, side_px))
        for found, wanted in zip(engine(crops(number, side_px)), expected, strict=True):
            assert wanted.abs().max() > 1e-3
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_known_batch_size_changes_no_bit(dtype: torch.dtype) -> None:
    module = Pooled("efficientnet_lite0").eval()
    known = CpuEngine(module, crops(1), dtype=dtype, batch=3)
    for found, wanted in zip(
        known(crops(3)), CpuEngine(module, crops(1), dtype=dtype)(crops(3)), strict=True
    ):
        assert torch.equal(found, wanted)


def test_half_precision_is_close_and_returns_float32() -> None:
    module = Pooled("efficientnet_lite0").eval()
    engine = CpuEngine(module, crops(1), dtype=torch.bfloat16)
    with torch.inference_mode():
        expected = module(crops(3))[0]
    found = engine(crops(3))[0]
    assert found.dtype == torch.float32
    assert torch.cosine_similarity(found, expected).min() > 0.98


def test_an_empty_batch_gives_empty_outputs() -> None:
    engine = CpuEngine(Pooled("efficientnet_lite0"), crops(1), dtype=torch.float32)
    assert [output.shape for output in engine(crops(0))] == [(0, 1280), (0, 1280)]


def test_threads_get_their_own_outputs_and_later_calls_change_nothing() -> None:
    engine = CpuEngine(Pooled("efficientnet_lite0"), crops(1), dtype=torch.float32)
    batches = [crops(number) for number in range(1, 9)]
    alone = [engine(batch)[0] for batch in batches]
    copies = [output.clone() for output in alone]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda batch: engine(batch)[0], batches * 4))
    for i, output in enumerate(together):
        np.testing.assert_array_equal(output, copies[i % 8])
    for output, copy in zip(alone, copies, strict=True):
        assert torch.equal(output, copy)


def test_the_telemetry_of_openvino_is_never_loaded() -> None:
    program = (
        "import sys, torch; from reir.models.cpu_engine import CpuEngine\n"
        "CpuEngine(torch.nn.ReLU(), torch.zeros(1, 2), dtype=torch.float32)\n"
        "assert not [m for m in sys.modules if m.startswith('openvino_telemetry.')]\n"
        "assert sys.modules['openvino_telemetry'] is None"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_process_can_fork_while_another_thread_has_used_an_engine() -> None:
    # In the child of a fork, Python deletes what belonged to other threads. OpenVINO's requests
    # would wait there for threads that do not exist, as happened when Ray started its processes.
    program = """
import subprocess, threading, torch
from reir.models.cpu_engine import CpuEngine

engine = CpuEngine(torch.nn.Conv2d(3, 4, 3), torch.zeros(1, 3, 8, 8), dtype=torch.float32)
used, over = threading.Event(), threading.Event()

def use():
    engine(torch.zeros(2, 3, 8, 8))
    used.set()
    over.wait()

threading.Thread(target=use, daemon=True).start()
used.wait()
subprocess.run(["true"], preexec_fn=lambda: None, check=True)
over.set()
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
