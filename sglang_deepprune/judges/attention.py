"""Which attention a packed judge runs with: the project's, or FlashInfer's where it is chosen.

Imports no torch at the top: the server's main process checks a choice here.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from sglang_deepprune.config import ConfigError, DeepPruneConfig

if TYPE_CHECKING:
    import torch

ENV = "DEEPPRUNE_JUDGE_ATTENTION"  # how the judge's process is told
FLASHINFER = "flashinfer"
WORKSPACE_BYTES = 128 << 20  # of each of its two wrappers, as FlashInfer recommends

# (q, k, v, tree, scale) -> out, as `kernels.prefix_attention`
Attend = Callable[[Any, Any, Any, Any, "float | None"], Any]


def is_flashinfer_installed() -> bool:
    return find_spec(FLASHINFER) is not None


def workspace_bytes(chosen: str) -> int:
    """What the attention that was chosen holds of a GPU for as long as the judge lives."""
    return 2 * WORKSPACE_BYTES if chosen == FLASHINFER else 0


def check_attention(config: DeepPruneConfig) -> None:
    """Raises ConfigError, one sentence, where a judge could not use what was chosen."""
    if config.judge_attention != FLASHINFER:
        return
    if config.judge.partition(":")[0] != "llm" or config.judge_device == "cpu":
        raise ConfigError("judge_attention", "flashinfer is for llm:PATH on a GPU; leave it out")
    if not is_flashinfer_installed():
        raise ConfigError("judge_attention", "flashinfer is not installed; leave it out")


def choose_attention(device: torch.device) -> Attend:
    """In the judge's process: what its packed passes attend with."""
    if os.environ.get(ENV) == FLASHINFER:
        from sglang_deepprune.judges.flashinfer_attention import FlashInferAttention

        return FlashInferAttention(device)
    from sglang_deepprune.kernels.prefix_attention import prefix_attention

    return prefix_attention
