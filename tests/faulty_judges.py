"""Judges with one fault each, for `--deepprune-judge python:faulty_judges:NAME` in tests.

A factory that must behave differently the second time keeps a flag file: each process of it is new.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sglang_deepprune.batcher import DeviceLost
from sglang_deepprune.types import JudgeTask, Pair

Score = Callable[[Sequence[Pair]], Any]
SLOW_S = 0.1


class ScriptedJudge:
    name = "scripted"

    def __init__(self, score: Score):
        self.score = score


def same(value: float = 1.0) -> ScriptedJudge:
    return ScriptedJudge(lambda pairs: np.full(len(pairs), value, dtype=np.float32))


def forgetful() -> ScriptedJudge:
    """Different answers, until it was told of a group that has ended: the same ones then."""
    ended: list[str] = []
    judge = ScriptedJudge(lambda pairs: np.full(len(pairs), bool(ended), dtype=np.float32))
    judge.forget = ended.extend  # type: ignore[attr-defined]
    return judge


def no_verdict() -> ScriptedJudge:
    return same(float("nan"))


def out_of_range() -> ScriptedJudge:
    return same(1.5)


def wrong_shape() -> ScriptedJudge:
    return ScriptedJudge(lambda pairs: np.ones((len(pairs) + 1, 2), dtype=np.float32))


def wrong_dtype() -> ScriptedJudge:
    return ScriptedJudge(lambda pairs: np.array(["same"] * len(pairs)))


def nothing() -> ScriptedJudge:
    return ScriptedJudge(lambda pairs: None)


def raising() -> ScriptedJudge:
    """Quotes a trace, as a careless judge would."""

    def score(pairs: Sequence[Pair]) -> np.ndarray:
        raise ValueError(f"cannot read {pairs[0].left.text}")

    return ScriptedJudge(score)


def device_lost_once() -> ScriptedJudge:
    """The first process's CUDA context breaks at its first call, for good."""
    import torch

    flag = Path(os.environ["FAULTY_JUDGES_FLAG"])
    is_broken = not flag.exists()
    flag.touch()

    def score(pairs: Sequence[Pair]) -> np.ndarray:
        if not is_broken:
            return np.ones(len(pairs), dtype=np.float32)
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    return ScriptedJudge(score)


def losing_the_device_by_a_kernel() -> ScriptedJudge:
    if "DEEPPRUNE_JUDGE_PLAIN" not in os.environ:
        raise DeviceLost("AcceleratorError")
    return same()


def losing_the_device() -> ScriptedJudge:
    raise DeviceLost("AcceleratorError")


def raising_for_left_out() -> ScriptedJudge:
    """Fails for the traces that say so, and for no other group of the batch."""

    def score(pairs: Sequence[Pair]) -> np.ndarray:
        if any("unreadable" in pair.left.text + pair.right.text for pair in pairs):
            raise KeyError(pairs[0].left.text)
        return np.ones(len(pairs), dtype=np.float32)

    return ScriptedJudge(score)


def slow() -> ScriptedJudge:
    def score(pairs: Sequence[Pair]) -> np.ndarray:
        time.sleep(SLOW_S)
        return np.ones(len(pairs), dtype=np.float32)

    return ScriptedJudge(score)


def hanging() -> ScriptedJudge:
    return ScriptedJudge(lambda pairs: time.sleep(3600))


def hanging_once() -> ScriptedJudge:
    flag = Path(os.environ["FAULTY_JUDGES_FLAG"])
    if flag.exists():
        return same()
    flag.touch()
    return hanging()


def ending() -> ScriptedJudge:
    return ScriptedJudge(lambda pairs: os._exit(3))


def exiting() -> ScriptedJudge:
    return ScriptedJudge(lambda pairs: sys.exit("not an Exception"))


def unloadable() -> ScriptedJudge:
    raise RuntimeError("no weights here")


def never_loaded() -> ScriptedJudge:
    time.sleep(3600)
    raise AssertionError


def not_a_judge() -> object:
    return object()


def babbling(spec: str, budget_s: float) -> Callable[[list[JudgeTask]], object]:
    """A worker, not a judge: its reply belongs to no batch."""
    return lambda tasks: [spec for _ in tasks]


def quoting(spec: str, budget_s: float) -> Callable[[list[JudgeTask]], object]:
    """A worker, not a judge: raises outside any task."""

    def answer(tasks: list[JudgeTask]) -> object:
        raise RuntimeError(tasks[0].traces[0].text)

    return answer


# Factories for tests of `Child` alone.
def echo() -> Callable[[Any], Any]:
    return lambda request: request


def sleeper() -> Callable[[Any], Any]:
    return time.sleep


def failing() -> Callable[[Any], Any]:
    def answer(request: Any) -> Any:
        raise ValueError(request)

    return answer
