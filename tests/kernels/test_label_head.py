"""label_head: kernel and reference against the model's own way, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_deepprune.kernels.label_head import (
    label_head,
    label_head_reference,
    label_head_triton,
)

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
DTYPES = sorted(TOLERANCE, key=str)
Head = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def random_head(
    tokens: int, size: int, labels: int, dtype: torch.dtype, device: str, seed: int = 0
) -> Head:
    """Hidden states, norm weight and label rows, of the sizes that trained models have."""
    generator = torch.Generator().manual_seed(seed)
    hidden = 3 * torch.randn(tokens, size, generator=generator)
    weight = 1 + 0.2 * torch.randn(size, generator=generator)
    rows = torch.randn(labels, size, generator=generator) / size**0.5
    return hidden.to(device, dtype), weight.to(device, dtype), rows.to(device, dtype)


def exact(head: Head, last: torch.Tensor, eps: float) -> torch.Tensor:
    """Norm of all tokens, all logits, then the labels' share: step by step, in float64."""
    hidden, weight, rows = (x.double().cpu() for x in head)
    normed = torch.stack([x / (x.square().mean() + eps).sqrt() for x in hidden]) * weight
    logits = normed @ rows.T
    chosen = torch.stack([logits[row] for row in last.tolist()])
    return (chosen.exp() / chosen.exp().sum(1, keepdim=True)).log()


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_the_kernel_agrees_on_random_batches(device, data):
    lengths = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=6), label="lengths")
    size = data.draw(st.integers(1, 1500), label="hidden size")
    labels = data.draw(st.integers(2, 8), label="labels")
    dtype = data.draw(st.sampled_from(DTYPES), label="dtype")
    last = torch.tensor(lengths).cumsum(0).int() - 1
    head = random_head(sum(lengths), size, labels, dtype, device)
    expected = exact(head, last, 1e-6)
    for run in (label_head_triton, label_head_reference):
        got = run(*head, last.to(device))
        assert got.dtype == torch.float32
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(got.double().cpu(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("run", [label_head_triton, label_head_reference])
class TestEitherWay:
    """What holds of the kernel and of the reference."""

    def test_probabilities_of_the_labels_sum_to_one(self, device, run):
        head = random_head(9, 2560, 3, torch.float32, device)
        got = run(*head, torch.tensor([8, 0, 4], dtype=torch.int32, device=device))
        torch.testing.assert_close(got.exp().sum(1).cpu(), torch.ones(3))

    def test_any_rows_in_any_order_are_read(self, device, run):
        head = random_head(9, 600, 2, torch.float32, device)
        last = torch.tensor([5, 1, 5], dtype=torch.int32, device=device)
        got = run(*head, last)
        assert torch.equal(got[0], got[2])
        expected = exact(head, last, 1e-6)
        torch.testing.assert_close(got.double().cpu(), expected, atol=1e-5, rtol=1e-5)

    def test_other_tokens_do_not_matter(self, device, run):
        hidden, weight, rows = random_head(6, 64, 2, torch.float32, device)
        last = torch.tensor([2, 5], dtype=torch.int32, device=device)
        before = run(hidden, weight, rows, last)
        hidden[[0, 1, 3, 4]] = float("nan")
        assert torch.equal(before, run(hidden, weight, rows, last))

    def test_the_norm_has_its_eps(self, device, run):
        head = random_head(2, 64, 2, torch.float32, device)
        last = torch.tensor([0, 1], dtype=torch.int32, device=device)
        got = run(*head, last, eps=10.0).double().cpu()
        torch.testing.assert_close(got, exact(head, last, 10.0), atol=1e-5, rtol=1e-5)
        assert (got - exact(head, last, 1e-6)).abs().max() > 1e-3

    def test_rows_may_be_views_of_a_larger_matrix(self, device, run):
        hidden, weight, rows = random_head(4, 64, 2, torch.float32, device)
        wide = torch.zeros(4, 100, device=device)
        wide[:, :64] = hidden
        table = torch.zeros(2, 80, device=device)
        table[:, :64] = rows
        last = torch.tensor([1, 3], dtype=torch.int32, device=device)
        got = run(wide[:, :64], weight, table[:, :64], last)
        assert torch.equal(got, run(hidden, weight, rows, last))

    def test_large_logits_do_not_overflow(self, device, run):
        hidden, weight, rows = random_head(3, 256, 2, torch.float32, device)
        last = torch.tensor([0, 1, 2], dtype=torch.int32, device=device)
        got = run(hidden, weight, 1e4 * rows, last)
        assert got.isfinite().all()
        torch.testing.assert_close(got.max(1).values.cpu(), torch.zeros(3), atol=1e-3, rtol=0)

    def test_no_prompt_gives_no_row(self, device, run):
        head = random_head(3, 64, 2, torch.float32, device)
        assert run(*head, torch.zeros(0, dtype=torch.int32, device=device)).shape == (0, 2)


def test_the_dispatcher_takes_the_kernel_where_it_can(device):
    head = random_head(5, 700, 2, torch.bfloat16, device)
    last = torch.tensor([1, 4], dtype=torch.int32, device=device)
    assert torch.equal(label_head(*head, last), label_head_triton(*head, last))
