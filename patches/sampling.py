"""Per-row noise for seeded siblings, the best token for probes, nothing for anybody else's rows.

`ModelRunner.sample` knows whose rows are sampled (`forward_batch.rids`), `Sampler.
_sample_from_probs` holds their probabilities; both run in the same call. Only the tagged rows'
tokens are replaced, before log-probabilities are computed from them. A batch-wide `sampling_seed`
is never set: it asserts on some samplers when a stranger's row is aboard.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sglang_deepprune.noise import draw

# rid -> seed of the sibling's stream. Filled at admission, emptied when the sibling ends.
SEEDS: dict[str, int] = {}
# rid -> the probabilities of a probe's tokens so far, [] float32 each, on the device
PROBES: dict[str, list[torch.Tensor]] = {}
_CHUNK = 32  # rows
_rows: list[tuple[int, int]] = []  # (row, seed) of the batch that is being sampled


def sample(original: Callable[..., Any], self: Any, logits_output: Any, forward_batch: Any) -> Any:
    """AROUND `ModelRunner.sample`."""
    if not (SEEDS or PROBES) or not forward_batch.rids:
        return original(self, logits_output, forward_batch)
    probes = [row for row, rid in enumerate(forward_batch.rids) if rid in PROBES] if PROBES else []
    # Before the sampler, which scales logits in place.
    best = _best(logits_output.next_token_logits, probes) if probes else None
    _rows[:] = [(row, SEEDS[rid]) for row, rid in enumerate(forward_batch.rids) if rid in SEEDS]
    try:
        ids = original(self, logits_output, forward_batch)
    finally:
        _rows.clear()
    if best is not None:
        places, values, tokens = best
        ids[places] = tokens.to(ids.dtype)
        for row, value in zip(probes, values.unbind(), strict=True):
            PROBES[forward_batch.rids[row]].append(value)
    return ids


def _best(logits: torch.Tensor, rows: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """([p] rows, [p] float32 probability at temperature 1, [p] int64 token): each probe's best."""
    places = torch.tensor(rows, dtype=torch.int64, device=logits.device)
    chosen = logits[places].float()
    highest, tokens = chosen.max(dim=-1)
    return places, (highest - chosen.logsumexp(dim=-1)).exp(), tokens


def sample_from_probs(
    original: Callable[..., Any],
    self: Any,
    probs: torch.Tensor,
    sampling_info: Any,
    positions: torch.Tensor,
    *rest: Any,
    **options: Any,
) -> Any:
    """AROUND `Sampler._sample_from_probs`: returns token ids, since 0.5.20 with a capture."""
    if not _rows:
        return original(self, probs, sampling_info, positions, *rest, **options)
    device = probs.device
    rows = torch.tensor([row for row, _ in _rows], dtype=torch.int64, device=device)
    seeds = torch.tensor([seed for _, seed in _rows], dtype=torch.int64, device=device)
    # Drawn first: some back ends filter `probs` in place. In chunks: the noise is float64 over the
    # vocabulary, memory that SGLang's budget does not know of.
    tokens = torch.cat(
        [
            draw(
                probs[some],
                seed,
                positions[some],
                top_ks=sampling_info.top_ks[some] if sampling_info.need_top_k_sampling else None,
                top_ps=sampling_info.top_ps[some] if sampling_info.need_top_p_sampling else None,
                min_ps=sampling_info.min_ps[some] if sampling_info.need_min_p_sampling else None,
            )
            for some, seed in zip(rows.split(_CHUNK), seeds.split(_CHUNK), strict=True)
        ]
    )
    sampled = original(self, probs, sampling_info, positions, *rest, **options)
    ids = sampled[0] if isinstance(sampled, tuple) else sampled
    ids[rows] = tokens.to(ids.dtype)
    return sampled
