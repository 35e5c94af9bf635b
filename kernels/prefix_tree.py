"""Layout of a packed batch of judge prompts: prefixes, and the candidates that share them.

A prompt is a prefix (instruction and representative trace, packed once) and a child (candidate and
question). All prefixes come first, then all children, without padding. So the rows of a prefix's
children lie together, and one tile of queries may hold tokens of several candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

TILE_FIELDS = 6


@dataclass(frozen=True, eq=False)
class PrefixTree:
    """Made by `pack`. Segments are numbered as packed: prefixes, then children.

    Attributes
    ----------
    prefix_lengths, child_lengths, parents : tuple[int, ...]
        As given to `pack`.
    cu_seqlens : torch.Tensor
        [num_prefixes + num_children + 1] int32: where each segment starts, and the total.
    positions : torch.Tensor
        [total] int32: position of each token in its own prompt, for rotary embeddings.
    segment_starts : torch.Tensor
        [total] int32: first row of the token's segment.
    last_indices : torch.Tensor
        [num_children] int32: last row of each child, where its label is read.
    """

    prefix_lengths: tuple[int, ...]
    child_lengths: tuple[int, ...]
    parents: tuple[int, ...]
    cu_seqlens: torch.Tensor
    positions: torch.Tensor
    segment_starts: torch.Tensor
    last_indices: torch.Tensor
    _tiles: dict[int, torch.Tensor] = field(default_factory=dict, repr=False)

    @property
    def num_prefix_tokens(self) -> int:
        return sum(self.prefix_lengths)

    @property
    def num_child_tokens(self) -> int:
        return sum(self.child_lengths)

    @property
    def total_tokens(self) -> int:
        return self.num_prefix_tokens + self.num_child_tokens

    @property
    def unshared_tokens(self) -> int:
        """Tokens that the same prompts take with a copy of its prefix before each child."""
        copies = sum(self.prefix_lengths[parent] for parent in self.parents)
        return copies + self.num_child_tokens

    def tiles(self, tile_tokens: int) -> torch.Tensor:
        """[num_tiles, TILE_FIELDS] int32: the kernel's work list, made once a size of tile.

        A tile is up to `tile_tokens` rows of one prefix, or of the children of one prefix: `first`
        and `end` row; the keys that all its rows see, `prefix_begin` to `prefix_end` (empty in a
        tile of a prefix) and `own_begin` to `own_seen`; from there to `end` each row sees its own
        segment up to itself. Tiles of prefixes come first.
        """
        if tile_tokens not in self._tiles:
            self._tiles[tile_tokens] = self._cut(tile_tokens)
        return self._tiles[tile_tokens]

    def num_prefix_tiles(self, tile_tokens: int) -> int:
        """How many tiles at the head of `tiles` hold rows of prefixes."""
        return sum(-(-length // tile_tokens) for length in self.prefix_lengths)

    def _cut(self, tile_tokens: int) -> torch.Tensor:
        starts = _starts(self.prefix_lengths)
        families = [0] * len(self.prefix_lengths)
        for parent, length in zip(self.parents, self.child_lengths, strict=True):
            families[parent] += length
        # Runs of rows that share all keys before their own: prefixes, then families of children.
        runs = torch.tensor([*self.prefix_lengths, *families], dtype=torch.int64)
        begin = runs.cumsum(0) - runs
        counts = (runs + tile_tokens - 1) // tile_tokens
        run = torch.repeat_interleave(torch.arange(len(runs)), counts)
        place = torch.arange(len(run)) - (counts.cumsum(0) - counts)[run]
        first = begin[run] + place * tile_tokens
        end = torch.minimum(first + tile_tokens, (begin + runs)[run])
        segment_starts = self.segment_starts.cpu().long()
        own_begin, own_last = segment_starts[first], segment_starts[end - 1]
        # Over two candidates no own key is seen by all rows.
        own_seen = torch.where(own_begin == own_last, first, own_begin)
        none = [0] * len(self.prefix_lengths)
        prefix_begin = torch.tensor([*none, *starts[:-1]], dtype=torch.int64)[run]
        prefix_end = torch.tensor([*none, *starts[1:]], dtype=torch.int64)[run]
        columns = [first, end, prefix_begin, prefix_end, own_begin, own_seen]
        return torch.stack(columns, 1).to(torch.int32).to(self.segment_starts.device)


def pack(
    prefix_lengths: Sequence[int],
    child_lengths: Sequence[int],
    parents: Sequence[int],
    *,
    device: torch.device | str | None = None,
) -> PrefixTree:
    """Lay out prefixes, and children by the prefix that each is read after.

    Parameters
    ----------
    prefix_lengths : Sequence[int]
        Tokens of each prefix; 0 is a prefix of nothing, whose children share no token.
    child_lengths : Sequence[int]
        Tokens of each child, at least 1. A prefix may have no child.
    parents : Sequence[int]
        The prefix of each child, not falling: children of one prefix lie together.
    device : torch.device or str or None
        Where the tables go.

    Raises
    ------
    ValueError
        In one sentence, at lengths or parents that are no such tree.

    Examples
    --------
    >>> tree = pack([3], [2, 1], [0, 0])  # P0 P1 P2 | A0 A1 | B0
    >>> tree.positions.tolist(), tree.last_indices.tolist()
    ([0, 1, 2, 3, 4, 3], [4, 5])
    """
    _check(prefix_lengths, child_lengths, parents)
    prefixes, children = tuple(prefix_lengths), tuple(child_lengths)
    lengths = torch.tensor([*prefixes, *children], dtype=torch.int64)
    starts = torch.tensor(_starts([*prefixes, *children]), dtype=torch.int64)
    segment_starts = torch.repeat_interleave(starts[:-1], lengths)
    before = torch.tensor([*[0] * len(prefixes), *[prefixes[p] for p in parents]])
    shift = torch.repeat_interleave(before.long() - starts[:-1], lengths)
    positions = torch.arange(len(segment_starts)) + shift
    tables = [starts, positions, segment_starts, starts[len(prefixes) + 1 :] - 1]
    placed = [table.to(torch.int32).to(device or "cpu") for table in tables]
    return PrefixTree(prefixes, children, tuple(parents), *placed)


def _check(prefixes: Sequence[int], children: Sequence[int], parents: Sequence[int]) -> None:
    if any(length < 0 for length in prefixes):
        raise ValueError("a prefix has a negative length")
    if any(length < 1 for length in children):
        raise ValueError("a child needs at least one token, for its label is read on the last")
    if len(children) != len(parents):
        raise ValueError(f"{len(children)} children, but {len(parents)} parents")
    if any(not 0 <= parent < len(prefixes) for parent in parents):
        raise ValueError(f"a parent is not one of the {len(prefixes)} prefixes")
    if any(left > right for left, right in zip(parents, parents[1:], strict=False)):
        raise ValueError("parents fall: children of one prefix must lie together, in its order")


def _starts(lengths: Sequence[int]) -> list[int]:
    """[len(lengths) + 1]: running sums, from 0."""
    sums = [0]
    for length in lengths:
        sums.append(sums[-1] + length)
    return sums
