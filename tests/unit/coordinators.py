"""Coordinators without an engine: outputs are lists of ids, the judge answers when told to."""

from __future__ import annotations

import math
from typing import Any

from sglang_deepprune.actions import Action, Admission, End
from sglang_deepprune.config import DeepPruneConfig
from sglang_deepprune.coordinator import Coordinator
from sglang_deepprune.group import State
from sglang_deepprune.types import ABSENT, Assignment, JudgeResult, JudgeTask

TEXTS = {1: "so \\boxed{1}", 2: "so \\boxed{2}", 7: "nothing", 8: "\\boxed{(x+1)^2}",
         9: "\\boxed{x^2+2x+1}"}  # fmt: skip


class FakeJudge:
    def __init__(self) -> None:
        self.tasks: list[JudgeTask] = []
        self.results: list[JudgeResult] = []

    def submit(self, task: JudgeTask) -> None:
        self.tasks.append(task)

    def poll(self) -> list[JudgeResult]:
        done, self.results = self.results, []
        return done

    def drop(self, group_id: str) -> None:
        self.results = [one for one in self.results if one.group_id != group_id]


class FakeFence:
    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.answers: list[tuple[int, bool | None]] = []

    def ask(self, a: str, b: str) -> int:
        self.asked.append((a, b))
        return len(self.asked) - 1

    def drop(self, tickets: Any) -> None:
        self.dropped = list(tickets)

    def poll(self) -> list[tuple[int, bool | None]]:
        done, self.answers = self.answers, []
        return done


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def decode(ids: Any) -> str:
    """The last id chooses the text; every other one is a word."""
    return " ".join(["word"] * (len(ids) - 1) + [TEXTS.get(ids[-1], "word")] if ids else [])


def coordinator(**settings: Any) -> Coordinator:
    config = DeepPruneConfig(**{"window": 4, "cut_tokens": 4, **settings})
    return Coordinator(config, decode, judge=FakeJudge(), fence=FakeFence(), clock=Clock())  # type: ignore[arg-type]


def fill(c: Coordinator, size: int, gid: str = "g", **settings: Any) -> None:
    for index in range(size):
        assert c.admit(gid, index, size, settings, 100) == Admission(index)


def step(c: Coordinator, live: list[int], length: int, gid: str = "g") -> None:
    c.observe({gid: {index: [0] * length for index in live}})


def end(c: Coordinator, index: int, last: int, gid: str = "g") -> list[Action]:
    stops = c.vote(gid, [End(index, [0, 0, last], False)])
    c.retire(gid, index, State.FINISHED, 3)
    return stops


def verdict(c: Coordinator, *places: tuple[int, int], gid: str = "g", epoch: int | None = None):
    group = c.runs[gid].group
    epoch = group.epoch if epoch is None else epoch
    placed = tuple(Assignment(s, k, math.nan if k == ABSENT else 0.9) for s, k in places)
    return JudgeResult(gid, epoch, placed, 3, 30, 1.5, window=group.windows)


def admit_lazy(c: Coordinator, size: int, gid: str = "g", **settings: Any) -> list[bool]:
    """Which of the siblings are held."""
    admissions = [c.admit(gid, index, size, settings, 100) for index in range(size)]
    return [admission is not None and admission.is_held for admission in admissions]
