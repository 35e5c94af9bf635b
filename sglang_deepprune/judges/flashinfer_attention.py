"""FlashInfer in place of `kernels.prefix_attention`: `--deepprune-judge-attention flashinfer`.

Two levels, as in FlashInfer's cascade: every token attends to its own segment (ragged, causal),
the tokens of children to their prefix (ragged, not causal), and `merge_state` joins the two by
their log-sum-exps. Of a packed pass with kept prefixes only the children have queries.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch

from sglang_deepprune.judges.attention import WORKSPACE_BYTES
from sglang_deepprune.kernels.prefix_attention import prefix_attention
from sglang_deepprune.kernels.prefix_tree import PrefixTree


class FlashInferAttention:
    """Takes and gives what `prefix_attention` does. Plans once a tree: all layers share it."""

    def __init__(self, device: torch.device | str):
        import flashinfer

        self._merge = flashinfer.merge_state
        self._own, self._shared = (
            flashinfer.BatchPrefillWithRaggedKVCacheWrapper(
                torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device), "NHD"
            )
            for _ in range(2)
        )
        self._planned: tuple[Any, ...] = ()

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        tree: PrefixTree,
        scale: float | None = None,
    ) -> torch.Tensor:
        """See `prefix_attention`, which also takes trees with a prefix of nothing."""
        if 0 in tree.prefix_lengths:
            return prefix_attention(q, k, v, tree, scale)
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        skipped = len(k) - len(q)  # the prefixes' rows, or none
        head = tree.num_prefix_tokens
        self._plan(q, k, tree, scale, skipped)
        out, weight = self._own.run(q, k[skipped:], v[skipped:], return_lse=True)
        children = slice(head - skipped, None)
        part, part_weight = self._shared.run(q[children], k[:head], v[:head], return_lse=True)
        out[children], _ = self._merge(out[children], weight[children], part, part_weight)
        return out

    def _plan(
        self, q: torch.Tensor, k: torch.Tensor, tree: PrefixTree, scale: float | None, skipped: int
    ) -> None:
        key = (tree, scale, skipped, q.shape[1:], k.shape[1:], q.dtype)
        if self._planned[1:] == key[1:] and self._planned[0] is tree:
            return
        num_prefixes = len(tree.prefix_lengths)
        families = [0] * num_prefixes
        for parent, length in zip(tree.parents, tree.child_lengths, strict=True):
            families[parent] += length
        family_ends = torch.tensor([0, *accumulate(families)], dtype=torch.int32, device=q.device)
        own_ends = (tree.cu_seqlens[num_prefixes:] - skipped) if skipped else tree.cu_seqlens
        sizes = (q.shape[1], k.shape[1], q.shape[2])
        options = {"q_data_type": q.dtype, "sm_scale": scale}
        self._own.plan(own_ends, own_ends, *sizes, causal=True, **options)
        self._shared.plan(
            family_ends, tree.cu_seqlens[: num_prefixes + 1], *sizes, causal=False, **options
        )
        self._planned = key
