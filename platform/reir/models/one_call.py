"""`OneCall`: a frozen module that torch runs without Python between its operations."""

from __future__ import annotations

import threading
import warnings
from typing import Any

import torch
from torch import Tensor, nn

_TRACING = threading.Lock()
"""What warnings are shown is a matter of the whole process: one at a time changes it."""


class OneCall:
    """A module as torch itself runs it, for the same numbers to the bit; thread-safe.

    Python would ask for its lock after each of some hundred operations, and beside other threads
    wait for it. Torch advises `torch.compile` in its stead, which needs a compiler on the user's
    machine.

    Args:
        module: from tensors to a tensor or a tuple of them; what it does may depend on the shapes
            of its inputs only as far as those of `example` stand for all.
        example: inputs.
    """

    def __init__(self, module: nn.Module, *example: Tensor) -> None:
        with _TRACING, torch.no_grad(), warnings.catch_warnings(action="ignore"):
            self._traced: Any = torch.jit.trace(  # type: ignore[no-untyped-call]
                module, example, check_trace=False
            )

    def __call__(self, *inputs: Tensor) -> Any:
        """Return what the module makes of the inputs; without gradients."""
        # its first calls would be spent on rewriting it, for nothing
        with torch.inference_mode(), torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
            return self._traced(*inputs)
