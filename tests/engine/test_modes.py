"""Ways to start: command line, YAML, tokenizer processes, Engine, flag off, refusals (D7)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.engine import scenario
from tests.engine.server import CPU_FLAGS, Server, cpu_env
from tests.engine.test_groups import PAPER, PRUNE, states
from tests.engine.versions import before, dllm

PARSE = """
import json, sys
sys.stderr = sys.stdout
from sglang.srt.plugins import load_plugins
from sglang.srt.plugins.hook_registry import HookRegistry
load_plugins()
from sglang.srt.server_args import prepare_server_args
for argv in json.loads(sys.argv[1]):
    print("ARGV", flush=True)
    try:
        args = prepare_server_args(["--model-path", {model!r}, "--device", "cpu", *argv])
        print("ok", hasattr(args, "_deepprune"), sorted(HookRegistry._patched), flush=True)
    except SystemExit as exit:
        print("exit", exit.code, flush=True)
    except Exception as error:
        print("raised", type(error).__name__, error, flush=True)
"""


def parse(tiny: Path, *argvs: list[str], env: dict[str, str] | None = None) -> list[list[str]]:
    """What SGLang's own parser says to each argument list, in one fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", PARSE.format(model=str(tiny)), json.dumps(argvs)],
        env=cpu_env(env), capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    said = [part.splitlines() for part in done.stdout.split("ARGV\n")[1:]]
    assert len(said) == len(argvs), done.stdout[-2000:] + done.stderr[-2000:]
    return said


def test_flag_off_hooks_the_parser_and_nothing_else(tiny: Path):
    (said,) = parse(tiny, [])
    (line,) = [line for line in said if line.startswith("ok")]
    assert line.startswith("ok False")
    assert line.count("sglang.srt.") == 2
    assert "ServerArgs.add_cli_args" in line and "ServerArgs.from_cli_args" in line


REFUSED: dict[str, tuple[list[str], str]] = {
    "pipeline": (["--pp-size", "2"], "--pp-size: pipeline stages see a verdict at different steps"),
    "prefill": (
        ["--disaggregation-mode", "prefill"],
        "--disaggregation-mode: prefill/decode disaggregation moves KV between servers",
    ),
    "decode": (["--disaggregation-mode", "decode"], "--disaggregation-mode"),
    "grpc": (["--grpc-mode"], "--smg-grpc-mode: its servicer fans n>1 out itself"),
    "pdmux": (["--enable-pdmux"], "--enable-pdmux: its loop runs prefill and decode side by side"),
    "streaming-session": (
        ["--enable-streaming-session"],
        "--enable-streaming-session: such sessions keep the KV row of a finished request",
    ),
    "dllm": (
        ["--dllm-algorithm", "LowConfidence"],
        "--dllm-algorithm: diffusion LLMs have no decode step to stop at",
    ),
    "skip-tokenizer-init": (
        ["--skip-tokenizer-init"],
        "--skip-tokenizer-init: answers are read from text, so a tokenizer is needed",
    ),
    "probe-speculative": (
        ["--deepprune-judge", "probe", "--speculative-algorithm", "NGRAM"],
        "deepprune.judge: probe does not work here: ",
    ),
    "window": (["--deepprune-window", "0"], "deepprune.window: expected 1 to 4096, got 0"),
    "judge": (["--deepprune-judge", "nobody"], "deepprune.judge: unknown judge 'nobody'"),
    "oracle": (["--deepprune-judge", "oracle:/no/such/file"], "deepprune.judge"),
}
NEVER_RUN: dict[str, tuple[list[str], str]] = {
    "lora": (
        ["--enable-lora", "--max-lora-rank", "8", "--lora-target-modules", "q_proj"],
        "--enable-lora",
    ),
    "speculative": (["--speculative-algorithm", "NGRAM"], "--speculative-algorithm"),
    "deterministic": (["--enable-deterministic-inference"], "--enable-deterministic-inference"),
    "strict-thinking": (["--enable-strict-thinking"], "--enable-strict-thinking"),
    "experts": (["--enable-return-routed-experts"], "--enable-return-routed-experts"),
    "hicache": (["--enable-hierarchical-cache"], "--enable-hierarchical-cache"),
    "two": (
        ["--enable-hierarchical-cache", "--speculative-algorithm", "NGRAM"],
        "--speculative-algorithm and --enable-hierarchical-cache",
    ),
    "plain": ([], ""),
}


