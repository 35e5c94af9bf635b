"""Sampling noise that depends on (seed, sibling, position) alone: not on batch, policy or order.

SGLang draws a whole batch from one generator, so the same seed gives other texts whenever the batch
differs, and all siblings of an n>1 request share one seed. Here row r's token is the argmax of
log p + Gumbel noise, which is a draw from p, with the noise hashed from (seed, position, token).
Pure torch in, torch out; follows SGLang's `layers/sampler.py::multinomial_with_seed` in its use of
float64, and adds the min-p filter that it refuses.
"""

from __future__ import annotations

import torch

_MASK63 = 2**63 - 1
_STEP = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64: the golden ratio step of splitmix64
_MULTIPLY_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MULTIPLY_2 = -7723592293110705685  # 0x94D049BB133111EB


def sibling_seed(seed: int, index: int) -> int:
    """The stream of sibling `index` under a request's `seed`: a 62-bit hash of both."""
    value = (seed * 0x9E3779B97F4A7C15 + index + 1) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return (value ^ (value >> 31)) >> 2


def draw(
    probs: torch.Tensor,  # [rows, vocab] float32, need not be normalised
    seeds: torch.Tensor,  # [rows] int64
    positions: torch.Tensor,  # [rows] int64, of the token that is drawn
    *,
    top_ks: torch.Tensor | None = None,  # [rows] int32
    top_ps: torch.Tensor | None = None,  # [rows] float32
    min_ps: torch.Tensor | None = None,  # [rows] float32
) -> torch.Tensor:  # [rows] int64
    """One token a row from the filtered distribution."""
    if top_ks is not None or top_ps is not None or min_ps is not None:
        probs = _filtered(probs, top_ks, top_ps, min_ps)
    noise = _gumbel(seeds.long(), positions.long(), probs.shape[-1])
    return (probs.double().log() + noise).argmax(dim=-1)


def _gumbel(seeds: torch.Tensor, positions: torch.Tensor, vocab: int) -> torch.Tensor:
    tokens = torch.arange(vocab, dtype=torch.int64, device=seeds.device)
    base = _mixed(seeds + positions * _STEP)
    bits = _mixed(base.unsqueeze(-1) + (tokens + 1) * _STEP)
    # 53 random bits, moved off both ends so that neither logarithm is infinite.
    uniform = ((bits & _MASK63) >> 10).double().add_(0.5).mul_(2.0**-53)
    return uniform.log_().neg_().log_().neg_()


def _mixed(value: torch.Tensor) -> torch.Tensor:
    """splitmix64's finaliser in int64, whose overflow wraps; the masks make its shifts logical."""
    value = (value ^ ((value >> 30) & (2**34 - 1))) * _MULTIPLY_1
    value = (value ^ ((value >> 27) & (2**37 - 1))) * _MULTIPLY_2
    return value ^ ((value >> 31) & (2**33 - 1))


def _filtered(
    probs: torch.Tensor,
    top_ks: torch.Tensor | None,
    top_ps: torch.Tensor | None,
    min_ps: torch.Tensor | None,
) -> torch.Tensor:
    """Zero what top-k, top-p and min-p leave out, as SGLang's torch path does."""
    ordered, places = probs.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(dim=-1) - ordered
    drop = torch.zeros_like(ordered, dtype=torch.bool)
    if top_ks is not None:
        ranks = torch.arange(ordered.shape[-1], device=probs.device)
        drop |= ranks.unsqueeze(0) >= top_ks.view(-1, 1)
    if top_ps is not None:
        drop |= before > top_ps.view(-1, 1)
    if min_ps is not None:
        drop |= ordered < ordered[:, :1] * min_ps.view(-1, 1)
    return torch.zeros_like(probs).scatter_(-1, places, ordered.masked_fill(drop, 0.0))
