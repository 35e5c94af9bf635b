"""A plugin whose policy fails at each group's third vote: a bug of ours, by construction."""

from __future__ import annotations

from typing import Any

from sglang_deepprune import policy
from sglang_deepprune.group import Group

CANARY = "forty-two-and-a-half"


def register() -> None:
    """Entry point of the group `sglang.srt.plugins`."""
    real = policy.plan

    def plan(group: Group, *args: Any, **kwargs: Any) -> Any:
        if group.num_voted == 3:
            raise KeyError(f"an answer: {CANARY}")  # as careless code would quote it
        return real(group, *args, **kwargs)

    policy.plan = plan
