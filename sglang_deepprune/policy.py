"""Whom to start and whom to stop: pure functions of a group's state, for engine, tests and studies.

Whom to start: `plan_claims`. A lazy group has a few siblings running (`width`), and each finished,
undecided vote claims one more; `fill_order` names those that may start on top where rows are free.

Whom to stop, two rules. The decided vote (`plan_decided`): the runner-up is unlikely to overtake
with what still runs. The paper's pruning (`plan_deepprune`, section 4.2 of DeepPrune): siblings
that a judge found to reach the same answer are redundant, K2 of the largest cluster run on and
vote. The paper stops every trace that joins a cluster and yet wants K2 of them finished for the
vote; online that means: the first K2 of a cluster run on (they are the furthest along, so the vote
comes soonest) and whoever joins later stops at once.

No rule stops the last sibling that could still bring an answer, or one that the judge was asked
about and had no verdict on. Nothing here changes the group.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice

from sglang_deepprune import tau
from sglang_deepprune.group import Group, Sibling, State
from sglang_deepprune.types import ABSENT, Plan

OPEN_ENDED = "open-ended: the first 3 finished siblings hold no answer"
RENEWED = "the weights changed: its siblings ran on as plain sampling"
ABANDONED = "an error of the plugin's own: its siblings ran on as plain sampling"
POOL_FULL = "pruned: the KV pool was full"
OPEN_ENDED_VOTES = 3
AGED = 3  # mean trace lengths after which a group's claim begins to widen
UNKNOWN_MEMBERS = 512  # siblings that a client-side group may still get while it is not closed


def plan(group: Group, in_flight: frozenset[int] = frozenset()) -> Plan:
    """What the group's preset wants now. `in_flight`: siblings that the judge has at this moment.

    `reason == OPEN_ENDED`: nothing is stopped, and the group is to be released.
    """
    config = group.config
    if group.is_released:
        return Plan(admit=len(group.held))
    if group.is_decided:
        return Plan(_indices(_running(group)), decided=True, reason=group.reason or "decided")
    if config.preset != "collect" and is_open_ended(group):
        return Plan(admit=len(group.held), reason=OPEN_ENDED)
    settled = plan_decided(group)
    if settled.decided:
        return settled
    may_prune = config.prunes_by_judge and not tau.is_distrusted(group)
    pruned = plan_deepprune(group, in_flight) if may_prune else Plan()
    return replace(pruned, admit=plan_claims(group, pruned.stop))


def width(group: Group) -> int:
    """Siblings that a group may have started and unfinished without asking whether rows are free.

    It grows with the group's age, in units of its own mean trace length, so that a question on
    which nobody agrees is not run a few siblings at a time for ever. Not before AGED such lengths:
    most votes are decided by then, and what runs beside the deciding ones is waste. Age counts in
    steps: the same on every rank.
    """
    config = group.config
    if not config.is_lazy or group.is_released:
        return UNKNOWN_MEMBERS * UNKNOWN_MEMBERS
    length = group.mean_length
    aged = max(0.0, group.steps / length - AGED) if length else 0.0
    return config.base + int(config.base * config.widen * aged)


def is_full(group: Group) -> bool:
    """As many siblings are started as `width` allows. Counts no further than it must: all of a
    group's siblings come one by one, and each one asks."""
    room = width(group)
    if room > len(group.siblings):
        return False
    started = (sibling for sibling in group.siblings.values() if sibling.is_started)
    return sum(1 for _ in islice(started, room)) == room


def plan_claims(group: Group, stopped: Sequence[int] = ()) -> int:
    """Held siblings that the group starts now, once `stopped` are. Never none while nothing of it
    lives: it would sleep for ever."""
    gone = [group.siblings[index] for index in stopped]
    held = len(group.held) - sum(sibling.state is State.HELD for sibling in gone)
    started = group.num_started - sum(sibling.is_started for sibling in gone)
    return max(0, min(held, width(group) - started))


def num_extras(group: Group) -> int:
    """Started siblings beyond the group's claim: the first to yield when anybody else waits."""
    return 0 if group.is_released else max(0, group.num_started - width(group))


def fill_order(groups: Sequence[Group]) -> Iterator[Group]:
    """Whose held sibling starts next where rows are free: fewest votes + started first, then the
    group that came first. A group comes once for each of its held siblings."""
    heap = [
        (group.num_voted + group.num_started, place, len(group.held))
        for place, group in enumerate(groups)
        if not group.is_decided and group.has_held
    ]
    heapq.heapify(heap)
    while heap:
        load, place, left = heap[0]
        yield groups[place]
        if left > 1:
            heapq.heapreplace(heap, (load + 1, place, left - 1))
        else:
            heapq.heappop(heap)


