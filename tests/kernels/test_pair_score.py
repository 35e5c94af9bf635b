"""pair_score: kernel and reference against a loop over pairs, in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_deepprune.kernels.pair_score import (
    PairHead,
    PairScores,
    pair_score,
    pair_score_reference,
    pair_score_triton,
)

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}  # sums in float32
DTYPES = sorted(TOLERANCE, key=str)
Question = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def random_question(
    sizes: list[int], n: int, d: int, dtype: torch.dtype, device: str, seed: int = 0
) -> Question:
    """Beliefs of n traces, and pairs in segments of these sizes."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, d, generator=generator).softmax(1).to(dtype)
    pairs = torch.randint(0, n, (sum(sizes), 2), generator=generator).int()
    segments = torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32)
    return rows.to(device), pairs.to(device), segments.to(device)


def random_head(d: int, device: str) -> PairHead:
    generator = torch.Generator().manual_seed(1)
    product, difference = torch.randn(2, d, generator=generator).to(device)
    return PairHead(product, difference, -0.4)


def loop(question: Question, head: PairHead | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(scores, means), one pair at a time."""
    rows = question[0].double().cpu()
    scores = []
    for left, right in question[1].tolist():
        u, v = rows[left], rows[right]
        if head is None:
            scores.append(float(u @ v))
            continue
        logit = head.product.double().cpu() @ (u * v) + head.bias
        logit += head.difference.double().cpu() @ (u - v).abs()
        scores.append(float(1 / (1 + (-logit).exp())))
    means = []
    for begin, end in itertools.pairwise(question[2].tolist()):
        own = scores[begin:end]
        means.append(sum(own) / len(own) if own else float("nan"))
    return torch.tensor(scores).double(), torch.tensor(means).double()


def assert_near(got: PairScores, question: Question, head: PairHead | None) -> None:
    tolerance = TOLERANCE[question[0].dtype]
    for mine, exact in zip(got, loop(question, head), strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(
            mine.double().cpu(), exact, atol=tolerance, rtol=tolerance, equal_nan=True
        )


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(0, 40), max_size=6),
    st.integers(1, 20),
    st.integers(1, 400),
    st.sampled_from(DTYPES),
    st.booleans(),
)
def test_the_kernel_agrees_on_random_segments(device, sizes, n, d, dtype, has_head):
    question = random_question(sizes, n, d, dtype, device)
    head = random_head(d, device) if has_head else None
    assert_near(pair_score_triton(*question, head), question, head)
    assert_near(pair_score_reference(*question, head), question, head)


@pytest.mark.parametrize("run", [pair_score_triton, pair_score_reference])
class TestEitherWay:
    """What holds of the kernel and of the reference."""

    def test_equal_certain_beliefs_are_the_same_answer(self, device, run):
        rows = torch.eye(3, device=device)[[0, 0, 2]]
        pairs = torch.tensor([[0, 1], [0, 2], [1, 2]], dtype=torch.int32, device=device)
        segments = torch.tensor([0, 2, 3], dtype=torch.int32, device=device)
        scores, means = run(rows, pairs, segments)
        assert scores.tolist() == [1.0, 0.0, 0.0]
        assert means.tolist() == [0.5, 0.0]

    def test_an_empty_cluster_has_no_verdict(self, device, run):
        question = random_question([0, 2, 0], 4, 5, torch.float32, device)
        assert run(*question).means.isnan().tolist() == [True, False, True]

    def test_nothing_asked_gives_nothing(self, device, run):
        question = random_question([], 4, 5, torch.float32, device)
        scores, means = run(*question)
        assert (scores.shape, means.shape) == ((0,), (0,))

    def test_the_order_within_a_pair_does_not_matter(self, device, run):
        rows, pairs, segments = random_question([9], 6, 70, torch.float32, device)
        for head in (None, random_head(70, device)):
            got = run(rows, pairs, segments, head)
            turned = run(rows, pairs.flip(1).contiguous(), segments, head)
            torch.testing.assert_close(got.scores, turned.scores, atol=1e-6, rtol=1e-6)

    def test_a_segment_longer_than_a_block_has_one_mean(self, device, run):
        question = random_question([1, 100, 3], 12, 130, torch.float32, device)
        assert_near(run(*question), question, None)

    def test_far_logits_saturate(self, device, run):
        rows = torch.tensor([[1.0], [1.0]], device=device)
        pairs = torch.tensor([[0, 1]], dtype=torch.int32, device=device)
        segments = torch.tensor([0, 1], dtype=torch.int32, device=device)
        one, none = torch.ones(1, device=device), torch.zeros(1, device=device)
        assert run(rows, pairs, segments, PairHead(50 * one, none, 0.0)).scores.item() == 1.0
        assert run(rows, pairs, segments, PairHead(-50 * one, none, 0.0)).scores.item() < 1e-20


def test_the_dispatcher_takes_the_kernel_where_it_can(device):
    question = random_question([5, 5], 6, 200, torch.float32, device)
    mine, kernels = pair_score(*question), pair_score_triton(*question)
    assert torch.equal(mine.scores, kernels.scores)
    assert torch.equal(mine.means, kernels.means)


@pytest.mark.parametrize("with_head", [False, True])
def test_the_reference_never_waits_for_a_number_from_the_device(with_head: bool):
    """Tensors on "meta" have shapes and no numbers: whoever asks for one is refused."""
    question = random_question([3, 0, 5], 4, 8, torch.float32, "meta")
    weights = torch.empty(8, device="meta")
    head = PairHead(weights, weights, 0.1) if with_head else None
    found = pair_score_reference(*question, head)
    assert (found.scores.shape, found.means.shape) == ((8,), (3,))
