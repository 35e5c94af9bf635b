"""Attention over packed judge prompts that share prefixes; the layout is `prefix_tree.PrefixTree`.

Each token of a prefix attends to its prefix up to itself; each token of a child to the whole of its
prefix and to its child up to itself. That is causal attention of every prompt, with the prefix's
keys, values and rows held once.

One pass, not two joined by log-sum-exp afterwards. A tile holds rows of all children of one
prefix, whichever they are, so that the prefix part is shared as far as a pass of its own would
share it, and the own part follows in the same online softmax; a mask tells the few candidates of a
tile apart. A second pass would have each row and head write and read a float32 partial output: 1 kB
at head_dim 128, 0.31 ns at an H100's 3.35 TB/s, where all its products over 1,500 keys take 0.78 ns
at 989 TFLOP/s. Two would pay where a few short children leave a card idle over a long prefix.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from sglang_deepprune.kernels.launch import jit, runs_triton, tl
from sglang_deepprune.kernels.prefix_tree import TILE_FIELDS, PrefixTree

HEAD_DIMS = (64, 128)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
REFERENCE_ROWS = 128  # of a call of SDPA; fewer cost calls, more cost products that a mask drops
LOG2_E = 1 / math.log(2)


class Blocks(NamedTuple):
    """Sizes of one launch."""

    rows: int  # of scores: a tile's tokens times the query heads of one KV head
    keys: int  # in one step of the online softmax
    warps: int
    stages: int


def prefix_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tree: PrefixTree,
    scale: float | None = None,
) -> torch.Tensor:
    """Attend along a tree of prefixes and children.

    Parameters
    ----------
    q : torch.Tensor
        [tree.total_tokens, num_heads, head_dim] float32, bfloat16 or float16; or
        [tree.num_child_tokens, num_heads, head_dim], the children alone, where keys and values of
        the prefixes come from a cache. head_dim is contiguous, other strides are free.
    k, v : torch.Tensor
        [tree.total_tokens, num_kv_heads, head_dim], dtype of `q`; `num_heads` is a multiple of
        `num_kv_heads`. Rotary embeddings are applied, by `tree.positions`.
    tree : PrefixTree
        From `prefix_tree.pack`, on the device of `q`.
    scale : float or None
        Of the scores; None is 1 / sqrt(head_dim).

    Returns
    -------
    torch.Tensor
        Shape and dtype of `q`, contiguous.

    Examples
    --------
    >>> tree = pack([3], [2, 1], [0, 0])
    >>> q, k, v = torch.randn(6, 8, 64), torch.randn(6, 2, 64), torch.randn(6, 2, 64)
    >>> prefix_attention(q, k, v, tree).shape
    torch.Size([6, 8, 64])

    Note
    ----
    The kernel takes head_dim 64 and 128, and as many query heads a KV head as a tile has rows (64,
    or 32 in float32); anything else takes the reference on any device.
    float32 is computed as float32 (no TF32), bfloat16 and float16 accumulate in float32.

    Work, with H heads, G KV heads, head_dim D, e bytes a value, one prefix of p tokens and C
    children of c: `4 D H (p^2 / 2 + C c p + C c^2 / 2)` FLOPs, and `2 e D (H + G) (p + C c)` bytes
    if each value moves once. Tiles read keys and values again, mostly from L2: a tile of 64 G / H
    tokens and a KV head does 256 D FLOPs for 2 e D bytes a key, 64 FLOPs a byte in bfloat16.

    4B judge (H 32, G 8, D 128), bfloat16, p = c; an H100's ridge is 989 TFLOP/s over 3.35 TB/s,
    295 FLOPs a byte. Bounds, not measurements:

    =====  ===  =====  =====  ============  ==========  ===============  ============
    p = c    C  TFLOP     GB  FLOPs a byte  bound (ms)  TFLOP, unshared  GB, unshared
    =====  ===  =====  =====  ============  ==========  ===============  ============
      500   16   0.10   0.17           577        0.10             0.13          0.33
      500  512   3.15   5.25           600        3.18             4.20          10.5
     2000   16   1.61   0.70         2,306        1.62             2.10          1.31
     2000  512   50.4   21.0         2,397        50.9             67.1          41.9
    =====  ===  =====  =====  ============  ==========  ===============  ============

    Bound by the tensor cores throughout. At p = c sharing saves a quarter of these FLOPs, and half
    of the rows of everything else that a layer does, and of its KV.
    """
    if _fits_kernel(q, k):
        return prefix_attention_triton(q, k, v, tree, scale)
    return prefix_attention_reference(q, k, v, tree, scale)


def prefix_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tree: PrefixTree,
    scale: float | None = None,
) -> torch.Tensor:
    """PyTorch SDPA over blocks of rows, the judge's path on a CPU; see `prefix_attention`."""
    skipped = _rows_without_queries(q, k, tree)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for first, end, prefix in _chunks(tree):
        if first < skipped:
            continue
        keys, values = (torch.cat([x[prefix], x[first:end]]).transpose(0, 1)[None] for x in (k, v))
        for row in range(first, end, REFERENCE_ROWS):
            rows = slice(row, min(row + REFERENCE_ROWS, end))
            queries = slice(rows.start - skipped, rows.stop - skipped)
            mask = _mask(tree, rows, first, prefix.stop - prefix.start)
            part = F.scaled_dot_product_attention(
                q[queries].transpose(0, 1)[None],
                keys[:, :, : mask.shape[1]],
                values[:, :, : mask.shape[1]],
                attn_mask=mask,
                scale=scale,
                enable_gqa=q.shape[1] != k.shape[1],
            )
            out[queries] = part[0].transpose(0, 1)
    return out


