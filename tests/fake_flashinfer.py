"""What `judges/flashinfer_attention.py` uses of FlashInfer, in a few lines of PyTorch."""

from __future__ import annotations

from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch


class RaggedWrapper:
    """Ranges of rows attend to ranges of keys."""

    def __init__(self, workspace: torch.Tensor, layout: str) -> None:
        assert layout == "NHD"

    def plan(self, ends: Any, key_ends: Any, heads: int, kv_heads: int, dim: int, **rest: Any):
        self.spans = list(zip(ends, ends[1:], key_ends, key_ends[1:], strict=False))
        self.causal = rest["causal"]

    def run(self, q: Any, k: Any, v: Any, return_lse: bool) -> tuple[torch.Tensor, torch.Tensor]:
        out, weight = torch.empty_like(q), torch.empty(q.shape[:2])
        group = q.shape[1] // k.shape[1]
        for begin, end, first, last in self.spans:
            keys, values = (x[first:last].repeat_interleave(group, 1) for x in (k, v))
            scores = torch.einsum("qhd,khd->qhk", q[begin:end], keys) / q.shape[2] ** 0.5
            if self.causal:
                future = torch.ones(scores.shape[0], scores.shape[2]).triu(1).bool()
                scores = scores.masked_fill(future[:, None], float("-inf"))
            out[begin:end] = torch.einsum("qhk,khd->qhd", scores.softmax(-1), values)
            weight[begin:end] = scores.logsumexp(-1)
        return out, weight


def merge_state(a: Any, weight_a: Any, b: Any, weight_b: Any) -> tuple[Any, Any]:
    weight = torch.logaddexp(weight_a, weight_b)
    shares = [(x - weight).exp()[..., None] for x in (weight_a, weight_b)]
    return a * shares[0] + b * shares[1], weight


def module() -> ModuleType:
    """For `sys.modules`."""
    found = ModuleType("flashinfer")
    found.__spec__ = ModuleSpec("flashinfer", None)
    found.__dict__.update(
        BatchPrefillWithRaggedKVCacheWrapper=RaggedWrapper, merge_state=merge_state
    )
    return found
