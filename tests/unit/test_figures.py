"""docs/numbers.md says what benchmarks/results say."""

from __future__ import annotations

import json
import re

import pytest

from benchmarks import figures


def test_the_page_holds_the_figures_of_the_results():
    """Stale? `python -m benchmarks.figures --write`."""
    held = figures.PAGE.read_text().partition(figures.BEGIN)[2].partition(figures.END)[0]
    assert held == figures.table()


def test_a_changed_result_changes_the_table(tmp_path, monkeypatch):
    for path in figures.RESULTS.glob("*.json"):
        (tmp_path / path.name).write_text(path.read_text())
    before = figures.table()
    report = json.loads((tmp_path / "overhead.json").read_text())
    for row in report["rows"]:
        if row["measure"] == "hook share":
            row["share_percent"] = 12.345
    (tmp_path / "overhead.json").write_text(json.dumps(report))
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    figures.rows.cache_clear()
    try:
        assert figures.table().count("12.35 %") + figures.table().count("12.34 %") == 2
        assert figures.table() != before
    finally:
        figures.rows.cache_clear()


def test_a_figure_that_is_not_there_is_an_error():
    with pytest.raises(ValueError, match=r"frontier\.json: 0 rows"):
        figures.one("frontier", policy="no such policy")


def test_every_line_names_results_that_exist():
    names = re.findall(r"\(\.\./benchmarks/results/(\w+)\.json\)", figures.table())
    assert len(names) == figures.table().count("\n") - 2
    assert all((figures.RESULTS / f"{name}.json").is_file() for name in names)
