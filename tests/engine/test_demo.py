"""`sglang-deepprune demo`, small: a real server, every mode, the table and its JSON."""

from __future__ import annotations

import json
from pathlib import Path

from sglang_deepprune.demo import main


def test_the_demo_ends_with_its_table(tmp_path: Path, capsys):
    out = tmp_path / "demo.json"
    assert main(["--questions", "2", "--n", "4", "--no-live", "--json", str(out)]) == 0
    assert "same seeds in every mode" in capsys.readouterr().out
    report = json.loads(out.read_text())
    assert {"name", "command", "versions", "machine", "rows"} <= set(report)
    modes = [row["mode"] for row in report["rows"]]
    assert modes[0] == "plain n>1" and len(modes) == 4
    plain = report["rows"][0]
    assert plain["finished"] == 8 and plain["same_winner"] == 1
    assert all(row["tokens"] <= plain["tokens"] for row in report["rows"])
