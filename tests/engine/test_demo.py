"""`sglang-deepprune demo`, small: a real server, every mode, the table and its JSON."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from sglang_deepprune.demo import main
from sglang_deepprune.demo_rows import MODES, PLAIN

SMALL = ["--questions", "2", "--n", "4", "--no-live"]


def test_the_demo_ends_with_its_table(tmp_path: Path, capsys):
    out = tmp_path / "demo.json"
    assert main([*SMALL, "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "the same seeds in every mode" in printed and "cons@k right" in printed
    report = json.loads(out.read_text())
    assert {"name", "command", "versions", "machine", "rows"} <= set(report)
    plain, *others = report["rows"]
    assert plain["mode"] == PLAIN and len(others) == len(MODES)
    assert plain["finished"] == 8 and plain["same_winner"] == 1 and plain["tokens_ratio"] == 1
    assert plain["cons_k"] == 4 and plain["judge_calls"] == 0
    for row in report["rows"]:
        assert row["tokens"] <= plain["tokens"]
        ended = ("finished", "pruned", "decided", "not_started", "other_ends")
        assert sum(row[state] for state in ended) == 8
        assert row["same_texts"] == 1  # stopping some siblings changes no other one


def test_a_killed_demo_leaves_no_server_behind():
    """The server has a session of its own, so no signal of the terminal's reaches it."""
    demo = subprocess.Popen(
        [sys.executable, "-m", "sglang_deepprune.cli", "demo", *SMALL],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert demo.stdout is not None and "starting" in demo.stdout.readline()
    time.sleep(3)
    (server,) = children(demo.pid)
    demo.send_signal(signal.SIGTERM)
    assert demo.wait(timeout=30) == 130
    assert not Path(f"/proc/{server}").exists()


def children(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text().split() if os.path.exists(f"/proc/{child}")]
