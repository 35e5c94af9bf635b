"""From a group's state to the record that the client reads. Pure.

The JSON names are pinned in schema/record.schema.json; docs and tests read the same file.
"""

from __future__ import annotations

from collections.abc import Sequence

from sglang_deepprune.group import Group, Sibling, State
from sglang_deepprune.types import ABSENT, ChoiceRecord, GroupRecord

MOST_RUNNING_VOTES = 32  # in the record of a group that still runs: each member carries one
_STOPPED = frozenset({State.PRUNED, State.DECIDED, State.NOT_STARTED})


def choice_of(sibling: Sibling) -> ChoiceRecord:
    """One sibling as clients see it. A doomed one is called by the state it is about to reach."""
    return ChoiceRecord(
        index=sibling.index,
        state=(sibling.doom or sibling.state).value,
        tokens=sibling.num_tokens,
        answer=sibling.answer,
        cluster=None if sibling.cluster == ABSENT else sibling.cluster,
        similarity=sibling.similarity,
        pruned_at=sibling.pruned_at,
    )


def _end_of(siblings: Sequence[Sibling]) -> str:
    """Why a group is over that no rule of ours ended."""
    lost = sum(sibling.state in (State.ABORTED, State.FAILED) for sibling in siblings)
    return f"aborted: {lost} of {len(siblings)} siblings" if lost else "all siblings finished"


def record_of(group: Group, max_new_tokens: int, *, is_settled: bool) -> GroupRecord:
    """The group as of now. `saved_tokens_at_most`: had each stopped sibling run to its limit; none
    where all would have said the same anyway."""
    counts = group.tally.counts()
    siblings = [group.siblings[index] for index in sorted(group.siblings)]
    leader = counts[0] if counts else None
    return GroupRecord(
        group_id=group.group_id,
        active=True,
        reason=group.reason or (_end_of(siblings) if is_settled else "running"),
        preset=group.config.preset,
        size=len(siblings),
        settled=is_settled,
        answer=leader.answer if leader else None,
        winner=leader.siblings[0] if leader else None,
        votes=tuple(
            (count.answer, len(count.siblings))
            for count in counts[: None if is_settled else MOST_RUNNING_VOTES]
        ),
        tie=len(counts) > 1 and counts[0].weight == counts[1].weight,
        abstentions=group.tally.num_abstentions,
        windows=group.windows,
        judge_calls=group.judge_calls,
        judge_ms=round(group.judge_ms, 3),
        judge_tokens=group.judge_tokens,
        clusters=tuple(tuple(cluster) for cluster in group.clusters),
        generated_tokens=group.generated_tokens,
        saved_tokens_at_most=0
        if group.is_greedy
        else sum(
            max(0, max_new_tokens - sibling.num_tokens)
            for sibling in siblings
            if sibling.state in _STOPPED
        ),
        # Members of a client-side group each carry the record as of their end: without the choices
        # until it is settled, or n records would hold n choices each.
        choices=tuple(choice_of(sibling) for sibling in siblings) if is_settled else (),
    )
