"""prefix_attention: kernel and reference against a full mask in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_deepprune.kernels.prefix_attention import (
    Blocks,
    prefix_attention,
    prefix_attention_reference,
    prefix_attention_triton,
)
from sglang_deepprune.kernels.prefix_tree import PrefixTree, pack
from tests.kernels.test_prefix_tree import trees

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
DTYPES = sorted(TOLERANCE, key=str)
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
# An empty prefix with children, a prefix without, a single child, tiles that span candidates.
MIXED = ([100, 0, 70, 30, 5], [5, 130, 7, 20, 3, 66, 1, 1, 1], [0, 0, 1, 1, 2, 2, 2, 2, 4])


def random_inputs(
    tree: PrefixTree,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 64,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(tree.total_tokens, number, head_dim) for number in (heads[0], heads[1], heads[1])]
    q, k, v = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    return q, k, v


def on(device: str, lengths: tuple[list[int], list[int], list[int]]) -> PrefixTree:
    return pack(*lengths, device=device)


def full_mask(tree: PrefixTree) -> torch.Tensor:
    """[total, total] bool, written down segment by segment from the lengths alone."""
    mask = torch.zeros(tree.total_tokens, tree.total_tokens, dtype=torch.bool)
    begins, row = [], 0
    for length in [*tree.prefix_lengths, *tree.child_lengths]:
        begins.append(row)
        square = torch.ones(length, length, dtype=torch.bool).tril()
        mask[row : row + length, row : row + length] = square
        row += length
    for child, parent in enumerate(tree.parents):
        begin = begins[len(tree.prefix_lengths) + child]
        keys = slice(begins[parent], begins[parent] + tree.prefix_lengths[parent])
        mask[begin : begin + tree.child_lengths[child], keys] = True
    return mask


def naive(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tree: PrefixTree) -> torch.Tensor:
    """Softmax over all keys with a full mask, in float64."""
    group = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double(), v.double()
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[2] ** 0.5
    weights = scores.masked_fill(~full_mask(tree).to(q.device), float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v)


def assert_near(got: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> None:
    assert got.dtype == dtype
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(got.double(), exact, atol=tolerance, rtol=tolerance)


@settings(max_examples=20, deadline=None)
@given(trees(longest=600), st.sampled_from([(4, 2), (3, 1), (9, 3)]), st.sampled_from(DTYPES))
def test_the_reference_is_attention_with_a_full_mask(tree, heads, dtype):
    q, k, v = random_inputs(tree, heads, 64, dtype)
    got = prefix_attention_reference(q, k, v, tree)
    assert_near(got, naive(q, k, v, tree), dtype)


@pytest.mark.parametrize("lengths", [([1300], [1396, 1400], [0, 0]), ([4096], [], []),
                                     ([1], [4095], [0]), ([4000], [1] * 96, [0] * 96)])  # fmt: skip
def test_the_reference_holds_to_4096_tokens(lengths):
    tree = pack(*lengths)
    assert tree.total_tokens in (4096, 4097)
    q, k, v = random_inputs(tree, (2, 1))
    exact = naive(q, k, v, tree)
    assert_near(prefix_attention_reference(q, k, v, tree), exact, torch.float32)
    double = prefix_attention_reference(q.double(), k.double(), v.double(), tree)
    torch.testing.assert_close(double, exact, atol=1e-12, rtol=1e-12)


@settings(max_examples=10, deadline=None)
@given(
    trees(longest=130, families=3),
    st.sampled_from([(4, 1), (3, 1), (2, 2), (9, 3)]),
    st.sampled_from([64, 128]),
    st.sampled_from(DTYPES),
)
def test_the_kernel_agrees_on_random_trees(device, tree, heads, head_dim, dtype):
    tree = on(device, (tree.prefix_lengths, tree.child_lengths, tree.parents))
    q, k, v = random_inputs(tree, heads, head_dim, dtype, device)
    assert_near(prefix_attention_triton(q, k, v, tree), naive(q, k, v, tree), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_kernel_agrees_on_odd_families(device, head_dim, dtype):
    tree = on(device, MIXED)
    q, k, v = random_inputs(tree, (8, 2), head_dim, dtype, device)
    assert_near(prefix_attention_triton(q, k, v, tree), naive(q, k, v, tree), dtype)


@pytest.mark.parametrize("lengths", [([], [], []), ([7], [], []), ([0], [1], [0]), ([1], [1], [0]),
                                     ([64], [64], [0]), ([0], [200, 3, 1], [0, 0, 0])])  # fmt: skip
def test_the_kernel_agrees_on_empty_and_single_groups(device, lengths):
    tree = on(device, lengths)
    q, k, v = random_inputs(tree, device=device)
    assert_near(prefix_attention_triton(q, k, v, tree), naive(q, k, v, tree), torch.float32)


def test_the_kernel_agrees_on_prompts_of_a_thousand_tokens(device):
    tree = on(device, ([500], [550, 400], [0, 0]))
    q, k, v = random_inputs(tree, (2, 1), 64, torch.float16, device)
    assert_near(prefix_attention_triton(q, k, v, tree), naive(q, k, v, tree), torch.float16)


@pytest.mark.parametrize("blocks", [Blocks(128, 64, 8, 2), Blocks(32, 16, 8, 1)])
def test_the_kernel_agrees_at_other_sizes_of_block(device, blocks):
    tree = on(device, MIXED)
    q, k, v = random_inputs(tree, (6, 2), device=device)
    got = prefix_attention_triton(q, k, v, tree, blocks=blocks)
    assert_near(got, naive(q, k, v, tree), torch.float32)


@pytest.mark.parametrize("attend", [prefix_attention_triton, prefix_attention_reference])
class TestEitherWay:
    """What holds of the kernel and of the reference."""

    def test_sharing_a_prefix_changes_no_score(self, device, attend):
        shared = on(device, ([90], [40, 1, 70], [0, 0, 0]))
        q, k, v = random_inputs(shared, device=device)
        got = attend(q, k, v, shared)
        ends = shared.cu_seqlens.tolist()[1:]
        for begin, end in zip(ends, ends[1:], strict=False):
            rows = torch.cat([torch.arange(90), torch.arange(begin, end)]).to(device)
            alone = on(device, ([0], [len(rows)], [0]))
            whole = attend(q[rows], k[rows], v[rows], alone)
            torch.testing.assert_close(got[rows], whole, atol=1e-5, rtol=1e-5)

    def test_candidates_and_other_families_are_not_seen(self, device, attend):
        tree = on(device, MIXED)
        q, k, v = random_inputs(tree, device=device)
        before = attend(q, k, v, tree)
        changed = slice(tree.cu_seqlens[7], tree.cu_seqlens[8])  # the third child, of an empty one
        k[changed], v[changed] = 30.0, 1e4
        after = attend(q, k, v, tree)
        others = torch.ones(tree.total_tokens, dtype=torch.bool)
        others[changed] = False
        assert torch.equal(before[others], after[others])
        assert (before[changed] != after[changed]).all()

    @pytest.mark.parametrize("lengths", [None, ([0, 4], [3, 2], [0, 1])])
    def test_queries_of_children_alone_read_cached_prefixes(self, device, attend, lengths):
        tree = on(device, lengths or MIXED)
        q, k, v = random_inputs(tree, (4, 1), device=device)
        whole = attend(q, k, v, tree)
        children = attend(q[tree.num_prefix_tokens :], k, v, tree)
        torch.testing.assert_close(children, whole[tree.num_prefix_tokens :], atol=0, rtol=0)

    def test_strides_and_scale_are_the_callers(self, device, attend):
        tree = on(device, MIXED)
        q, k, v = random_inputs(tree, device=device)
        heads_first = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]
        assert not heads_first[0].is_contiguous()
        got = attend(*heads_first, tree, scale=0.3)
        assert got.is_contiguous()
        expected = naive(q * 0.3 * 64**0.5, k, v, tree)
        torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-5)
        even = attend(q, k, v, tree, scale=0.0)
        torch.testing.assert_close(even.double(), naive(0 * q, k, v, tree), atol=1e-5, rtol=1e-5)

    def test_scores_far_from_zero_do_not_overflow(self, device, attend):
        tree = on(device, MIXED)
        q, k, v = random_inputs(tree, device=device)
        got = attend(100 * q, k, v, tree)
        assert got.isfinite().all()
        torch.testing.assert_close(got.double(), naive(100 * q, k, v, tree), atol=1e-4, rtol=1e-4)

    def test_rows_that_do_not_fit_the_tree_are_refused(self, device, attend):
        tree = on(device, ([3], [2], [0]))
        q, k, v = random_inputs(tree, device=device)
        with pytest.raises(ValueError, match="4 rows of q and 5 of k, for a tree of 5 tokens"):
            attend(q[1:], k, v, tree)
        with pytest.raises(ValueError, match="4 query heads are no multiple of 3 KV heads"):
            attend(q, k.repeat(1, 2, 1)[:, :3], v.repeat(1, 2, 1)[:, :3], tree)


def test_the_dispatcher_takes_the_kernel_where_it_can(device):
    tree = on(device, MIXED)
    q, k, v = random_inputs(tree, device=device)
    assert torch.equal(prefix_attention(q, k, v, tree), prefix_attention_triton(q, k, v, tree))


@pytest.mark.parametrize(
    ("heads", "head_dim", "dtype"),
    [((2, 1), 96, torch.float32), ((40, 1), 64, torch.float32), ((2, 1), 64, torch.float64)],
)
def test_the_dispatcher_takes_the_reference_where_the_kernel_does_not_fit(
    device, heads, head_dim, dtype
):
    tree = on(device, ([20], [5, 9], [0, 0]))
    q, k, v = random_inputs(tree, heads, head_dim, dtype, device)
    got = prefix_attention(q, k, v, tree)
    assert torch.equal(got, prefix_attention_reference(q, k, v, tree))
    torch.testing.assert_close(got.double(), naive(q, k, v, tree), atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's fault, not the card's")
def test_the_dispatcher_does_not_trust_the_interpreter_with_bfloat16():
    tree = pack([20], [5, 9], [0, 0])
    q, k, v = random_inputs(tree, dtype=torch.bfloat16)
    got = prefix_attention(q, k, v, tree)
    assert torch.equal(got, prefix_attention_reference(q, k, v, tree))
