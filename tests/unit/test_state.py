"""What /server_info says of us; no server."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from sglang_deepprune.config import DeepPruneConfig, dest_of, setting_fields
from sglang_deepprune.judging import JudgeWorker
from sglang_deepprune.patches import hooks, state
from sglang_deepprune.probing import ProbeDesk


class Worker(JudgeWorker):
    """A judge's worker that never launches; counts its polls."""

    def __init__(self, *, is_ready: bool = False, off: str | None = None):
        super().__init__("similarity", 1.0)
        self._child._is_ready = is_ready
        self._off = off
        self.num_polls = 0

    def poll(self) -> list[Any]:
        self.num_polls += 1
        return []


def engine(worker: Any = None, *, is_idle: bool = True, **settings: Any) -> Any:
    runs: dict[str, Any] = {} if is_idle else {"g": None}
    coordinator = SimpleNamespace(judge=worker, is_idle=is_idle, runs=runs)
    config = DeepPruneConfig(enable=True, **settings)
    return SimpleNamespace(config=config, coordinator=coordinator, faults=["poll"])


@pytest.mark.parametrize(
    ("judge", "said"),
    [
        (Worker(is_ready=True), "ready"),
        (Worker(), "loading"),
        (Worker(is_ready=True, off="given up"), "off"),
        (ProbeDesk(Worker(is_ready=True)), "ready"),
        (None, None),
    ],
)
def test_the_judges_state_is_told(judge: Any, said: str | None):
    assert state.describe(engine(judge))["judge_state"] == said


def test_a_server_without_a_judge_says_so():
    assert state.describe(engine(judge="none"))["judge_state"] == "none"


def test_the_judge_is_polled_only_where_nobody_else_does():
    idle, busy = Worker(), Worker()
    state.describe(engine(idle))
    state.describe(engine(busy, is_idle=False))
    assert (idle.num_polls, busy.num_polls) == (1, 0)


def test_every_setting_is_told_in_plain_values():
    told = state.describe(engine(Worker(), is_idle=False, preset="paper", window=8))
    assert set(told["settings"]) == {dest_of(spec) for spec in setting_fields()}
    assert told["settings"]["deepprune_window"] == 8
    assert (told["judge_is_asked"], told["live_groups"], told["faults"]) == (True, 1, ["poll"])
    assert json.loads(json.dumps(told)) == msgspec.msgpack.decode(msgspec.msgpack.encode(told))


def test_the_hook_adds_our_state_and_takes_out_what_is_secret(monkeypatch):
    monkeypatch.setattr(hooks, "_engine", engine())
    output = SimpleNamespace(internal_state={"tp_size": 1, "_deepprune": "holds the token"})
    hooks.get_internal_state(output, None, None)
    assert set(output.internal_state) == {"tp_size", "deepprune"}


def test_an_error_of_ours_leaves_sglangs_answer_alone(monkeypatch):
    monkeypatch.setattr(hooks, "_engine", SimpleNamespace())
    output = SimpleNamespace(internal_state={"tp_size": 1})
    hooks.get_internal_state(output, None, None)
    assert output.internal_state == {"tp_size": 1}
    monkeypatch.setattr(hooks, "_engine", None)  # a scheduler that is still being built
    hooks.get_internal_state(output, None, None)
    assert output.internal_state == {"tp_size": 1}
