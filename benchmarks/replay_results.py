"""What a replay keeps: one line a policy and question, so that a cut-off run can go on.

No recorded text: ids, letters and counts only.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.replay_data import Played

PLAIN = "plain"


@dataclass(frozen=True, slots=True)
class Policy:
    """What is asked for: a preset (or plain n>1), under a judge, with a K2 (0: scaled to n)."""

    name: str
    judge: str = "none"
    k2: int | None = None  # None: the policy has no K2

    @property
    def settings(self) -> dict[str, Any] | bool:
        """The request's `custom_params.deepprune`."""
        if self.name == PLAIN:
            return False
        return {"preset": self.name, **({} if self.k2 is None else {"k2": self.k2})}

    @property
    def label(self) -> str:
        k2 = {None: "", 0: " K2=n/4"}.get(self.k2, f" K2={self.k2}")
        return f"{self.name}{'' if self.judge == 'none' else ' ' + self.judge}{k2}"


@dataclass(slots=True)
class Usage:
    """Time, steps and KV slots since the last question of the pass finished."""

    wall_s: float = 0.0
    cpu_s: float = 0.0  # of all server processes: hardly depends on what else the machine does
    steps: int = 0  # decode steps of the scheduler, all rows at once
    kv_sum: int = 0
    kv_samples: int = 0
    kv_peak: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """One question under one policy. Flat: a line of the results file."""

    policy: str
    judge: str
    k2: int | None
    question: str
    n: int
    gold: str
    winner: str | None
    is_right: bool
    tie: bool
    votes: dict[str, int]
    decode_tokens: int
    prefix_tokens: int
    judge_tokens: int
    judge_calls: int
    judge_ms: float
    pruned: int
    decided: int
    not_started: int
    longest: int  # decode steps of the longest sibling: the least a group can take
    retractions: int
    latency_s: float
    reason: str
    usage: Usage = field(default_factory=Usage)

    @property
    def key(self) -> tuple[str, str, int | None, str]:
        return self.policy, self.judge, self.k2, self.question


class Results:
    """The finished questions in DIR/results.jsonl."""

    def __init__(self, folder: Path, is_fresh: bool = False):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "results.jsonl"
        if is_fresh:
            self.path.unlink(missing_ok=True)
        if self.path.is_file() and not self.path.read_bytes().endswith(b"\n"):
            with self.path.open("a") as out:
                out.write("\n")  # ends the line that a killed run was writing
        self.outcomes = {one.key: one for one in _read(self.path)}

    def add(self, outcome: Outcome) -> None:
        self.outcomes[outcome.key] = outcome
        with self.path.open("a", encoding="utf-8") as out:
            out.write(json.dumps(asdict(outcome)) + "\n")

    def of(self, policy: Policy, questions: Sequence[Played]) -> list[Outcome]:
        keys = [_key(policy, played) for played in questions]
        return [self.outcomes[key] for key in keys if key in self.outcomes]

    def missing(self, policy: Policy, questions: Sequence[Played]) -> list[Played]:
        return [played for played in questions if _key(policy, played) not in self.outcomes]


def _key(policy: Policy, played: Played) -> tuple[str, str, int | None, str]:
    return policy.name, policy.judge, policy.k2, played.question.question_id


def _read(path: Path) -> Iterator[Outcome]:
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        with suppress(ValueError):  # a line that was cut off
            row = json.loads(line)
            yield Outcome(**{**row, "usage": Usage(**row["usage"])})
