"""Per-row noise: a draw from the row's distribution that depends on nothing else."""

from __future__ import annotations

import pytest
import torch

from sglang_deepprune.noise import draw, sibling_seed


def many(probs: list[float], draws: int = 20000, **filters: torch.Tensor) -> torch.Tensor:
    rows = torch.tensor([probs]).repeat(draws, 1)
    seeds = torch.full((draws,), sibling_seed(1, 0))
    positions = torch.arange(draws)
    expanded = {name: value.repeat(draws) for name, value in filters.items()}
    return torch.bincount(draw(rows, seeds, positions, **expanded), minlength=len(probs)) / draws


def test_tokens_are_drawn_with_their_probabilities():
    probs = [0.5, 0.3, 0.15, 0.05]
    assert torch.allclose(many(probs), torch.tensor(probs), atol=0.015)


def test_a_row_draws_the_same_in_any_batch():
    torch.manual_seed(0)
    probs = torch.rand(64, 100).softmax(-1)
    seeds = torch.tensor([sibling_seed(7, index) for index in range(64)])
    positions = torch.arange(64) + 5
    whole = draw(probs, seeds, positions)
    order = torch.randperm(64)
    assert torch.equal(draw(probs[order], seeds[order], positions[order]), whole[order])
    for row in (0, 13, 63):
        one = slice(row, row + 1)
        assert draw(probs[one], seeds[one], positions[one]).item() == whole[row].item()


def test_siblings_and_positions_have_streams_of_their_own():
    probs = torch.full((1, 1000), 0.001)
    tokens = {
        draw(probs, torch.tensor([sibling_seed(seed, index)]), torch.tensor([position])).item()
        for seed in (0, 1) for index in range(8) for position in range(8)
    }  # fmt: skip
    assert len(tokens) > 110  # 128 draws out of 1,000


@pytest.mark.parametrize(
    ("filters", "allowed"),
    [
        ({"top_ks": torch.tensor([2])}, {0, 1}),
        ({"top_ps": torch.tensor([0.6])}, {0, 1}),
        ({"min_ps": torch.tensor([0.25])}, {0, 1, 2}),
        ({"top_ks": torch.tensor([1])}, {0}),
    ],
)
def test_filters_leave_out_what_they_should(filters, allowed):
    shares = many([0.5, 0.3, 0.15, 0.05], 2000, **filters)
    assert {token for token, share in enumerate(shares) if share > 0} == allowed


def test_a_token_of_probability_zero_is_never_drawn():
    assert many([0.0, 1.0, 0.0], 500)[1] == 1.0


def test_seeds_fit_into_int64_whatever_the_user_gives():
    for seed in (0, -1, 2**63 - 1, 2**70):
        assert 0 <= sibling_seed(seed, 511) < 2**62
