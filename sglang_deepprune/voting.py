"""The vote over sibling answers: ballots join classes of equal answers, classes merge on proof.

Pure and deterministic in the order of events, so that every tensor-parallel rank may replay it.
`add` joins a ballot to the first class whose first answer `compare` says is the same. Where
`compare` cannot tell it returns questions for the slow path; until `resolve` answers one, its
two classes count apart. A proof merges two classes into the lower id, whatever the order in
which proofs arrive; None means "not shown equal" and counts as different.

Rule of the vote: most votes (weight); among equals the class whose earliest sibling index is
lowest. An abstention counts as a ballot but joins no class, so abstentions never form a majority.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from sglang_deepprune.answers import Allowance, canonical, compare

# Open at a time: a hostile group of all different formulas must not ask n^2 questions.
MAX_QUESTIONS = 16
# Work of comparing, see `answers.compare`: of one ballot, and of a group in all its life. A ballot
# is compared with the largest classes first, and counts apart from those it was not compared with;
# who says the same in the same words joins at no cost.
BALLOT_WORK = 256
GROUP_WORK = 16_384


@dataclass(frozen=True, slots=True)
class Ballot:
    """One sibling's vote; answer None is an abstention."""

    answer: str | None
    sibling: int
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Question:
    """Whether two classes hold the same answer; ids for `resolve`, answers for the slow path."""

    low: int
    high: int
    left: str
    right: str


@dataclass(frozen=True, slots=True)
class Standing:
    """One class as counted now; `answer` is the wording of its lowest-index sibling."""

    answer: str
    weight: float
    siblings: tuple[int, ...]


class Tally:
    """An incremental count of one group's ballots."""

    def __init__(self, same: Callable[[str, str], bool | None] | None = None):
        self._same = same  # in place of `answers.compare`
        self._work = Allowance(GROUP_WORK)
        self._joined: dict[str, int] = {}  # canonical form of each ballot so far -> its class
        self._answers: list[str] = []  # First answer of each class, by class id.
        self._parents: list[int] = []  # Union-find: a merged class points to a lower id.
        self._ballots: list[list[Ballot]] = []
        self._open: dict[tuple[int, int], Question] = {}
        self._siblings: set[int] = set()
        self._num_abstentions = 0

    @property
    def num_votes(self) -> int:
        """Ballots taken, abstentions included."""
        return len(self._siblings)

    @property
    def num_abstentions(self) -> int:
        return self._num_abstentions

    @property
    def open_questions(self) -> list[Question]:
        """Questions whose answer could still merge two classes."""
        return list(self._open.values())

    @property
    def is_settled(self) -> bool:
        """No open question is left that could change the count."""
        return not self._open

    @property
    def leader(self) -> Standing | None:
        return next(iter(self.counts()), None)

    @property
    def runner_up(self) -> Standing | None:
        return next(iter(self.counts()[1:]), None)

    @property
    def ties(self) -> list[Standing]:
        """The classes that share the most votes, when there are several."""
        counts = self.counts()
        tied = [standing for standing in counts if standing.weight == counts[0].weight]
        return tied if len(tied) > 1 else []

    def add(self, ballot: Ballot) -> list[Question]:
        """Take one ballot; returns the questions that it opens."""
        if ballot.sibling in self._siblings:
            raise ValueError(f"sibling {ballot.sibling} has voted already")
        self._siblings.add(ballot.sibling)
        if ballot.answer is None:
            self._num_abstentions += 1
            return []
        form = canonical(ballot.answer)
        known = self._joined.get(form)
        doubtful: list[int] = []
        if known is None:
            known, doubtful = self._place(ballot.answer)
        if known is not None:
            self._joined[form] = known
            self._ballots[known].append(ballot)
            return []
        new = self._joined[form] = len(self._answers)
        self._answers.append(ballot.answer)
        self._parents.append(new)
        self._ballots.append([ballot])
        questions = [
            Question(low, new, self._answers[low], ballot.answer)
            for low in doubtful[: max(0, MAX_QUESTIONS - len(self._open))]  # the largest first
        ]
        self._open.update({(q.low, q.high): q for q in questions})
        return questions

    def _place(self, answer: str) -> tuple[int | None, list[int]]:
        """The first class that holds the answer for certain; and those that may hold it, largest
        first: few questions are best asked about the classes that may win.

        Merged classes keep their first answers: what a ballot joins must not depend on which proofs
        have arrived before it.
        """
        mine = Allowance(min(BALLOT_WORK, self._work.left))
        before = mine.left
        order = sorted(range(len(self._answers)), key=lambda index: -len(self._ballots[index]))
        same: list[int] = []
        doubtful: list[int] = []
        for index in order:
            if mine.left <= 0:
                break
            mine.left -= 1
            known = self._answers[index]
            verdict = self._same(known, answer) if self._same else compare(known, answer, mine)
            if verdict:
                same.append(index)
            elif verdict is None:
                doubtful.append(index)
        self._work.left -= before - max(0, mine.left)
        return min(same, default=None), doubtful

    def resolve(self, low: int, high: int, same: bool | None) -> None:
        """Answer a question; None (not shown equal) keeps the classes apart."""
        if self._open.pop((low, high), None) is None:
            return
        roots = sorted((self._root(low), self._root(high)))
        if same is True:
            self._parents[roots[1]] = roots[0]
            # Those between classes that are one by now are moot, and make room for others.
            self._open = {
                key: q for key, q in self._open.items() if self._root(q.low) != self._root(q.high)
            }

    def give_up(self) -> None:
        """Nobody waits for the open questions any longer: their classes stay apart."""
        self._open.clear()

    def votes(self) -> list[int]:
        """Ballots of each class, most first: all that many a caller wants, and cheaper."""
        sizes: dict[int, int] = {}
        for index, ballots in enumerate(self._ballots):
            root = self._root(index)
            sizes[root] = sizes.get(root, 0) + len(ballots)
        return sorted(sizes.values(), reverse=True)

    def counts(self) -> list[Standing]:
        """All classes, best first by the rule of the vote."""
        members: dict[int, list[Ballot]] = {}
        for index, ballots in enumerate(self._ballots):
            members.setdefault(self._root(index), []).extend(ballots)
        standings = [_standing(ballots) for ballots in members.values()]
        return sorted(standings, key=lambda s: (-s.weight, s.siblings[0]))

    def _root(self, index: int) -> int:
        while self._parents[index] != index:
            index = self._parents[index]
        return index


def _standing(ballots: list[Ballot]) -> Standing:
    ballots = sorted(ballots, key=lambda ballot: ballot.sibling)
    assert ballots[0].answer is not None
    weight = math.fsum(ballot.weight for ballot in ballots)
    return Standing(ballots[0].answer, weight, tuple(ballot.sibling for ballot in ballots))
