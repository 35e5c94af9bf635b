"""The serving benchmark in its smoke size: real servers, flag off and on, its table and JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_smoke_size_runs_to_its_table(tmp_path: Path):
    out = tmp_path / "serving.json"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.serving", "--smoke", "--json", str(out),
         "--resume", str(tmp_path / "passes")],
        cwd=ROOT, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    rows = {row["policy"]: row for row in json.loads(out.read_text())["rows"]}
    assert set(rows) == {"plain", "pool4", "balanced", "plain again", "declined", "declined again"}
    for name in ("plain again", "declined", "declined again"):  # paired noise
        assert rows[name]["same_winner"] == 1 and rows[name]["tokens_ratio"] == 1
    assert rows["balanced"]["tokens_ratio"] <= 1 and rows["balanced"]["retractions"] == 0
