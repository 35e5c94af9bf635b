"""docs/recipes.md shows the very files that `make test-stacks` runs, and the versions it pins."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from tests.stacks.environments import ENVIRONMENTS, CannotBeHad, Environment

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "recipes.md").read_text()


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "scripts" / "show_recipes.py"))


def test_the_page_shows_every_recipe_as_it_is(script: dict[str, Any]):
    files = {path.name for path in (ROOT / "docs" / "recipes").iterdir() if path.is_file()}
    assert script["shown"](PAGE) == files
    assert script["render"](PAGE) == PAGE, "run scripts/show_recipes.py"


def test_every_recipe_is_run_by_a_test():
    tests = "".join(path.read_text() for path in (ROOT / "tests" / "stacks").glob("test_*.py"))
    # Named there, or by a file that is: a filter, a data set, a task.
    text = tests + "".join(
        path.read_text()
        for path in (ROOT / "docs" / "recipes").glob("lm_eval*")
        if path.suffix in (".yaml", ".py")
    )
    for path in (ROOT / "docs" / "recipes").iterdir():
        named = path.name if path.suffix in (".mjs", ".jsonl", ".yaml") else path.stem
        task = named.replace("lm_eval_", "deepprune_").removesuffix(".yaml")
        assert named in text or task in tests, path.name


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_the_page_names_the_versions_that_are_tested(name: str):
    for pin in ENVIRONMENTS[name].pins:
        package, version = re.split("==|(?<=.)@", pin)
        package = package.partition("[")[0]
        assert f"{package} {version}" in PAGE, pin


def test_an_environment_that_cannot_be_had_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("tests.stacks.environments.FOLDER", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))  # no npm there
    one = Environment("some", ("left-pad@1.3.0",), ("left-pad",), is_node=True)
    with pytest.raises(CannotBeHad, match="some: not installed"):
        one.require()
    one.make()
    with pytest.raises(CannotBeHad, match="some: there is no node or no npm on this machine"):
        one.require()
    assert not one.is_current
