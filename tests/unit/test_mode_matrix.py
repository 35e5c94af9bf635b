"""docs/modes.md holds what it says: each row's tests exist, and no mode is left out."""

from __future__ import annotations

import ast
import functools
import inspect
import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from sglang_deepprune.patches import server_args, support

ROOT = Path(__file__).resolve().parents[2]
STATES = ("works", "refused", "untested")


@dataclass(frozen=True, slots=True)
class Row:
    mode: str
    state: str  # one of STATES
    reason: str  # what follows it
    tests: tuple[tuple[str, str], ...]  # (file under tests/, function)


@functools.cache
def rows() -> list[Row]:
    """The table without its headings (rows of a bold name alone)."""
    found = []
    for line in (ROOT / "docs" / "modes.md").read_text().splitlines():
        if not line.startswith("| ") or line.startswith(("| ---", "| mode |", "| **")):
            continue
        mode, state, tests = [cell.strip() for cell in line.strip("|").split(" | ")]
        name, _, reason = state.partition(":")
        pairs = re.findall(r"`([\w/]+\.py)::(\w+)`", tests)
        found.append(Row(mode, name, reason.strip(), tuple(pairs)))
    return found


@functools.cache
def functions(file: str) -> dict[str, bool]:
    """{test function of a file: whether it carries the marker `gpu`}."""
    tree = ast.parse((ROOT / "tests" / file).read_text())
    of_module = any(
        isinstance(node, ast.Assign)
        and any(isinstance(name, ast.Name) and name.id == "pytestmark" for name in node.targets)
        and "pytest.mark.gpu" in ast.unparse(node.value)
        for node in tree.body
    )
    return {
        node.name: of_module or any("mark.gpu" in ast.unparse(d) for d in node.decorator_list)
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
    }


def test_the_table_is_read():
    assert len(rows()) > 90
    assert {row.state for row in rows()} == set(STATES)
    modes = [row.mode for row in rows()]
    assert len(set(modes)) == len(modes), "two rows of one name"


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.mode)
def test_the_tests_of_a_row_exist(row: Row):
    assert row.tests, "a row without a test"
    for file, name in row.tests:
        assert name.startswith("test_") and name in functions(file), f"{file} has no {name}"


@pytest.mark.parametrize("row", [r for r in rows() if r.state != "works"], ids=lambda r: r.mode)
def test_what_does_not_work_says_why_and_where_it_is_tested(row: Row):
    assert row.reason
    on_gpu = [functions(file)[name] for file, name in row.tests]
    assert any(on_gpu) if row.state == "untested" else not any(on_gpu)


def test_what_works_is_tested_without_a_gpu():
    for row in rows():
        if row.state == "works":
            assert not any(functions(file)[name] for file, name in row.tests), row.mode


def test_every_refusal_and_every_warning_at_start_has_its_row():
    source = inspect.getsource(server_args.refusals)
    refused = set(re.findall(r'"(--[\w-]+|SGLANG_\w+)(?::| before)', source))
    assert len(refused) >= 8
    told = " ".join(row.mode for row in rows() if row.state == "refused")
    assert not [flag for flag in refused if flag not in told]
    everything = SimpleNamespace(
        device="cuda", enable_lora=True, speculative_algorithm="EAGLE", attn_dp_size=2,
        enable_deterministic_inference=True, enable_hierarchical_cache=True,
        enable_strict_thinking=True, enable_return_routed_experts=True,
    )  # fmt: skip
    named = server_args.untested_modes(everything)
    assert len(named) == inspect.getsource(support.untested).count('"--') + 1
    told = " ".join(row.mode for row in rows() if row.state == "untested")
    assert not [mode for mode in named if mode not in told]


def test_cases_and_further_shapes_are_there_line_by_line():
    modes = [row.mode for row in rows()]
    for number in range(1, 13):
        assert any(mode.startswith(f"D{number}:") for mode in modes)
    for number in range(1, 11):
        assert any(mode.startswith(f"{number}:") for mode in modes)