@pytest.fixture(scope="module")
def said(tiny: Path) -> dict[str, list[str]]:
    """What a start with each of these says. SGLang's imports take most of it: one process."""
    both = {**REFUSED, **NEVER_RUN}
    lines = parse(tiny, *(["--enable-deepprune", *argv] for argv, _ in both.values()))
    return dict(zip(both, lines, strict=True))


def ours_of(said: dict[str, list[str]], mode: str) -> list[str]:
    """What we say; older SGLangs refuse some modes on a CPU by an error of their own, before us."""
    raised = [line for line in said[mode] if line.startswith("raised ")]
    if raised and before("0.5.19"):
        pytest.skip(f"SGLang itself: {raised[0]}")
    return said[mode]


def is_refusal(lines: list[str], sentence: str) -> bool:
    errors = [line for line in lines if line.startswith("error: ")]
    return "exit 2" in lines and len(errors) == 1 and sentence in errors[0]


@pytest.mark.parametrize(
    "mode", [pytest.param(one, marks=dllm if one == "dllm" else ()) for one in REFUSED]
)
def test_what_is_not_proven_is_refused_with_one_sentence(said: dict[str, list[str]], mode: str):
    lines = ours_of(said, mode)
    assert is_refusal(lines, REFUSED[mode][1]), lines


def test_the_rust_front_end_is_refused_with_one_sentence(tiny: Path):
    (lines,) = parse(tiny, ["--enable-deepprune"], env={"SGLANG_RUST_SERVER": "1"})
    assert is_refusal(lines, "SGLANG_RUST_SERVER: the Rust front end has none of our Python hooks")


@pytest.mark.parametrize("mode", list(NEVER_RUN))
def test_what_was_never_run_is_named_once_at_start(said: dict[str, list[str]], mode: str):
    lines, named = ours_of(said, mode), NEVER_RUN[mode][1]
    assert any(line.startswith("ok True") for line in lines), lines[-3:]
    found = [line for line in lines if "deepprune has not been run with" in line]
    assert len(found) == bool(named)
    assert all(f"has not been run with {named} yet" in line for line in found)


def test_where_the_plugin_is_not_loaded_the_flag_is_unknown(tiny: Path):
    (lines,) = parse(tiny, ["--enable-deepprune"], env={"SGLANG_PLUGINS": "someone_else"})
    assert "exit 2" in lines
    assert any("unrecognized arguments: --enable-deepprune" in line for line in lines)


@pytest.mark.modes
def test_serve_with_yaml_and_two_tokenizer_processes(tiny: Path, scripts_env: Any, tmp_path: Path):
    config = tmp_path / "server.yaml"
    config.write_text(
        "enable-deepprune: true\ndeepprune-window: 8\ndeepprune-log-steps: true\n"
        "deepprune-judge: python:tests.marker_judge:make\n"
    )
    sglang = str(Path(sys.executable).parent / "sglang")
    flags = ("--config", str(config), "--tokenizer-worker-num", "2")
    with Server(tiny, *flags, env=scripts_env, command=(sglang, "serve")) as server:
        assert "deepprune" in server.log and "is active" in server.log
        for _ in range(4):  # either worker may take it
            body = {"text": PRUNE, "sampling_params": {
                "n": 8, "max_new_tokens": 400, "custom_params": {"deepprune": PAPER}}}  # fmt: skip
            outputs = server.post("/generate", body).json()
            assert states(outputs) == ["finished", "finished", *["pruned"] * 6]
        bad = {**body, "sampling_params": {"n": 2, "custom_params": {"deepprune": {"x": 1}}}}
        assert server.post("/generate", bad).status_code == 400


ENGINE = """
import asyncio, json, sys
import sglang


async def asynchronous(engine, prompt, settings):
    # Two calls at once, and a stream.
    params = {"n": 8, "max_new_tokens": 400, "temperature": 1.0,
              "custom_params": {"deepprune": settings}}
    both = await asyncio.gather(*(engine.async_generate(prompt, params) for _ in range(2)))
    for outputs in both:
        print("ASYNC", json.dumps(outputs))
    last = {}
    async for chunk in await engine.async_generate(prompt, params, stream=True):
        last[chunk["index"]] = chunk
    print("STREAM", json.dumps([last[index] for index in range(8)]))


if __name__ == "__main__":
    model, prompt, settings, flags = json.loads(sys.argv[1])
    engine = sglang.Engine(model_path=model, enable_deepprune=True, deepprune_window=8,
                           deepprune_judge="python:tests.marker_judge:make", **flags)
    outputs = engine.generate(prompt, {"n": 8, "max_new_tokens": 400, "temperature": 1.0,
                                       "custom_params": {"deepprune": settings}})
    print("RESULT", json.dumps(outputs))
    engine.loop.run_until_complete(asynchronous(engine, prompt, settings))
    try:
        sglang.Engine(model_path=model, enable_deepprune=True, deepprune_window=0, **flags)
    except Exception as error:
        print("REFUSED", error)
    engine.shutdown()
"""


