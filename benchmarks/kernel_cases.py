"""The kernels' work at a 4B judge's shapes, with what runs it: ours, PyTorch, FlashInfer.

FLOPs and bytes are what the work takes at least: each value moved once, no product that a mask
throws away. The kernels' docstrings hold the formulae.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import product
from math import prod
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.report import Row
from sglang_deepprune.judges.attention import is_flashinfer_installed
from sglang_deepprune.judges.flashinfer_attention import FlashInferAttention
from sglang_deepprune.kernels.label_head import label_head_reference, label_head_triton
from sglang_deepprune.kernels.pair_score import (
    PairHead,
    pair_score_reference,
    pair_score_triton,
)
from sglang_deepprune.kernels.prefix_attention import (
    Blocks,
    prefix_attention_reference,
    prefix_attention_triton,
)
from sglang_deepprune.kernels.prefix_tree import PrefixTree, pack

HEADS, KV_HEADS, HIDDEN, NUM_LABELS = 32, 8, 2560, 2
EMBEDDING, CLUSTERS, MEMBERS = 384, 32, 10
TRACES, CANDIDATES = (500, 1000, 2000), (16, 128, 512)
# Other sizes of block, worth a try on a card; the first is what is used.
SWEEP = (Blocks(64, 64, 4, 2), Blocks(64, 64, 4, 3), Blocks(64, 128, 4, 2), Blocks(128, 32, 8, 2),
         Blocks(128, 64, 8, 2), Blocks(128, 64, 8, 3), Blocks(128, 128, 8, 2))  # fmt: skip
MAX_COPY_BYTES = 20e9  # a rival that copies more than this is left out
Run = Callable[[], torch.Tensor]


@dataclass
class Case:
    """One piece of work, and by name who does it; `exact` is the result that all must give."""

    kernel: str
    shape: Row
    flops: float
    num_bytes: float
    runs: dict[str, Run]
    exact: Run
    notes: dict[str, str] = field(default_factory=dict)  # name -> why it is not among `runs`


def timed_cases(device: str, *, sweep: bool = False) -> Iterator[Case]:
    """The shapes of the issue: traces of 500 to 2,000 tokens, 16 to 512 candidates. Small ones
    first: one that ends the process costs no number of another."""
    for candidates in () if sweep else CANDIDATES:
        yield label_case(candidates, torch.bfloat16, device)
        yield pair_case(candidates, device)
    for length, candidates in sorted(product(TRACES, CANDIDATES), key=prod):
        tree = pack([length], [length] * candidates, [0] * candidates, device=device)
        yield attention_case(tree, torch.bfloat16, 128, device, sweep=sweep)


def small_cases(device: str, dtypes: list[torch.dtype]) -> Iterator[Case]:
    """Ragged trees that a full check in float64 fits, the interpreter as well."""
    for dtype in dtypes:
        for head_dim in (64, 128):
            tree = pack([70, 0, 33], [50, 1, 9, 64, 3], [0, 0, 0, 1, 2], device=device)
            yield attention_case(tree, dtype, head_dim, device, heads=(8, 2), exact=torch.float64)
        # As a judge's passes are: several blocks of keys, prefixes kept, heads before tokens.
        tree = pack([150, 40], [70, 3, 45], [0, 0, 1], device=device)
        yield attention_case(
            tree, dtype, 128, device, heads=(8, 2), exact=torch.float64, is_cached=True
        )
        yield label_case(5, dtype, device, exact=torch.float64)
    yield pair_case(16, device, exact=torch.float64)


def attention_work(
    tree: PrefixTree, heads: int, kv_heads: int, head_dim: int, size: int
) -> tuple[float, float]:
    """(FLOPs, bytes) of attention along a tree, with `size` bytes a value."""
    scores = sum(length * (length + 1) / 2 for length in tree.prefix_lengths)
    for parent, length in zip(tree.parents, tree.child_lengths, strict=True):
        scores += length * tree.prefix_lengths[parent] + length * (length + 1) / 2
    values = tree.total_tokens * head_dim * 2 * (heads + kv_heads)
    return 4 * head_dim * heads * scores, size * values


def attention_case(
    tree: PrefixTree,
    dtype: torch.dtype,
    head_dim: int,
    device: str,
    *,
    heads: tuple[int, int] = (HEADS, KV_HEADS),
    exact: torch.dtype | None = None,
    sweep: bool = False,
    is_cached: bool = False,
) -> Case:
    """`is_cached`: the children alone have queries, and the rows of all three are strided."""
    total = tree.total_tokens
    q = _random(device, dtype, total, heads[0], head_dim)
    k, v = (_random(device, dtype, total, heads[1], head_dim) for _ in range(2))
    if is_cached:
        q, k, v = (one.transpose(0, 1).contiguous().transpose(0, 1) for one in (q, k, v))
        q = q[tree.num_prefix_tokens :]
    wide = exact or dtype
    flops, num_bytes = attention_work(tree, *heads, head_dim, q.element_size())
    shape: Row = {
        "dtype": _name(dtype), "head_dim": head_dim, "prefix": max(tree.prefix_lengths),
        "candidates": len(tree.parents), "tokens": total, **({"cached": True} if is_cached else {}),
    }  # fmt: skip
    runs: dict[str, Run] = {"ours": lambda: prefix_attention_triton(q, k, v, tree)}
    case = Case(
        "prefix_attention", shape, flops, num_bytes, runs,
        lambda: prefix_attention_reference(q.to(wide), k.to(wide), v.to(wide), tree),
    )  # fmt: skip
    if sweep:
        case.runs = {
            f"{b.rows}x{b.keys} w{b.warps} s{b.stages}": _with_blocks(q, k, v, tree, b)
            for b in SWEEP
        }
    elif exact is None:
        _add_shared(case, q, k, v, tree)
        _add_unshared(case, q, k, v, tree)
        _add_flashinfer(case, q, k, v, tree)
    return case


def _with_blocks(q: Any, k: Any, v: Any, tree: PrefixTree, blocks: Blocks) -> Run:
    return lambda: prefix_attention_triton(q, k, v, tree, blocks=blocks)


def _add_shared(case: Case, q: Any, k: Any, v: Any, tree: PrefixTree) -> None:
    """PyTorch along the tree, KV heads repeated before the clock: with a mask and `enable_gqa`,
    CUDA may have no backend but the one that writes all scores."""
    keys, values = (one.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for one in (k, v))
    case.runs["torch, shared"] = lambda: prefix_attention_reference(q, keys, values, tree)


def _add_unshared(case: Case, q: Any, k: Any, v: Any, tree: PrefixTree) -> None:
    """PyTorch on whole prompts, each with its own copy of the prefix; copied before the clock."""
    size = tree.unshared_tokens * (q[0].numel() + 2 * k[0].numel()) * q.element_size()
    if size > MAX_COPY_BYTES:
        case.notes["torch, unshared"] = f"its copies take {size / 1e9:.0f} GB"
        return
    prompts, prefix = [], slice(0, tree.num_prefix_tokens)
    row = prefix.stop
    for length in tree.child_lengths:
        own = slice(row, row + length)
        prompts.append([torch.cat([x[prefix], x[own]]).transpose(0, 1)[None] for x in (q, k, v)])
        row += length

    def run() -> torch.Tensor:
        parts = [
            F.scaled_dot_product_attention(*prompt, is_causal=True, enable_gqa=True)
            for prompt in prompts
        ]
        rows = [part[0, :, prefix.stop :].transpose(0, 1) for part in parts]
        return torch.cat([parts[0][0, :, prefix].transpose(0, 1), *rows])

    case.runs["torch, unshared"] = run


def _add_flashinfer(case: Case, q: Any, k: Any, v: Any, tree: PrefixTree) -> None:
    if not is_flashinfer_installed():
        case.notes["flashinfer"] = "not installed"
        return
    attention = FlashInferAttention(q.device)
    case.runs["flashinfer"] = lambda: attention(q, k, v, tree)  # planned once, as in a pass


def label_case(
    batch: int, dtype: torch.dtype, device: str, *, exact: torch.dtype | None = None
) -> Case:
    hidden = _random(device, dtype, 4 * batch, HIDDEN)
    weight = 1 + _random(device, dtype, HIDDEN) / 10
    rows = _random(device, dtype, NUM_LABELS, HIDDEN) / HIDDEN**0.5
    last = torch.arange(3, 4 * batch, 4, dtype=torch.int32, device=device)
    wide = exact or dtype
    size = hidden.element_size()
    return Case(
        "label_head", {"dtype": _name(dtype), "candidates": batch},
        flops=batch * HIDDEN * (2 * NUM_LABELS + 3),
        num_bytes=size * HIDDEN * (batch + NUM_LABELS + 1) + 4 * batch * (NUM_LABELS + 1),
        runs={
            "ours": lambda: label_head_triton(hidden, weight, rows, last),
            "torch": lambda: label_head_reference(hidden, weight, rows, last),
        },
        exact=lambda: label_head_reference(hidden.to(wide), weight.to(wide), rows.to(wide), last),
    )  # fmt: skip


def pair_case(traces: int, device: str, *, exact: torch.dtype | None = None) -> Case:
    """Each trace against the members of up to 32 clusters, as the paper's loop asks."""
    clusters = min(CLUSTERS, traces)
    rows = _random(device, torch.float32, traces, EMBEDDING)
    product, difference = _random(device, torch.float32, 2, EMBEDDING) / EMBEDDING**0.5
    head = PairHead(product, difference, 0.1)
    count = traces * clusters * MEMBERS
    left = torch.arange(traces).repeat_interleave(clusters * MEMBERS)
    right = torch.randint(0, traces, (count,), generator=torch.Generator().manual_seed(0))
    pairs = torch.stack([left, right], 1).int().to(device)
    segments = torch.arange(0, count + 1, MEMBERS, dtype=torch.int32, device=device)
    wide = exact or torch.float32
    return Case(
        "pair_score", {"dtype": "float32", "candidates": traces, "pairs": count},
        flops=6.0 * count * EMBEDDING,
        num_bytes=4 * traces * EMBEDDING + 12 * count + 4 * 2 * len(segments),
        runs={
            "ours": lambda: pair_score_triton(rows, pairs, segments, head).means,
            "torch": lambda: pair_score_reference(rows, pairs, segments, head).means,
        },
        exact=lambda: pair_score_reference(rows.to(wide), pairs, segments, head).means,
    )  # fmt: skip


def _random(device: str, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
