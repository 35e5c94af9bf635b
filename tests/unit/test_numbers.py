"""docs/numbers.md says what benchmarks/results say."""

from __future__ import annotations

import json
import re

import pytest

from benchmarks import numbers


def test_the_page_holds_the_figures_of_the_results():
    """Stale? `python -m benchmarks.numbers --write`."""
    held = numbers.PAGE.read_text().partition(numbers.BEGIN)[2].partition(numbers.END)[0]
    assert held == numbers.table()


def test_a_changed_result_changes_the_table(tmp_path, monkeypatch):
    for path in numbers.RESULTS.glob("*.json"):
        (tmp_path / path.name).write_text(path.read_text())
    before = numbers.table()
    report = json.loads((tmp_path / "overhead.json").read_text())
    for row in report["rows"]:
        if row["measure"] == "hook share":
            row["share_percent"] = 12.345
    (tmp_path / "overhead.json").write_text(json.dumps(report))
    monkeypatch.setattr(numbers, "RESULTS", tmp_path)
    numbers.rows.cache_clear()
    try:
        assert numbers.table().count("12.35 %") + numbers.table().count("12.34 %") == 2
        assert numbers.table() != before
    finally:
        numbers.rows.cache_clear()


def test_a_figure_that_is_not_there_is_an_error():
    with pytest.raises(ValueError, match=r"frontier\.json: 0 rows"):
        numbers.one("frontier", policy="no such policy")


def test_every_line_names_results_that_exist():
    names = re.findall(r"\(\.\./benchmarks/results/(\w+)\.json\)", numbers.table())
    assert len(names) == numbers.table().count("\n") - 2
    assert all((numbers.RESULTS / f"{name}.json").is_file() for name in names)
