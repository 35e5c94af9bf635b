"""Recorded branches for the frontier: files, seeded draws, and judges of a known quality.

A file is a JSON list (also gzipped) of questions: `gold_answer`, `probe_freq` and `each_branch`,
which holds for every branch [answers probed each `probe_freq` tokens, its tokens, its final
answer]. Nothing of it is kept here. Answers are compared as normalised texts; a missing one, and
the recordings' `ERR`, is no answer.
"""

from __future__ import annotations

import gzip
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from sglang_deepprune.clustering import Score
from sglang_deepprune.types import Pair

_SILENT = frozenset({"", "err", "none", "null"})
_WHOLE = re.compile(r"([+-]?)0*(\d+)(?:\.0*)?")


class BranchFileError(ValueError):
    """A recording that cannot be read: names file, question and field."""


@dataclass(frozen=True, slots=True)
class Branch:
    """One recorded trace."""

    probes: tuple[str | None, ...]  # what it would have answered every `probe_every` tokens
    length: int  # tokens
    answer: str | None  # None: it abstains


@dataclass(frozen=True, slots=True)
class Question:
    """All recorded branches of one question. `number` counts over all files."""

    number: int
    gold: str | None
    probe_every: int  # tokens
    branches: tuple[Branch, ...]


@dataclass(frozen=True, slots=True)
class Draw:
    """An ordered sample of a question's branches: sibling i is branch `picked[i]`."""

    question: Question
    picked: tuple[int, ...]

    @property
    def branches(self) -> list[Branch]:
        return [self.question.branches[index] for index in self.picked]

    @property
    def size(self) -> int:
        return len(self.picked)


def normalised(answer: object) -> str | None:
    """The text that answers are compared by; None for no answer."""
    text = "" if answer is None else " ".join(str(answer).split())
    if text.lower() in _SILENT:
        return None
    whole = _WHOLE.fullmatch(text)
    return whole[1].strip("+") + whole[2] if whole else text


def load(paths: Sequence[Path], limit: int | None = None) -> list[Question]:
    """The questions of all files; `limit`: the first ones of each file."""
    found: list[Question] = []
    for path in paths:
        try:
            data = path.read_bytes()
            entries = json.loads(gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data)
        except (OSError, EOFError, ValueError) as error:
            raise BranchFileError(f"{path.name}: {error}") from error
        if not isinstance(entries, list):
            raise BranchFileError(f"{path.name}: no list of questions")
        for place, entry in enumerate(entries[:limit]):
            try:
                found.append(_question(len(found), entry))
            except (KeyError, TypeError, ValueError) as error:
                what = f"no field {error}" if isinstance(error, KeyError) else str(error)
                raise BranchFileError(f"{path.name}, question {place}: {what}") from error
    if not found:
        raise BranchFileError("no questions")
    return found


def draws_of(questions: Sequence[Question], size: int, count: int, seed: int) -> list[list[Draw]]:
    """[questions][count] draws. Those of a smaller size are the beginnings of a larger one's."""
    return [[_draw(one, size, seed, place) for place in range(count)] for one in questions]


def _draw(question: Question, size: int, seed: int, place: int) -> Draw:
    generator = np.random.default_rng((seed, question.number, place))
    order = generator.permutation(len(question.branches))
    return Draw(question, tuple(int(index) for index in order[:size]))


def _question(number: int, entry: dict[str, Any]) -> Question:
    branches = tuple(
        Branch(tuple(normalised(probe) for probe in probes or ()), int(length), normalised(answer))
        for probes, length, answer in entry["each_branch"]
    )
    gold = normalised(entry["gold_answer"])
    return Question(number, gold, int(entry.get("probe_freq") or 500), branches)


class SimulatedJudge:
    """A judge with this AUROC inside every question, calibrated on the questions' rate of equal
    pairs. Scores are normal with the same spread for equal and for different answers; a pair has
    one score, whoever asks and in whatever order, and its noise is the same for every AUROC."""

    def __init__(self, questions: Sequence[Question], auroc: float, seed: int):
        self.auroc = auroc
        self._seed = seed
        same, pairs = 0, 0
        for question in questions:
            size = len(question.branches)
            same += (int(_equal_pairs(question).sum()) - size) // 2
            pairs += size * (size - 1) // 2
        rate = min(max(same / max(pairs, 1), 1e-6), 1 - 1e-6)
        self._prior = math.log(rate / (1 - rate))
        self._known: dict[int, npt.NDArray[np.float64]] = {}

    def score_of(self, draw: Draw) -> Score:
        """The judge of this draw's siblings."""
        number = draw.question.number
        if number not in self._known:
            self._known[number] = self._probabilities(draw.question)
        matrix, picked = self._known[number], draw.picked

        def score(pairs: Sequence[Pair]) -> npt.NDArray[np.float64]:
            left = [picked[pair.left.sibling] for pair in pairs]
            right = [picked[pair.right.sibling] for pair in pairs]
            return matrix[left, right]

        return score

    def _probabilities(self, question: Question) -> npt.NDArray[np.float64]:
        """[branches, branches] P(same answer)."""
        equal = _equal_pairs(question).astype(np.float64)
        if self.auroc >= 1.0:
            return equal
        distance = math.sqrt(2) * NormalDist().inv_cdf(self.auroc)
        noise = np.random.default_rng((self._seed, question.number)).normal(size=equal.shape)
        upper = np.triu(noise, 1)
        evidence = upper + upper.T + distance * equal
        odds = distance * evidence - distance**2 / 2 + self._prior
        return np.asarray(1 / (1 + np.exp(-odds)), dtype=np.float64)


def _equal_pairs(question: Question) -> npt.NDArray[np.bool_]:
    """[branches, branches]; no answer equals only itself."""
    names: dict[str, int] = {}
    kinds = [
        -1 - index if one.answer is None else names.setdefault(one.answer, len(names))
        for index, one in enumerate(question.branches)
    ]
    row = np.asarray(kinds)
    return np.asarray(row[:, None] == row[None, :])
