"""Where there is no GPU, kernels run in Triton's interpreter, in this folder's tests alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from sglang_deepprune.kernels import label_head, launch, pair_score, prefix_attention

FOLDER = Path(__file__).parent


def interpret(module: ModuleType, patch: pytest.MonkeyPatch) -> None:
    """Put interpreted copies of a module's kernels in its place."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    for name, value in vars(module).copy().items():
        if isinstance(value, JITFunction):
            patch.setattr(module, name, InterpretedFunction(value.fn))


def widen_bfloat16(patch: pytest.MonkeyPatch) -> None:
    """Mend the interpreter's dot, which multiplies bfloat16 by its bit patterns (Triton 3.6).

    In float32 the products are exact, as they are on the card.
    """
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot = InterpreterBuilder.create_dot

    def widened(self, left, right, *rest):
        if left.dtype.scalar == launch.tl.bfloat16:
            left, right = (
                TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), launch.tl.float32)
                for x in (left, right)
            )
        return dot(self, left, right, *rest)

    patch.setattr(InterpreterBuilder, "create_dot", widened)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The interpreter uses what NumPy has deprecated, thousands of times."""
    for item in items:
        if item.path.parent == FOLDER:
            item.add_marker(pytest.mark.filterwarnings("ignore::DeprecationWarning:triton"))


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module", autouse=True)
def interpreter() -> Iterator[None]:
    """Set here and not by the environment of the whole run: SGLang's servers would inherit it.

    Scope "package" would not do: in a folder without `__init__.py` it lasts as long as the run. By
    now another test may have imported triton, whose own `tl.sum` and such are kernels too.
    """
    if launch.tl is None or torch.cuda.is_available():
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "TRITON_INTERPRET", "1")
        for module in (launch.tl.standard, launch.tl, label_head, pair_score, prefix_attention):
            interpret(module, patch)
        widen_bfloat16(patch)
        yield
