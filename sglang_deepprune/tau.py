"""tau at run time: what a group's own finished siblings say about its merges. Pure, the same on
every rank, and off unless `tau_step` is set (the paper has one fixed tau).

A merge is *checked* when the sibling that joined a cluster and the cluster's first voter have both
voted: it was right if they gave the same answer. Abstentions say nothing. tau then moves as in
adaptive conformal inference (Gibbs and Candes 2021): up by `tau_step * (1 - FALSE_MERGE)` for a
wrong merge, down by `tau_step * FALSE_MERGE` for a right one, so that in the long run the share of
wrong ones tends to FALSE_MERGE, whatever the judge; never further than REACH from where it began.

Only siblings that ran on can be checked, those that the verdict stopped cannot: the same bias as in
any record of a policy's own choices. It is why a group whose merges look wrong stops pruning
altogether (`is_distrusted`) and does not merely become stricter.
"""

from __future__ import annotations

from dataclasses import dataclass

from sglang_deepprune.group import Group

FALSE_MERGE = 0.2  # the rate that a card's tau is calibrated to
REACH = 0.2  # tau stays this close to where it began
_PRIOR_MERGES = 1 / FALSE_MERGE  # checked merges that the card's word is worth, one of them wrong


@dataclass(frozen=True, slots=True)
class Checked:
    """Merges of one group whose outcome is known."""

    right: int = 0
    wrong: int = 0

    @property
    def false_merge(self) -> float:
        """Expected rate of wrong merges: the mean of a Beta whose prior is FALSE_MERGE."""
        return (self.wrong + 1) / (self.right + self.wrong + _PRIOR_MERGES)


def checked(group: Group) -> Checked:
    """Every later voter of each cluster beside its first one, in joining order."""
    answer_of = {
        sibling: place
        for place, standing in enumerate(group.tally.counts())
        for sibling in standing.siblings
    }
    right = wrong = 0
    for cluster in group.clusters:
        answers = [answer_of[i] for i in cluster if i in answer_of]
        agreeing = answers[1:].count(answers[0]) if answers else 0
        right += agreeing
        wrong += len(answers[1:]) - agreeing
    return Checked(right, wrong)


def merge_tau(group: Group) -> float:
    """tau of the group's next placements."""
    start, step = group.config.merge_tau, group.config.tau_step
    if not step:
        return start
    seen = checked(group)
    moved = start + step * (seen.wrong * (1 - FALSE_MERGE) - seen.right * FALSE_MERGE)
    return min(1.0, start + REACH, max(0.0, start - REACH, moved))


def is_distrusted(group: Group) -> bool:
    """Whether the group's merges were wrong so often that no verdict may stop anybody."""
    return bool(group.config.tau_step) and checked(group).false_merge > 2 * FALSE_MERGE
