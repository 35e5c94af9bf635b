"""Pair scores: P(same answer) of the asked pairs from what each trace was read into once.

A trace is a row: its belief (a distribution over answers) or its embedding. The kernel gathers two
rows a pair, so that no [num_pairs, 4 d] tensor of pair features exists, and averages the scores of
one (trace, cluster) segment in the same pass: what the paper's sim(t, c) needs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from sglang_deepprune.kernels.launch import jit, next_power_of_2, runs_triton, tl

BLOCK_PAIRS = 16
MAX_BLOCK_COLUMNS = 128
WARPS = 4


class PairHead(NamedTuple):
    """Logistic head on (u * v, |u - v|), the same either way round."""

    product: torch.Tensor  # [d] float32
    difference: torch.Tensor  # [d] float32
    bias: float


class PairScores(NamedTuple):
    """P(same answer), and its mean over each segment."""

    scores: torch.Tensor  # [num_pairs] float32
    means: torch.Tensor  # [num_segments] float32, NaN where the segment is empty


def pair_score(
    rows: torch.Tensor,
    pairs: torch.Tensor,
    segments: torch.Tensor,
    head: PairHead | None = None,
) -> PairScores:
    """Score the asked pairs, and average the scores of each segment.

    Parameters
    ----------
    rows : torch.Tensor
        [n, d] float32, bfloat16 or float16: beliefs (without a head) or embeddings (with one). The
        last dimension is contiguous.
    pairs : torch.Tensor
        [num_pairs, 2] int32, contiguous: which two rows. Pairs of one segment lie together.
    segments : torch.Tensor
        [num_segments + 1] int32, rising from 0 to num_pairs: segment s holds the pairs
        `segments[s]:segments[s + 1]`, as in CSR. One a (trace, cluster), or [0, num_pairs].
    head : PairHead or None
        None: the score is the dot product. Else sigmoid(product . (u * v) + difference . |u - v|
        + bias).

    Returns
    -------
    PairScores
        `scores` and `means`; the mean of an empty segment is NaN, which means no verdict.

    Examples
    --------
    >>> beliefs = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]])
    >>> asked = torch.tensor([[0, 1], [0, 2]], dtype=torch.int32)
    >>> pair_score(beliefs, asked, torch.tensor([0, 2], dtype=torch.int32)).means
    tensor([0.2500])

    Note
    ----
    Sums run in float32, whatever the rows.

    Work for P pairs of d values of e bytes: `2 P d` FLOPs (`6 P d` with a head), and
    `P (2 d e + 12)` bytes if every gather misses. Between 1 / e and 3 / e FLOPs a byte: bound by
    memory. The rows of one question (512 x 384 float32: 786 kB) stay in L2, so that only the 12
    bytes a pair reach memory. n = 512, 32 clusters of 10 members, all asked: P = 163,840,
    d = 384 float32, with a head: 377 MFLOP, 505 MB through L2, 2 MB through memory; n = 16, 8
    clusters of 2: P = 256, 0.6 MFLOP, 0.8 MB. As [P, 4 d] float32 features the first would write
    and read 1.0 GB.
    """
    if runs_triton(rows):
        return pair_score_triton(rows, pairs, segments, head)
    return pair_score_reference(rows, pairs, segments, head)


def pair_score_reference(
    rows: torch.Tensor,
    pairs: torch.Tensor,
    segments: torch.Tensor,
    head: PairHead | None = None,
) -> PairScores:
    """PyTorch, in float32, or in float64 for rows of float64; see `pair_score`."""
    values = rows.to(torch.promote_types(rows.dtype, torch.float32))
    left, right = pairs.long().unbind(1)
    # Weighting one side first keeps it to two gathers and one product a pair.
    if head is None:
        scores = (values[left] * values[right]).sum(1)
    else:
        product = (values * head.product.to(values))[left] * values[right]
        difference = (values[left] - values[right]).abs() * head.difference.to(values)
        scores = torch.sigmoid((product + difference).sum(1) + head.bias)
    sizes = segments.diff().long()
    # Without its size a GPU would be waited for, to learn it.
    every = torch.arange(len(sizes), device=rows.device)
    owner = torch.repeat_interleave(every, sizes, output_size=len(scores))
    sums = scores.new_zeros(len(sizes)).index_add_(0, owner, scores)
    return PairScores(scores, sums / sizes)


def pair_score_triton(
    rows: torch.Tensor,
    pairs: torch.Tensor,
    segments: torch.Tensor,
    head: PairHead | None = None,
) -> PairScores:
    """The kernel, one program a segment; see `pair_score`."""
    num_segments = segments.shape[0] - 1
    scores = torch.empty(pairs.shape[0], dtype=torch.float32, device=rows.device)
    means = torch.empty(num_segments, dtype=torch.float32, device=rows.device)
    if num_segments:
        pair_score_kernel[(num_segments,)](
            rows,
            pairs,
            segments,
            # Never read without a head; a pointer has to be passed.
            rows if head is None else head.product,
            rows if head is None else head.difference,
            scores,
            means,
            0.0 if head is None else float(head.bias),
            rows.shape[1],
            rows.stride(0),
            HAS_HEAD=head is not None,
            BLOCK_PAIRS=BLOCK_PAIRS,
            BLOCK_COLUMNS=block_columns(rows.shape[1]),
            num_warps=WARPS,
        )
    return PairScores(scores, means)


def block_columns(width: int) -> int:
    """Columns in a block, for rows of `width` values."""
    return min(MAX_BLOCK_COLUMNS, next_power_of_2(width))


@jit()
def pair_score_kernel(  # type: ignore[no-untyped-def]
    rows,  # [n, width]
    pairs,  # [num_pairs, 2] int32
    segments,  # [num_segments + 1] int32
    product_weight,  # [width]
    difference_weight,  # [width]
    scores,  # [num_pairs] float32
    means,  # [num_segments] float32
    bias,
    width,
    row_stride,
    HAS_HEAD: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    segment = tl.program_id(0)
    begin = tl.load(segments + segment)
    end = tl.load(segments + segment + 1)
    total = tl.full([BLOCK_PAIRS], 0.0, tl.float32)
    for first in range(begin, end, BLOCK_PAIRS):
        pair = first + tl.arange(0, BLOCK_PAIRS)
        asked = pair < end
        left = rows + tl.load(pairs + 2 * pair, mask=asked, other=0).to(tl.int64) * row_stride
        right = rows + tl.load(pairs + 2 * pair + 1, mask=asked, other=0).to(tl.int64) * row_stride
        score = tl.full([BLOCK_PAIRS], 0.0, tl.float32)
        for start in range(0, width, BLOCK_COLUMNS):
            column = start + tl.arange(0, BLOCK_COLUMNS)
            inside = column < width
            mask = asked[:, None] & inside[None, :]
            u = tl.load(left[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
            v = tl.load(right[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
            part = u * v
            if HAS_HEAD:
                product = tl.load(product_weight + column, mask=inside, other=0.0)
                difference = tl.load(difference_weight + column, mask=inside, other=0.0)
                part = part * product[None, :] + tl.abs(u - v) * difference[None, :]
            score += tl.sum(part, 1)
        if HAS_HEAD:
            score = 1.0 / (1.0 + tl.exp(-(score + bias)))
        tl.store(scores + pair, score, mask=asked)
        total += tl.where(asked, score, 0.0)
    # 0 / 0 would do, but warns in the interpreter.
    count = end - begin
    mean = tl.sum(total, 0) / tl.maximum(count, 1)
    tl.store(means + segment, tl.where(count > 0, mean, float("nan")))
