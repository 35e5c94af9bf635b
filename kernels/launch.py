"""Where a kernel runs: compiled on CUDA, in Triton's interpreter if asked, elsewhere not at all.

The one place that imports triton. Without it the kernels stay plain functions that nobody calls,
and every dispatcher takes its PyTorch reference.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU build of torch brings no triton
    triton = tl = None

__all__ = ["has_triton", "jit", "next_power_of_2", "runs_triton", "tl"]


def jit(*do_not_specialize: str) -> Callable[[Callable[..., Any]], Any]:
    """`triton.jit` where there is triton.

    Triton compiles anew for an integer that is 1, or divides by 16, or does not. The arguments
    named here change from batch to batch, and must not stop a server for that.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        if triton is None:
            return function
        return triton.jit(function, do_not_specialize=list(do_not_specialize))

    return decorate


def has_triton() -> bool:
    return triton is not None


def runs_triton(tensor: torch.Tensor) -> bool:
    """Whether a kernel on this tensor is launched, rather than its reference called."""
    if triton is None:
        return False
    return tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"


def next_power_of_2(number: int) -> int:
    """The side of a Triton block that holds `number` entries."""
    return 1 << max(0, number - 1).bit_length()
