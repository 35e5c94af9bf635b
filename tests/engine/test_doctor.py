"""doctor and SGLang itself: each fault in a process that really has it, mostly without a server.

A sound live server is looked at in test_groups.py.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from benchmarks.plugin_folder import plugin_path
from sglang_deepprune.patches import support
from tests.engine.conftest import COMMON
from tests.engine.server import ROOT, Server, cpu_env
from tests.engine.test_parallel import CORES

RENAMES = """
def register():
    from sglang.srt.managers.scheduler import Scheduler

    Scheduler.update_batch_that_runs = Scheduler.update_running_batch
    del Scheduler.update_running_batch
"""
RAISES = """
def register():
    raise RuntimeError("a wheel is broken")
"""
MANY = """
import json, os, sys
from sglang_deepprune.patches import preflight

for env, argv in json.loads(sys.argv[1]):
    os.environ.update(env)
    found = []
    preflight.check(lambda *finding: found.append(finding), argv)
    for name in env:
        del os.environ[name]
    print("FOUND", json.dumps(found), flush=True)
"""


def doctor(*words: str, python: tuple[str, ...] = (), **env: str) -> tuple[int, dict[str, Any]]:
    """Exit code, and check -> [(state, sentence)], of the command in a process of its own."""
    done = subprocess.run(
        [sys.executable, *python, "-m", "sglang_deepprune.cli", "doctor", "--json", *words],
        env=cpu_env({"SGLANG_PLUGINS": "", **env}), capture_output=True, text=True, timeout=300,
        cwd=tempfile.gettempdir(),
    )  # fmt: skip
    assert done.stdout.startswith("{"), done.stderr[-3000:]
    return done.returncode, by_check(
        (one["check"], one["state"], one["sentence"]) for one in json.loads(done.stdout)["findings"]
    )


def by_check(findings: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for check, state, sentence in findings:
        found.setdefault(check, []).append((state, sentence))
    return found


def faults(found: dict[str, Any]) -> dict[str, str]:
    """check -> sentence; each of these tests has one fault a check."""
    return {
        check: sentence
        for check, rows in found.items()
        for state, sentence in rows
        if state == "fault"
    }


def installed(folder: Path, name: str, version: str) -> str:
    """PYTHONPATH on which another version of a package is found first: its metadata alone."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n"
    )
    return os.pathsep.join(part for part in (str(folder), os.environ.get("PYTHONPATH")) if part)


def test_a_start_that_works_has_no_fault(tiny: Path, tmp_path: Path):
    config = tmp_path / "server.yaml"
    config.write_text("enable-deepprune: true\ndeepprune-preset: paper\n")
    code, found = doctor(
        "--", "sglang", "serve", str(tiny), "--device", "cpu", "--config", str(config)
    )
    assert code == 0 and faults(found) == {}
    assert found["seams"][0][1].startswith("all ") and found["flag"][0][0] == "ok"
    assert "paper, cut at words 25" in found["preset"][0][1]
    assert found["judge"] == [("ok", "judge similarity (prunes under `paper` alone: no card allows "
                               "more)")]  # fmt: skip
    assert re.search(r"travel on server_args: \d+ in each tokenizer process", found["start"][0][1])
    assert "tokenizer workers: activated by the settings" in found["processes"][0][1]
    assert {"gpu", "triton"} <= set(found)


