"""Which data-parallel rank serves a group: all its siblings go to one, the one that owes least.

SGLang deals requests out one by one, so each scheduler would see a part of the group. It honours
`routed_dp_rank` in every version. Owed is counted here, in siblings that were sent and are not
answered yet; a rank with one fat group gets no second one while another is free. Ranks that owe
the same take turns.
"""

from __future__ import annotations

import secrets


class RankBook:
    """What one tokenizer process has sent to each rank.

    Each process has a book of its own, and knows nothing of the others': if all began with the same
    rank, that one would get the first group of every process. So each begins anywhere.
    """

    def __init__(self, first: int | None = None) -> None:
        self._owed: dict[int, int] = {}
        self._next = secrets.randbelow(1 << 16) if first is None else first  # modulo the ranks

    def take(self, num_ranks: int, count: int) -> int:
        """The rank for `count` new siblings."""
        turns = ((self._next + turn) % num_ranks for turn in range(num_ranks))
        rank = min(turns, key=lambda one: self._owed.get(one, 0))
        self._next = rank + 1
        self._owed[rank] = self._owed.get(rank, 0) + count
        return rank

    def give_back(self, rank: int, count: int) -> None:
        """They are answered."""
        self._owed[rank] = max(0, self._owed.get(rank, 0) - count)


def rank_of_name(num_ranks: int, group_id: str) -> int:
    """The rank of a client-side group: by its name, the same in every tokenizer process."""
    return int(group_id[1:9], 16) % num_ranks
