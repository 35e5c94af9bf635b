"""The prompt's pages stay while a group may still start siblings, and are let go when it may not.

A running sibling locks its own prefix in the radix tree. Between two of them nobody does, and a
sibling that starts later would find its prompt evicted. So a lazy group takes one lock of its own
with its first prefill, through `tree_cache.lock` (SGLang 0.5.23; before, least-recently-used
eviction alone decides).
"""

from __future__ import annotations

from typing import Any


class PrefixHold:
    """One tree lock a group; none where the tree has no public lock."""

    def __init__(self, tree_cache: Any):
        self.tree_cache = tree_cache
        self.locks: dict[str, Any] = {}  # group -> its lock
        self.is_possible = hasattr(tree_cache, "lock") and not getattr(tree_cache, "disable", False)

    def take(self, group_id: str, req: Any) -> None:
        """After a sibling's prefill: `req.last_node` ends the prompt's path."""
        if self.is_possible and group_id not in self.locks and req.last_node is not None:
            lock = self.tree_cache.lock(req.last_node)
            if lock is not None:
                self.locks[group_id] = lock

    def let_go(self, group_id: str) -> None:
        lock = self.locks.pop(group_id, None)
        if lock is not None:
            self.tree_cache.unlock(lock)

    def let_go_all(self) -> None:
        """The tree is about to be flushed: its nodes will be no more."""
        for group_id in list(self.locks):
            self.let_go(group_id)
