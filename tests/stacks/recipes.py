"""Runs the files of docs/recipes/: the docs show them, so they are what is tested."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from tests.stacks.environments import ROOT

RECIPES = ROOT / "docs" / "recipes"
PROGRAMS = Path(__file__).parent / "programs"  # what a client loses; nobody should copy these
LIMIT_S = 240
# A server's. Fill off: which siblings run besides the base would hang on the machine's speed.
FLAGS = ("--enable-deepprune", "--deepprune-fill", "0", "--sleep-on-idle")


def environ(url: str = "", **more: str) -> dict[str, str]:
    """The environment of a recipe's process: no proxy of this machine, and nothing of ours."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH",)}
    return {
        **kept,
        "SGLANG_URL": url,
        "NO_PROXY": "127.0.0.1,localhost",
        "PYTHONDONTWRITEBYTECODE": "1",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        **more,
    }


def run(
    command: list[str | Path],
    *,
    env: dict[str, str],
    cwd: Path = RECIPES,
    limit_s: float = LIMIT_S,
) -> str:
    """Its standard output. Fails the test with the end of what it said."""
    done = subprocess.run(
        [str(part) for part in command],
        env=env, cwd=cwd, capture_output=True, text=True, timeout=limit_s, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    return done.stdout


def run_json(command: list[str | Path], *, env: dict[str, str], limit_s: float = LIMIT_S) -> Any:
    """The JSON that a recipe prints last."""
    return json.loads(run(command, env=env, limit_s=limit_s).strip().splitlines()[-1])
