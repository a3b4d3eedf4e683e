"""`CpuEngine`: a frozen module that OpenVINO runs on the CPU.

OpenVINO runs the small convolutions of the detector and the crop network about 1.5 times as fast as
torch (docs/LOG.md, 2026-11-25). Torch remains the engine for training and for GPUs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from reir.models.traced_module import trace


class CpuEngine:
    """A module converted to OpenVINO; thread-safe.

    Calls at the same time have a compiled model each, with as many cores as torch has in the
    calling thread, so that threads run side by side.

    Args:
        module: from tensors to a tensor or a tuple of them, with the same operations for any
            batch size.
        example: (1, ...) inputs; other inputs may differ in the first axis only.
        dtype: of the computation, float32 or bfloat16. Outputs are float32.
        batch: the size of every batch; None for any size. OpenVINO runs the detector for a quarter
            less time if it knows the size (docs/LOG.md).
    """

    def __init__(
        self, module: nn.Module, *example: Tensor, dtype: torch.dtype, batch: int | None = None
    ) -> None:
        self._openvino = _import_openvino()
        self._model = _convert(module.eval().requires_grad_(False), example)
        first = -1 if batch is None else batch
        self._model.reshape({i: [first, *each.shape[1:]] for i, each in enumerate(example)})
        self._precision = "bf16" if dtype == torch.bfloat16 else "f32"
        # Requests belong to the engine. If they belonged to threads, the child of a fork would
        # destroy those of all other threads, and OpenVINO would wait there forever.
        self._requests: list[Any] = []
        self._idle: dict[int, list[Any]] = {}

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs of the module for a batch, without gradients."""
        # These operations on lists and dictionaries are atomic, so no lock is needed.
        idle = self._idle.setdefault(torch.get_num_threads(), [])
        try:
            request = idle.pop()
        except IndexError:
            request = self._compile().create_infer_request()
            self._requests.append(request)
        try:
            request.infer([each.contiguous().numpy() for each in inputs], share_inputs=True)
            # Copied, because the next call overwrites the memory of the request.
            outputs: Sequence[Any] = request.output_tensors
            return tuple(torch.from_numpy(output.data.copy()) for output in outputs)
        finally:
            idle.append(request)

    def _compile(self) -> Any:
        settings = {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": self._precision,
            "NUM_STREAMS": 1,
            # Several threads or processes would otherwise all be pinned to the first core.
            "ENABLE_CPU_PINNING": False,
        }
        return self._openvino.Core().compile_model(self._model, "CPU", settings)


def _convert(module: nn.Module, example: Sequence[Tensor]) -> Any:
    """Return the module as a model of OpenVINO, by the front end that `convert_model` uses.

    `convert_model` itself takes several times as long, since it also handles other frameworks.
    """
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    front_end = FrontEndManager().load_by_framework("pytorch")
    traced = trace(module, *example)
    # Most nodes of a trace are constants that occur hundreds of times, such as a stride of 1. The
    # front end spends half of its time on them unless equal ones are merged.
    torch._C._jit_pass_cse(traced.graph)
    # Kept in a variable: OpenVINO reads it during `convert`, but does not keep it alive.
    decoder = TorchScriptPythonDecoder(traced, example_input=tuple(example))
    return front_end.convert(front_end.load(decoder))


def _import_openvino() -> Any:
    # OpenVINO reports its use to its authors unless this package is missing. Nothing about users'
    # photos may leave their machines, and indexing works without a network.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino
