"""One server for all recipes of a session, and a table of what was tested with which versions."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import pytest

from sglang_deepprune.reasoner import model_path
from tests.engine.server import Server
from tests.stacks.environments import ENVIRONMENTS, CannotBeHad, Environment
from tests.stacks.recipes import FLAGS

TESTED = pytest.StashKey[dict[str, str]]()
UNTESTED = pytest.StashKey[dict[str, str]]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.stacks)


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TESTED], config.stash[UNTESTED] = {}, {}


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    tested = terminalreporter.config.stash[TESTED]
    untested = terminalreporter.config.stash[UNTESTED]
    if tested or untested:
        terminalreporter.section("recipes")
        for name, versions in sorted(tested.items()):
            terminalreporter.line(f"{name}: {versions}")
        for name, reason in sorted(untested.items()):
            terminalreporter.line(f"{name}: UNTESTED here, {reason}")


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """The embedded reasoner behind an OpenAI API: real sampling, preset `balanced`."""
    with Server(model_path(), *FLAGS, max_total_tokens=40000) as one:
        yield one


@pytest.fixture(scope="session")
def environment(request: pytest.FixtureRequest) -> Callable[[str], Environment]:
    """An environment by name, or a skip that says why there is none."""

    def get(name: str) -> Environment:
        one = ENVIRONMENTS[name]
        try:
            one.require()
        except CannotBeHad as error:
            request.config.stash[UNTESTED][name] = str(error)
            pytest.skip(str(error))
        note(request.config, name, one.versions())
        return one

    return get


@pytest.fixture(scope="session")
def own_versions(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Notes packages of the environment that the tests themselves run in."""

    def say(recipe: str, *names: str) -> None:
        found = {name: metadata.version(name) for name in names}
        note(request.config, recipe, {"python": platform.python_version(), **found})

    return say


def note(config: pytest.Config, recipe: str, versions: dict[str, str]) -> None:
    config.stash[TESTED][recipe] = ", ".join(f"{key} {value}" for key, value in versions.items())
