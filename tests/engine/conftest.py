"""Servers are shared by configuration: starting one takes longer than most tests.

`scripted` plays the traces of scenario.py in two engine configurations; `reasoner` samples the
embedded model for real.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.scripted import plugin_env
from tests.engine import scenario
from tests.engine.server import Server
from tests.engine.tiny_model import make_tiny_model
from tests.engine.versions import HAS_PAGES, before

# An idle scheduler spins a core that the next server needs.
COMMON = (
    "--enable-deepprune", "--deepprune-log-steps", "--deepprune-window", "8", "--sleep-on-idle",
    "--deepprune-fill", "0",  # how many rows are free depends on the machine; see test_fill.py
)  # fmt: skip
MARKER = ("--deepprune-judge", "python:tests.marker_judge:make", "--deepprune-judge-deadline-ms",
          "1500")  # fmt: skip
# Before 0.5.17 a grammar beside a reasoning parser asks for `</think>` as a token of its own.
EIGHT_ROWS = (
    "--disable-overlap-schedule", "--max-running-requests", "8", "--reasoning-parser", "qwen3",
    *(("--grammar-backend", "none") if before("0.5.17") else ()),
)  # fmt: skip
# The first takes what single requests may ask for where a server lets them, see test_shapes.py and
# test_steering.py.
CONFIGS: dict[str, tuple[str, ...]] = {
    "page1-overlap": (
        "--enable-custom-logit-processor", "--enable-return-hidden-states", "--enable-metrics",
        "--tool-call-parser", "qwen25", "--constrained-json-disable-any-whitespace",
    ),
    **({"page16-no-overlap": ("--page-size", "16", *EIGHT_ROWS)} if HAS_PAGES
       else {"page1-no-overlap": EIGHT_ROWS}),
}  # fmt: skip
# Between SGLang's processes go pickles, as is the default, or its own typed messages.
ENVIRONMENTS = {"page16-no-overlap": {"SGLANG_USE_PICKLE_IPC": "0"}}


STARTUP = str(Path(__file__).parent / "startup")


def pytest_configure() -> None:
    """A server's start is most of an engine test's time: see startup/sitecustomize.py."""
    path = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join(part for part in (STARTUP, path) if part)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.engine)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint's folder."""
    path = tmp_path_factory.mktemp("tiny")
    make_tiny_model(path)
    return path


@pytest.fixture(scope="session")
def tokenizer(tiny: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny)


@pytest.fixture(scope="session")
def scripts_env(tiny: Path, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("scripts")
    scenario.write(tokenizer, folder / "scripts.json")
    return plugin_env(folder / "scripts.json", folder)


@pytest.fixture(scope="session", params=list(CONFIGS))
def scripted(request: pytest.FixtureRequest, tiny: Path, scripts_env: Any) -> Iterator[Server]:
    """A server on scripted tokens, in each of CONFIGS."""
    env = {**scripts_env, **ENVIRONMENTS.get(request.param, {})}
    with Server(tiny, *COMMON, *MARKER, *CONFIGS[request.param], env=env) as server:
        server.name = request.param
        yield server


@pytest.fixture(scope="session")
def reasoner() -> Iterator[Server]:
    """A server on the embedded reasoner: real sampling, the default judge."""
    from sglang_deepprune.reasoner import model_path

    with Server(model_path(), *COMMON, max_total_tokens=40000) as server:
        yield server