def chance_of_overtake(a: int, b: int, remaining_scaled: int) -> float:
    """P(the runner-up ends ahead), when `remaining_scaled` more votes go to one of the two.

    The leader's share of them is Beta-binomial(remaining_scaled, a + 1, b + 1). A tie is not ahead.
    """
    r = remaining_scaled
    # b + (r - x) > a + x, for x votes of the leader
    last = math.ceil((r + b - a) / 2) - 1
    norm = _log_beta(a + 1, b + 1)
    terms = (
        math.exp(_log_choose(r, x) + _log_beta(x + a + 1, r - x + b + 1) - norm)
        for x in range(min(last, r) + 1)
    )
    return min(1.0, math.fsum(terms))


def decided(
    a: int, b: int, votes_in: int, remaining: int, eps: float, min_votes: int = OPEN_ENDED_VOTES
) -> bool:
    """Whether the vote counts as settled: the runner-up gets strictly more votes with a chance
    below eps.

    By the model above, and of the runner-up alone: left out are a tie, which goes to the class with
    the lowest sibling index and so can change the winner, and several rivals at once. At 3:1 of
    n=8, four to come, strictly ahead has a chance of .04 and a tie one of .13.

    `a`, `b`: votes of leader and runner-up; `votes_in`: ballots, abstentions included;
    `remaining`: siblings that may still vote. The share of these that is expected to go to one of
    the two is (a + b + 1) / (votes_in + 1); the rest scatters or abstains.
    """
    if a == 0 or (votes_in < min_votes and remaining > 0):
        return False  # without a vote there is no winner to settle
    # Whole numbers: rounding in floats could turn an exact quotient into the next number.
    scaled = -(-remaining * (a + b + 1) // (votes_in + 1))
    return chance_of_overtake(a, b, min(scaled, remaining)) < eps


def top_votes(group: Group) -> tuple[int, int]:
    """Votes of the leader and of the runner-up; 0 where there is none.

    While the answer fence still has to say whether some answers are the same, all the others count
    as one runner-up: they may turn out to be.
    """
    first, *others = group.tally.votes() or [0]
    return first, max(others, default=0) if group.tally.is_settled else sum(others)


def num_remaining(group: Group) -> int:
    """Siblings that may still vote; many, while a client-side group may get further members."""
    known = sum(_may_vote(sibling) for sibling in group.siblings.values())
    return known if _is_complete(group) else max(known, UNKNOWN_MEMBERS)


def plan_decided(group: Group) -> Plan:
    """Stop everybody once the vote is decided, or hopeless where the group may give up. With
    nobody left it is counted, not decided."""
    (a, b), k, remaining = top_votes(group), group.num_voted, num_remaining(group)
    config = group.config
    if remaining == 0 or config.preset == "collect":
        return Plan()
    eps = config.decided_eps
    if eps and decided(a, b, k, remaining, eps, config.min_votes):
        reason = f"decided: {a}:{b} of {k} votes, at most {remaining} to come"
    elif is_hopeless(group):
        reason = f"gave up: the leader has {a} of {k} votes"
    else:
        return Plan()
    return Plan(_indices(_running(group)), decided=True, reason=reason)


def is_hopeless(group: Group) -> bool:
    """Enough votes are in, and too few of them agree. Not before the fence has merged what is the
    same."""
    enough = group.config.votes_to_give_up
    if not enough or group.num_voted < enough or not group.tally.is_settled:
        return False
    # With abstentions alone there is no answer to end with: that is `is_open_ended`'s to see.
    return 0 < top_votes(group)[0] < group.config.give_up_share * group.num_voted


def is_open_ended(group: Group) -> bool:
    """The first finishers hold no answer: a poem, a chat. There is nothing to vote on."""
    tally = group.tally
    return OPEN_ENDED_VOTES <= tally.num_votes == tally.num_abstentions


def plan_deepprune(group: Group, in_flight: frozenset[int] = frozenset()) -> Plan:
    """The paper's rule, online.

    While clusters form, whoever joins a cluster that has its K2 stops: it could never be kept. Once
    the largest cluster is final (nobody is left to be placed, or no other could overtake it even
    with all of these), min(|c|, K2) of it run on and the rest stops, queued siblings too. When
    nothing matched anything, K3 run on: the first ones that were placed.
    """
    keep, reason = _final_choice(group, in_flight)
    if reason:
        # A keep list that cannot bring an answer any more has no right to stop the others.
        rest = [s for s in _running(group) if s.index not in keep] if keep else []
        stopped = [s for s in rest if not _is_unjudged(s, in_flight)]
        return Plan(_indices(stopped), reason=reason if stopped else "")
    limit = _kept_of_largest(group)
    late = [s for c in group.clusters for s in _late_members(group, c, limit)]
    return Plan(_indices(late), reason="redundant: its cluster has K2 members" if late else "")


def most_redundant(group: Group, lengths: Mapping[int, int]) -> int | None:
    """Whom the group misses least when KV is short: of its largest cluster among these running
    siblings (index -> tokens), the one that is furthest from its end. None without a judge that
    may prune, where no two of them agree, or where the group runs on untouched."""
    if not group.config.prunes_by_judge or group.is_released or tau.is_distrusted(group):
        return None
    clusters = [[i for i in cluster if i in lengths] for cluster in group.clusters]
    largest = max(clusters, key=len, default=[])
    if len(largest) < 2:
        return None
    return min(largest, key=lambda index: (lengths[index], -index))


def _final_choice(group: Group, in_flight: frozenset[int]) -> tuple[frozenset[int], str]:
    """Whom the final clustering keeps, and how it came out; no reason while it is not final."""
    if not group.clusters:
        return frozenset(), ""
    sizes = [len(cluster) for cluster in group.clusters]
    waiting = _num_waiting(group, in_flight)
    if len(sizes) > 1 and max(sizes) == 1:
        if waiting:
            return frozenset(), ""
        size = group.size or len(group.siblings)
        placed = [cluster[0] for cluster in group.clusters]
        keep = _first_hopeful(group, placed, max(1, group.config.kept_of_singletons(size)))
        return frozenset(keep), f"pruned: {len(sizes)} clusters of one"
    largest = sizes.index(max(sizes))  # ties: the older one
    second = max((n for j, n in enumerate(sizes) if j != largest), default=0)
    if waiting and sizes[largest] <= second + waiting:
        return frozenset(), ""
    keep = _first_hopeful(group, group.clusters[largest], _kept_of_largest(group))
    return frozenset(keep), f"pruned: largest of {len(sizes)} clusters has {sizes[largest]} members"


def _num_waiting(group: Group, in_flight: frozenset[int]) -> float:
    """Siblings that may still join a cluster. A finished one is placed too: it is evidence."""
    if not _is_complete(group):
        return math.inf
    return sum(
        not sibling.has_verdict
        and (
            sibling.index in in_flight
            or (not sibling.is_submitted and (sibling.is_live or sibling.has_voted))
        )
        for sibling in group.siblings.values()
    )


def _kept_of_largest(group: Group) -> int:
    return max(1, group.config.kept_of_largest(group.size or len(group.siblings)))


def _first_hopeful(group: Group, members: Sequence[int], limit: int) -> list[int]:
    """The first `limit` members that have an answer or may still bring one.

    An abstention is no finisher for K2: a stop string inside the thinking answers nothing.
    """
    return [i for i in members if _may_answer(group.siblings[i])][:limit]


def _late_members(group: Group, members: Sequence[int], limit: int) -> list[Sibling]:
    keep = frozenset(_first_hopeful(group, members, limit))
    late = [group.siblings[i] for i in members if i not in keep]
    return [sibling for sibling in late if _is_running(sibling)]


def _is_complete(group: Group) -> bool:
    """All siblings that there will be are known."""
    return group.size > 0 or group.is_closed


def _is_unjudged(sibling: Sibling, in_flight: frozenset[int]) -> bool:
    """The judge was asked and had no verdict: nothing is known against this sibling."""
    is_answered = sibling.is_submitted and sibling.index not in in_flight
    return is_answered and not sibling.has_verdict and sibling.cluster == ABSENT


def _is_running(sibling: Sibling) -> bool:
    """Can be stopped. A sibling votes a moment before its end state is set: too late for it."""
    return sibling.is_live and not sibling.has_voted


def _may_vote(sibling: Sibling) -> bool:
    if sibling.has_voted:
        return False
    is_finished = sibling.state is State.FINISHED and sibling.doom is None
    return sibling.is_live or is_finished


def _may_answer(sibling: Sibling) -> bool:
    return sibling.answer is not None if sibling.has_voted else _may_vote(sibling)


def _running(group: Group) -> list[Sibling]:
    return [sibling for sibling in group.siblings.values() if _is_running(sibling)]


def _indices(siblings: Sequence[Sibling]) -> tuple[int, ...]:
    return tuple(sorted(sibling.index for sibling in siblings))


def _log_beta(x: float, y: float) -> float:
    return math.lgamma(x) + math.lgamma(y) - math.lgamma(x + y)


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
