"""The packed layout: where tokens lie, and that the tiles cover each row once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_deepprune.kernels.prefix_tree import PrefixTree, pack


@st.composite
def trees(draw: st.DrawFn, longest: int = 300, families: int = 4) -> PrefixTree:
    """Prefixes of none to four children each; some prefixes are empty."""
    prefixes, children, parents = [], [], []
    for parent in range(draw(st.integers(0, families))):
        prefixes.append(draw(st.one_of(st.just(0), st.integers(1, longest))))
        own = draw(st.lists(st.integers(1, longest), max_size=4))
        children += own
        parents += [parent] * len(own)
    return pack(prefixes, children, parents)


def test_prefixes_come_first_and_positions_go_on_from_them():
    tree = pack([3, 0, 2], [2, 1, 4], [0, 0, 1])
    assert tree.cu_seqlens.tolist() == [0, 3, 3, 5, 7, 8, 12]
    assert tree.positions.tolist() == [0, 1, 2, 0, 1, 3, 4, 3, 0, 1, 2, 3]
    assert tree.segment_starts.tolist() == [0, 0, 0, 3, 3, 5, 5, 7, 8, 8, 8, 8]
    assert tree.last_indices.tolist() == [6, 7, 11]
    assert (tree.num_prefix_tokens, tree.num_child_tokens, tree.total_tokens) == (5, 7, 12)
    assert tree.unshared_tokens == 3 + 2 + 3 + 1 + 4
    tables = [tree.cu_seqlens, tree.positions, tree.segment_starts, tree.last_indices]
    assert {table.dtype for table in tables} == {torch.int32}


def test_nothing_packs_to_nothing():
    tree = pack([], [], [])
    assert tree.total_tokens == 0
    assert tree.cu_seqlens.tolist() == [0]
    assert tree.tiles(16).shape == (0, 6)


def test_tiles_span_candidates_of_one_prefix_and_of_no_other():
    tree = pack([5, 4], [3, 2, 9, 1], [0, 0, 0, 1])
    assert tree.tiles(4).tolist() == [
        # first, end, prefix_begin, prefix_end, own_begin, own_seen
        [0, 4, 0, 0, 0, 0],
        [4, 5, 0, 0, 0, 4],
        [5, 9, 0, 0, 5, 5],
        [9, 13, 0, 5, 9, 9],  # two candidates: no own key is seen by both
        [13, 17, 0, 5, 12, 12],  # the end of one and the start of the next
        [17, 21, 0, 5, 14, 17],
        [21, 23, 0, 5, 14, 21],
        [23, 24, 5, 9, 23, 23],
    ]
    assert tree.num_prefix_tiles(4) == 3
    assert tree.tiles(4) is tree.tiles(4), "made once, for every layer asks"


@settings(max_examples=60, deadline=None)
@given(trees(), st.sampled_from([1, 5, 16, 42]))
def test_tiles_cover_each_row_once(tree: PrefixTree, tile_tokens: int):
    rows = [row for first, end, *_ in tree.tiles(tile_tokens).tolist() for row in range(first, end)]
    assert rows == list(range(tree.total_tokens))
    spans = [(first, end) for first, end, *_ in tree.tiles(tile_tokens).tolist()]
    assert all(0 < end - first <= tile_tokens for first, end in spans)
    of_prefixes = spans[: tree.num_prefix_tiles(tile_tokens)]
    assert sum(end - first for first, end in of_prefixes) == tree.num_prefix_tokens


@pytest.mark.parametrize(
    ("prefixes", "children", "parents", "reason"),
    [
        ([-1], [], [], "negative"),
        ([3], [0], [0], "at least one token"),
        ([3], [1, 2], [0], "2 children, but 1 parents"),
        ([3], [1], [1], "not one of the 1 prefixes"),
        ([3], [1], [-1], "not one of the 1 prefixes"),
        ([3, 3], [1, 1], [1, 0], "parents fall"),
    ],
)
def test_what_is_no_such_tree_is_refused(prefixes, children, parents, reason):
    with pytest.raises(ValueError, match=reason):
        pack(prefixes, children, parents)
