"""`TracedModule`: a frozen module that torch runs without returning to Python in between."""

from __future__ import annotations

import threading
import warnings
from typing import Any

import torch
from torch import Tensor, nn

_TRACING = threading.Lock()
"""Warning filters belong to the whole process, so only one thread at a time may change them."""


def trace(module: nn.Module, *example: Tensor) -> Any:
    """Return a module as traced by torch, whose warnings are not shown.

    The weights become constants of the trace, so they must not need gradients.
    """

    # Given the module itself, torch would first convert each of its submodules, of which there are
    # hundreds, and that takes several times as long as the trace.
    def run(*inputs: Tensor) -> Any:
        return module(*inputs)

    with _TRACING, torch.no_grad(), warnings.catch_warnings(action="ignore"):
        # Not checked by torch, which would run the module again: tests compare the bits.
        return torch.jit.trace(run, example, check_trace=False)  # type: ignore[no-untyped-call]


class TracedModule:
    """A traced module; thread-safe, with exactly the outputs of the module itself.

    Run from Python, a module takes the interpreter lock again after each of its operations, of
    which there are hundreds, and waits for it whenever other threads run. Torch recommends
    `torch.compile` instead of tracing, but that needs a compiler on the user's machine.

    Args:
        module: from tensors to a tensor or a tuple of them. Its control flow must be the same for
            all inputs as for `example`.
        example: inputs to trace with.
    """

    def __init__(self, module: nn.Module, *example: Tensor) -> None:
        self._traced = trace(module, *example)

    def __call__(self, *inputs: Tensor) -> Any:
        """Return the output of the module, without gradients."""
        # Torch would spend the first calls on optimizing the graph, without making it faster.
        with torch.inference_mode(), torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
            return self._traced(*inputs)
