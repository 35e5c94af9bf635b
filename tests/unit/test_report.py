"""The command line that a report names is one that can be typed."""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace

import pytest

from sglang_deepprune import report


@pytest.mark.parametrize(
    ("program", "module", "said"),
    [
        ("/somewhere/benchmarks/judge.py", "benchmarks.judge", "python -m benchmarks.judge"),
        ("/somewhere/x/__main__.py", "sglang_deepprune.__main__", "python -m sglang_deepprune"),
        ("/somewhere/bin/sglang-deepprune", None, "sglang-deepprune"),
        ("/somewhere/study.py", None, "python study.py"),
    ],
)
def test_a_command_can_be_typed(
    monkeypatch: pytest.MonkeyPatch, program: str, module: str | None, said: str
):
    spec = SimpleNamespace(name=module) if module else None
    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace(__spec__=spec))
    monkeypatch.setattr(sys, "argv", [program, "--n", "4", "--traces", "/data/traces.jsonl"])
    assert report.command() == f"{said} --n 4 --traces traces.jsonl"


def test_a_study_that_pins_itself_does_not_shrink_the_machine():
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert report.machine()["cpus"] == len(before)
    finally:
        os.sched_setaffinity(0, before)