def test_engine_takes_the_settings_as_keywords(tiny: Path, scripts_env: Any, tmp_path: Path):
    script = tmp_path / "offline.py"
    script.write_text(ENGINE)
    pairs = zip(CPU_FLAGS, [*CPU_FLAGS[1:], ""], strict=True)
    flags: dict[str, Any] = {
        flag[2:].replace("-", "_"): value
        for flag, value in pairs
        if flag.startswith("--") and not value.startswith("--")
    }
    flags["disable_cuda_graph"], flags["max_total_tokens"] = True, 20000
    flags["mem_fraction_static"] = 0.2
    done = subprocess.run(
        [sys.executable, str(script), json.dumps([str(tiny), PRUNE, PAPER, flags])],
        env=cpu_env(scripts_env), capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    found = {
        kind: [
            json.loads(line.removeprefix(f"{kind} "))
            for line in lines
            if line.startswith(f"{kind} ")
        ]
        for kind in ("RESULT", "ASYNC", "STREAM")
    }
    assert [len(some) for some in found.values()] == [1, 2, 1], done.stderr[-2000:]
    for outputs in found["RESULT"] + found["ASYNC"] + found["STREAM"]:
        assert states(outputs) == ["finished", "finished", *["pruned"] * 6]
        assert [output["text"] for output in outputs[:2]] == scenario.PROMPTS[PRUNE][:2]
    assert "REFUSED deepprune.window: expected 1 to 4096, got 0" in done.stdout


SEAMS = """
import dataclasses, json
from sglang_deepprune.patches import seams
seams.check(seams.PARSER + seams.TOKENIZER + seams.SCHEDULER)
refused = []
for change in ({"name": "Scheduler.no_such_method"}, {"needs": ("self", "no_such_parameter")}):
    try:
        seams.check([dataclasses.replace(seams.SCHEDULER[1], **change)])
    except Exception as error:
        refused.append(str(error))
print("FOUND", json.dumps({"refused": refused, "table": seams.table()}))
"""


@pytest.fixture(scope="module")
def checked_seams() -> dict[str, Any]:
    """The installed SGLang's seams hold; what is said of two that do not; the table of them."""
    done = subprocess.run(
        [sys.executable, "-c", SEAMS], env=cpu_env(), capture_output=True, text=True, timeout=120
    )
    found = [line[6:] for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert found, done.stderr[-2000:]
    checked: dict[str, Any] = json.loads(found[0])
    return checked


def test_a_seam_that_does_not_fit_stops_the_start(checked_seams: dict[str, Any]):
    gone, changed = checked_seams["refused"]
    assert "is not there" in gone and "has the parameters" in changed
    for sentence in (gone, changed):
        assert "supported: SGLang 0.5.15 to 0.5.23" in sentence


def test_the_docs_hold_the_seam_table(checked_seams: dict[str, Any]):
    page = Path(__file__).resolve().parents[2] / "docs" / "design.md"
    assert checked_seams["table"] and checked_seams["table"] in page.read_text()


def test_a_plugin_that_patched_first_keeps_working(tiny: Path, scripts_env: Any):
    """benchmarks.scripted wraps two of our seams; here its hooks are applied before ours."""
    code = f"""
import os
os.environ.update({json.dumps({k: v for k, v in scripts_env.items() if k != "PYTHONPATH"})})
from benchmarks import scripted
from sglang.srt.plugins.hook_registry import HookRegistry
scripted.register(); HookRegistry.apply_hooks()
from sglang_deepprune.patches import hooks, seams
seams.install(seams.rows(seams.SCHEDULER), hooks.TABLE)
seams.check(seams.SCHEDULER, hooks.TABLE)
import inspect
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.model_executor.model_runner import ModelRunner
for function in (Scheduler._add_request_to_queue, ModelRunner.sample):
    depth = 0
    while hasattr(function, "__wrapped__"):
        function, depth = function.__wrapped__, depth + 1
    assert depth == 2, depth
print("both")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=cpu_env({"PYTHONPATH": os.environ.get("PYTHONPATH", "")}),
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.stdout.strip().endswith("both"), done.stderr[-2000:]
