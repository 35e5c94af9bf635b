"""Fat groups are spread over the data-parallel ranks."""

from __future__ import annotations

from sglang_deepprune.patches.ranks import RankBook, rank_of_name


def test_a_group_goes_to_the_rank_that_owes_least() -> None:
    book = RankBook(first=0)
    assert [book.take(2, 64), book.take(2, 8), book.take(2, 8), book.take(2, 64)] == [0, 1, 1, 1]
    book.give_back(0, 64)
    assert book.take(2, 4) == 0


def test_ranks_that_owe_the_same_take_turns() -> None:
    book = RankBook(first=2)
    ranks = []
    for _ in range(5):
        ranks.append(book.take(4, 8))
        book.give_back(ranks[-1], 8)
    assert ranks == [2, 3, 0, 1, 2]


def test_the_first_groups_of_several_processes_are_spread() -> None:
    """Sixty-four books on one rank of eight: by chance once in 8**63."""
    assert len({RankBook().take(8, 64) for _ in range(64)}) > 1


def test_an_answered_group_owes_nothing_and_never_less() -> None:
    book = RankBook(first=0)
    rank = book.take(4, 16)
    book.give_back(rank, 16)
    book.give_back(rank, 16)
    assert [book.take(4, 1) for _ in range(4)] == [1, 2, 3, 0]


def test_a_client_side_group_has_one_rank_in_every_process() -> None:
    assert rank_of_name(4, "c0000000a" + "f" * 23) == 10 % 4
