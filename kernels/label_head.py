"""Label head: what a judge prompt's last token says about a few labels, and nothing else.

Final RMSNorm, the label rows of the LM head, and log-softmax over them, in one pass over the last
token of each prompt. A [batch, vocabulary] tensor of logits never exists.
"""

from __future__ import annotations

import torch

from sglang_deepprune.kernels.launch import jit, next_power_of_2, runs_triton, tl

BLOCK = 512
WARPS = 4


def label_head(
    hidden: torch.Tensor,
    norm_weight: torch.Tensor,
    label_rows: torch.Tensor,
    last_indices: torch.Tensor,
    eps: float = 1e-6,
) -> torch.Tensor:
    """Log-probabilities of the labels after each prompt, normalised over the labels alone.

    Parameters
    ----------
    hidden : torch.Tensor
        [total_tokens, hidden_size] float32, bfloat16 or float16: the packed output of the last
        layer, before the final norm. The last dimension is contiguous.
    norm_weight : torch.Tensor
        [hidden_size]: weight of the final RMSNorm. A model that scales by 1 + weight passes that.
    label_rows : torch.Tensor
        [num_labels, hidden_size]: rows of the LM head, one a label; the last dimension is
        contiguous.
    last_indices : torch.Tensor
        [batch] int32: row of `hidden` that ends each prompt; `cu_seqlens[1:] - 1`, or
        `PrefixTree.last_indices`. Any rows in any order.
    eps : float
        Of the norm.

    Returns
    -------
    torch.Tensor
        [batch, num_labels] float32.

    Examples
    --------
    >>> hidden, norm = torch.randn(7, 64), torch.ones(64)
    >>> rows = torch.randn(2, 64)
    >>> ends = torch.tensor([3, 6], dtype=torch.int32)
    >>> label_head(hidden, norm, rows, ends).exp().sum(1)
    tensor([1., 1.])

    Note
    ----
    Everything is computed in float32, whatever the inputs: the normed state is not rounded to
    bfloat16 on its way into the product, as it is in a model's own forward.

    Work for B prompts, hidden size h, L labels, e bytes a value: `B h (2 L + 3)` FLOPs and
    `e h (B + L + 1) + 4 B (L + 1)` bytes, so about (2 L + 3) / e = 3.5 FLOPs a byte at L = 2 in
    bfloat16, far left of the ridge (about 295 on an H100): bound by memory, or rather by the
    launch. 4B judge (h = 2560), L = 2: B = 16 moves 97 kB and B = 512 moves 2.6 MB, 0.03 us and
    0.8 us at 3.35 TB/s. The [512, 151936] bfloat16 logits that it replaces are 156 MB, and the
    778 MB of the head's other rows need not be read.
    """
    if runs_triton(hidden):
        return label_head_triton(hidden, norm_weight, label_rows, last_indices, eps)
    return label_head_reference(hidden, norm_weight, label_rows, last_indices, eps)


def label_head_reference(
    hidden: torch.Tensor,
    norm_weight: torch.Tensor,
    label_rows: torch.Tensor,
    last_indices: torch.Tensor,
    eps: float = 1e-6,
) -> torch.Tensor:
    """PyTorch, in float32, or in float64 for inputs of float64; see `label_head`."""
    kind = torch.promote_types(hidden.dtype, torch.float32)
    state = hidden[last_indices.long()].to(kind)
    state = state * torch.rsqrt(state.square().mean(-1, keepdim=True) + eps)
    logits = (state * norm_weight.to(kind)) @ label_rows.to(kind).T
    return logits.log_softmax(-1)


def label_head_triton(
    hidden: torch.Tensor,
    norm_weight: torch.Tensor,
    label_rows: torch.Tensor,
    last_indices: torch.Tensor,
    eps: float = 1e-6,
) -> torch.Tensor:
    """The kernel, one program a prompt; see `label_head`."""
    batch, num_labels = last_indices.shape[0], label_rows.shape[0]
    out = torch.empty(batch, num_labels, dtype=torch.float32, device=hidden.device)
    if batch:
        label_head_kernel[(batch,)](
            hidden,
            norm_weight,
            label_rows,
            last_indices,
            out,
            eps,
            hidden.shape[1],
            hidden.stride(0),
            label_rows.stride(0),
            num_labels,
            LABELS=next_power_of_2(num_labels),
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
    return out


@jit()
def label_head_kernel(  # type: ignore[no-untyped-def]
    hidden,  # [total_tokens, hidden_size]
    norm_weight,  # [hidden_size]
    label_rows,  # [num_labels, hidden_size]
    last_indices,  # [batch] int32
    out,  # [batch, num_labels] float32
    eps,
    hidden_size,
    hidden_stride,
    label_stride,
    num_labels,
    LABELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    prompt = tl.program_id(0)
    # A packed batch may hold more than 2^31 values.
    state = hidden + tl.load(last_indices + prompt).to(tl.int64) * hidden_stride
    label = tl.arange(0, LABELS)
    is_label = label < num_labels
    squares = tl.full([BLOCK], 0.0, tl.float32)
    products = tl.full([LABELS, BLOCK], 0.0, tl.float32)
    for start in range(0, hidden_size, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < hidden_size
        value = tl.load(state + column, mask=inside, other=0.0).to(tl.float32)
        weight = tl.load(norm_weight + column, mask=inside, other=0.0).to(tl.float32)
        row = tl.load(
            label_rows + label[:, None] * label_stride + column[None, :],
            mask=is_label[:, None] & inside[None, :],
            other=0.0,
        ).to(tl.float32)
        squares += value * value
        products += row * (value * weight)[None, :]
    # The norm is one factor of every logit, so it can wait until the sum of squares is known.
    scale = 1.0 / tl.sqrt(tl.sum(squares, 0) / hidden_size + eps)
    logits = tl.where(is_label, tl.sum(products, 1) * scale, float("-inf"))
    logits -= tl.max(logits, 0)
    logits -= tl.log(tl.sum(tl.exp(logits), 0))
    tl.store(out + prompt * num_labels + label, logits, mask=is_label)