@pytest.mark.modes
def test_flags_and_settings_that_do_not_fit_are_named_before_a_start(tiny: Path, tmp_path: Path):
    base = ["--model-path", str(tiny), "--device", "cpu", "--enable-deepprune"]
    weights = tmp_path / "mine.json"
    weights.write_text("{}")
    cases: list[tuple[dict[str, str], list[str], str, str]] = [
        ({}, ["--deepprune-judge", "belief:/nowhere/b.json"], "judge",
         "no file '/nowhere/b.json'; give belief an existing path"),
        ({}, ["--deepprune-judge", "belief", "--deepprune-judge-card", "/nowhere/card.json"],
         "card", "no file '/nowhere/card.json'; make one by eval-judge --card"),
        ({}, ["--deepprune-judge", "belief", "--deepprune-judge-card", str(weights)],
         "card", "mine.json is no judge's card"),
        ({}, ["--deepprune-judge", "probe-server:http://h:1"], "judge", "use probe"),
        ({}, ["--deepprune-judge", "probe", "--speculative-algorithm", "EAGLE"], "judge",
         "speculative decoding keeps KV where a fork does not find it"),
        ({}, ["--deepprune-judge-device", "gpu"], "settings", "expected cpu or cuda:N"),
        ({}, ["--deepprune-window", "0"], "settings",
         "deepprune.window: expected 1 to 4096, got 0; change --deepprune-window"),
        ({}, ["--deepprune-window", "many"], "parse", "invalid int value: 'many'"),
        ({}, ["--deepprune-windows", "8"], "parse", "unrecognized arguments: --deepprune-windows"),
        ({"SGLANG_RUST_SERVER": "1"}, [], "mode", "SGLANG_RUST_SERVER: the Rust front end"),
        ({"SGLANG_RUST_SERVER": "y"}, [], "mode", "SGLANG_RUST_SERVER: the Rust front end"),
        ({}, ["--disaggregation-mode", "prefill"], "mode", "--disaggregation-mode"),
    ]  # fmt: skip
    runs: list[tuple[dict[str, str], list[str] | None]] = [
        (env, base + a) for env, a, _, _ in cases
    ]
    runs += [
        ({}, [*base, "--deepprune-judge", f"belief:{weights}"]),
        ({}, [*base[:-1], "--deepprune-preset", "faithful"]),
        ({"SGLANG_RUST_SERVER": "1"}, None),
    ]
    done = subprocess.run(
        [sys.executable, "-c", MANY, json.dumps(runs)], env=cpu_env({"SGLANG_PLUGINS": ""}),
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    lines = [line[6:] for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert len(lines) == len(runs), done.stderr[-3000:]
    results = [by_check(json.loads(line)) for line in lines]
    for (_, argv, check, said), found in zip(cases, results, strict=False):
        named = faults(found)
        assert list(named) == [check], (argv, named)
        assert said in named[check], (argv, named)
    uncarded, off, bare = results[len(cases) :]
    assert faults(uncarded) == {} and uncarded["card"][0][0] == "warning"
    assert (
        "it has no card at" in uncarded["card"][0][1] and "mine.card.json" in uncarded["card"][0][1]
    )
    assert off["parse"][0][0] == "warning" and "add --enable-deepprune" in off["parse"][0][1]
    assert faults(off) == {} and "start" not in off
    assert list(faults(bare)) == ["mode"]


def test_a_plugin_that_is_not_whitelisted_is_named():
    code, found = doctor(SGLANG_PLUGINS="someone_else")
    assert code == 1 and list(faults(found)) == ["whitelist", "flag"]
    assert "SGLANG_PLUGINS='someone_else'" in faults(found)["whitelist"]
    assert "the plugin was not loaded" in faults(found)["flag"]


def test_a_plugin_that_raises_at_load_is_named(tmp_path: Path):
    """SGLang logs that and starts without it."""
    (tmp_path / "broken_wheel.py").write_text(RAISES)
    path = installed(tmp_path, "sglang_deepprune", "0.0.9")
    (tmp_path / "sglang_deepprune-0.0.9.dist-info" / "entry_points.txt").write_text(
        "[sglang.srt.plugins]\ndeepprune = broken_wheel:register\n"
    )
    code, found = doctor(PYTHONPATH=path)
    assert code == 1 and list(faults(found)) == ["plugin", "flag"]
    assert "RuntimeError: a wheel is broken" in faults(found)["plugin"]
    assert "does not know --enable-deepprune" in faults(found)["flag"]
    assert "SGLang only logs it" in faults(found)["plugin"]
    assert "reinstall" in faults(found)["plugin"]


@pytest.mark.modes
def test_a_newer_sglang_with_a_renamed_seam_is_named(tmp_path: Path):
    (tmp_path / "later.py").write_text(RENAMES)
    path = installed(tmp_path, "sglang", "0.5.99")
    env = plugin_path(tmp_path, "later", "later:register")
    code, found = doctor(PYTHONPATH=os.pathsep.join((path, env["PYTHONPATH"])))
    assert code == 1 and list(faults(found)) == ["seam"]
    sentence = faults(found)["seam"]
    assert "sglang.srt.managers.scheduler.Scheduler.update_running_batch is not there" in sentence
    assert f"supported: {support.WINDOW}; install one of these" in sentence
    assert found["version"][0][0] == "warning" and "0.5.99 is newer" in found["version"][0][1]


@pytest.mark.modes
def test_an_older_sglang_is_named(tmp_path: Path):
    code, found = doctor(PYTHONPATH=installed(tmp_path, "sglang", "0.5.14"))
    assert code == 1 and f"older than {support.OLDEST}" in faults(found)["version"]


def test_a_missing_sglang_is_named():
    """Without site-packages there is none; nor is there anything else that is installed."""
    code, found = doctor(python=("-S",), PYTHONPATH=str(ROOT))
    assert code == 1 and "no SGLang is installed" in faults(found)["version"]


@pytest.mark.modes
def test_an_sglang_that_does_not_import_is_named(tmp_path: Path):
    (tmp_path / "sglang").mkdir()
    (tmp_path / "sglang" / "__init__.py").write_text("import a_wheel_that_is_missing\n")
    path = os.pathsep.join((str(tmp_path), os.environ.get("PYTHONPATH", "")))
    code, found = doctor(PYTHONPATH=path)
    assert code == 1 and list(faults(found)) == ["import"]
    assert "No module named 'a_wheel_that_is_missing'" in faults(found)["import"]


@pytest.mark.parametrize("words", [("--url", "http://127.0.0.1:9", "--", "--x"), ("--nonsense",)])
def test_wrong_usage_ends_with_2(words: tuple[str, ...]):
    done = subprocess.run(
        [sys.executable, "-m", "sglang_deepprune.cli", "doctor", *words],
        env=cpu_env(), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2 and "error: " in done.stderr and not done.stdout


@pytest.mark.modes
def test_every_data_parallel_rank_tells_of_itself(tiny: Path):
    with Server(tiny, *COMMON, "--dp", "2", env=CORES) as server:
        code, found = doctor("--url", server.url)
    assert code == 0 and faults(found) == {}, found
    assert "is on in 2 of 2 ranks" in found["plugin"][0][1]


@pytest.mark.modes
def test_a_live_server_without_the_flag_is_named(tiny: Path):
    with Server(tiny) as server:
        code, found = doctor("--url", server.url)
    assert code == 1 and list(faults(found)) == ["plugin"]
    assert "off on this server; start it with --enable-deepprune" in faults(found)["plugin"]
    assert found["version"][0][0] == found["model"][0][0] == "ok"