def _chunks(tree: PrefixTree) -> list[tuple[int, int, slice]]:
    """(first row, end row, rows of the prefix): a segment, or short children of one prefix.

    A call of SDPA has its price, so that candidates of a few tokens go together.
    """
    chunks, row = [], 0
    for length in tree.prefix_lengths:
        chunks.append((row, row + length, slice(0, 0)))
        row += length
    prefixes = [slice(first, end) for first, end, _ in chunks]
    for parent, length in zip(tree.parents, tree.child_lengths, strict=True):
        first, end, prefix = chunks[-1]
        # Not with the last prefix, which looks like a child of nothing: it may have no queries.
        is_child = first >= tree.num_prefix_tokens and end > first
        fits = row + length - first <= REFERENCE_ROWS
        if is_child and fits and prefix == prefixes[parent]:
            chunks[-1] = (first, row + length, prefix)
        else:
            chunks.append((row, row + length, prefixes[parent]))
        row += length
    return chunks


def _mask(tree: PrefixTree, rows: slice, first: int, num_prefix: int) -> torch.Tensor:
    """[rows, prefix keys and own keys from `first` to the last row] bool: which keys are seen."""
    starts = tree.segment_starts[rows, None]
    row = torch.arange(rows.start, rows.stop, device=starts.device)[:, None]
    own = torch.arange(first, rows.stop, device=starts.device)
    return F.pad((own >= starts) & (own <= row), (num_prefix, 0), value=True)


def prefix_attention_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tree: PrefixTree,
    scale: float | None = None,
    *,
    blocks: Blocks | None = None,
) -> torch.Tensor:
    """The kernel, one program a tile of rows and KV head; see `prefix_attention`.

    `blocks` is for benchmarks: None takes `choose_blocks`.
    """
    skipped = _rows_without_queries(q, k, tree)
    num_heads, num_kv_heads, head_dim = q.shape[1], k.shape[1], q.shape[2]
    group = num_heads // num_kv_heads
    blocks = blocks or choose_blocks(head_dim, q.dtype)
    tile_tokens = blocks.rows // group
    tiles = tree.tiles(tile_tokens)
    first_tile = tree.num_prefix_tiles(tile_tokens) if skipped else 0
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if len(tiles) > first_tile:
        prefix_attention_kernel[(len(tiles) - first_tile, num_kv_heads)](
            q,
            k,
            v,
            out,
            tiles,
            tree.segment_starts,
            (head_dim**-0.5 if scale is None else scale) * LOG2_E,
            first_tile,
            skipped,
            *q.stride()[:2],
            *k.stride()[:2],
            *v.stride()[:2],
            *out.stride()[:2],
            GROUP=group,
            HEAD_DIM=head_dim,
            ROWS=blocks.rows,
            KEYS=blocks.keys,
            FIELDS=TILE_FIELDS,
            num_warps=blocks.warps,
            num_stages=blocks.stages,
        )
    return out


def choose_blocks(head_dim: int, dtype: torch.dtype) -> Blocks:
    """Sizes at which nothing spills and two blocks fit a multiprocessor, from sm_80 to sm_100.

    Chosen from compilers' figures (`make kernels-report`), not from a card's.
    """
    if dtype == torch.float32:
        return Blocks(rows=32, keys=32 if head_dim <= 64 else 16, warps=8, stages=1)
    return Blocks(rows=64, keys=64, warps=4, stages=2)


def kernel_takes(dtype: torch.dtype, head_dim: int, group: int) -> bool:
    """Whether the kernel is made for such heads; `group`: query heads of a KV head."""
    if dtype not in DTYPES or head_dim not in HEAD_DIMS:
        return False
    return group <= choose_blocks(head_dim, dtype).rows


def _fits_kernel(q: torch.Tensor, k: torch.Tensor) -> bool:
    # The interpreter multiplies bfloat16 by its bit patterns (Triton 3.6).
    is_wrong = q.dtype == torch.bfloat16 and not q.is_cuda
    if not runs_triton(q) or is_wrong:
        return False
    return kernel_takes(q.dtype, q.shape[2], q.shape[1] // k.shape[1])


def _rows_without_queries(q: torch.Tensor, k: torch.Tensor, tree: PrefixTree) -> int:
    """How many rows of keys lie before the first row of queries: none, or the prefixes'."""
    if len(k) != tree.total_tokens or len(q) not in (tree.total_tokens, tree.num_child_tokens):
        raise ValueError(
            f"{len(q)} rows of q and {len(k)} of k, for a tree of {tree.total_tokens} tokens, "
            f"{tree.num_child_tokens} of them in children"
        )
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads are no multiple of {k.shape[1]} KV heads")
    return len(k) - len(q)


@jit()
def attend_block(  # type: ignore[no-untyped-def]
    query,  # [ROWS, HEAD_DIM]
    k,  # pointer to the head's first key
    v,
    start,  # first key of the block
    stop,  # first key that must not be read
    lowest,  # [ROWS, 1]: first key that a row sees
    highest,  # [ROWS, 1]: last key that a row sees
    total,  # [ROWS, HEAD_DIM] float32: sum of values, weighted
    weight,  # [ROWS] float32: sum of weights
    peak,  # [ROWS] float32: largest score so far, in units of log 2
    scale_log2,
    k_row_stride,
    v_row_stride,
    HEAD_DIM: tl.constexpr,
    KEYS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One block of keys into the online softmax; without MASKED all rows see all keys."""
    column = tl.arange(0, HEAD_DIM)[None, :]
    keys = start + tl.arange(0, KEYS)
    # Past the end the last key is read again and then not seen: cheaper than a masked load.
    at = (tl.minimum(keys, stop - 1) if MASKED else keys).to(tl.int64)[:, None]
    key = tl.load(k + at * k_row_stride + column)
    value = tl.load(v + at * v_row_stride + column)
    score = tl.dot(query, tl.trans(key), input_precision="ieee") * scale_log2
    if MASKED:
        seen = (keys[None, :] >= lowest) & (keys[None, :] <= highest)
        score = tl.where(seen, score, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(score, 1))
    share = tl.exp2(score - new_peak[:, None])
    shrink = tl.exp2(peak - new_peak)
    weight = weight * shrink + tl.sum(share, 1)
    total = total * shrink[:, None]
    total = tl.dot(share.to(value.dtype), value, total, input_precision="ieee")
    return total, weight, new_peak


@jit("first_tile", "skipped")
def prefix_attention_kernel(  # type: ignore[no-untyped-def]
    q,
    k,
    v,
    out,
    tiles,  # [num_tiles, FIELDS] int32, see PrefixTree.tiles
    segment_starts,  # [total] int32
    scale_log2,  # scale of the scores, over log 2
    first_tile,  # tile of the first program
    skipped,  # rows of k before the first row of q
    q_row_stride,
    q_head_stride,
    k_row_stride,
    k_head_stride,
    v_row_stride,
    v_head_stride,
    out_row_stride,
    out_head_stride,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    FIELDS: tl.constexpr,
):
    tile = tiles + (first_tile + tl.program_id(0)) * FIELDS
    first, end = tl.load(tile), tl.load(tile + 1)
    prefix_begin, prefix_end = tl.load(tile + 2), tl.load(tile + 3)
    own_begin, own_seen = tl.load(tile + 4), tl.load(tile + 5)
    kv_head = tl.program_id(1).to(tl.int64)
    k += kv_head * k_head_stride
    v += kv_head * v_head_stride

    # The query heads of a KV head share a tile, so that they share its keys and values.
    row = tl.arange(0, ROWS)
    # Rows past the end repeat the last token and are not stored: no row is without a key.
    token = tl.minimum(first + row // GROUP, end - 1)
    head = kv_head * GROUP + row % GROUP
    column = tl.arange(0, HEAD_DIM)[None, :]
    place = (token - skipped).to(tl.int64)
    query = tl.load(q + (place * q_row_stride + head * q_head_stride)[:, None] + column)
    lowest = tl.load(segment_starts + token)[:, None]
    highest = token[:, None]

    total = tl.full([ROWS, HEAD_DIM], 0.0, tl.float32)
    weight = tl.full([ROWS], 0.0, tl.float32)
    # Not -inf: a row may meet a block of which it sees nothing before it has met a key.
    peak = tl.full([ROWS], -1e30, tl.float32)

    prefix_blocks = (prefix_end - prefix_begin) // KEYS
    own_blocks = (own_seen - own_begin) // KEYS
    for block in range(0, prefix_blocks + own_blocks):
        start = tl.where(
            block < prefix_blocks,
            prefix_begin + block * KEYS,
            own_begin + (block - prefix_blocks) * KEYS,
        )
        total, weight, peak = attend_block(
            query, k, v, start, start + KEYS, lowest, highest, total, weight, peak,
            scale_log2, k_row_stride, v_row_stride, HEAD_DIM, KEYS, False,
        )  # fmt: skip

    # What is left: the end of the prefix, then the diagonal.
    prefix_begin += prefix_blocks * KEYS
    own_begin += own_blocks * KEYS
    prefix_blocks = (prefix_end - prefix_begin + KEYS - 1) // KEYS
    own_blocks = (end - own_begin + KEYS - 1) // KEYS
    for block in range(0, prefix_blocks + own_blocks):
        in_prefix = block < prefix_blocks
        start = tl.where(in_prefix, prefix_begin, own_begin + (block - prefix_blocks) * KEYS)
        stop = tl.where(in_prefix, prefix_end, end)
        total, weight, peak = attend_block(
            query, k, v, start, stop,
            tl.where(in_prefix, 0, lowest), tl.where(in_prefix, stop - 1, highest),
            total, weight, peak,
            scale_log2, k_row_stride, v_row_stride, HEAD_DIM, KEYS, True,
        )  # fmt: skip

    store = out + (place * out_row_stride + head * out_head_stride)[:, None] + column
    result = total / weight[:, None]
    exists = (row < (end - first) * GROUP)[:, None]
    tl.store(store, result.to(out.dtype.element_ty), mask=exists)
