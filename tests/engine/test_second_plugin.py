"""A second plugin on the same functions: both work, whoever is loaded or hooks first."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.plugin_folder import plugin_path
from tests.engine import scenario, second_plugin
from tests.engine.conftest import COMMON, MARKER
from tests.engine.server import Server, cpu_env
from tests.engine.test_fill import joined
from tests.engine.test_groups import DECIDE, PAPER, PRUNE, ask, group_of, states

PARSE = """
import json, sys
from sglang.srt.plugins import load_plugins
from sglang.srt.plugins.hook_registry import HookRegistry
loaded = []
register = HookRegistry.register.__func__
def noted(cls, target, hook, *args, **kwargs):
    loaded.append(hook.__module__.partition(".")[0])
    return register(cls, target, hook, *args, **kwargs)
HookRegistry.register = classmethod(noted)
load_plugins()
from sglang.srt.server_args import prepare_server_args
args = prepare_server_args(["--model-path", sys.argv[1], "--device", "cpu", "--enable-deepprune",
                            "--deepprune-window", "9", "--second-flag", "7"])
print("FOUND", json.dumps([loaded[0], args._second_flag, args._deepprune.config.window]))
"""
OURS = "sglang_deepprune.patches:register"


@pytest.mark.parametrize(
    "first", ["sglang_deepprune", pytest.param("tests", marks=pytest.mark.modes)]
)
def test_both_plugins_have_their_flags_whichever_is_loaded_first(
    tiny: Path, tmp_path: Path, first: str
):
    # Plugins load in the order of the path; of a name that comes twice, the first place counts.
    folders = [
        plugin_path(tmp_path / "ours", "deepprune", OURS),
        second_plugin.plugin_env(tmp_path / "theirs"),
    ]
    env = joined(*(folders if first == "sglang_deepprune" else folders[::-1]))
    done = subprocess.run(
        [sys.executable, "-c", PARSE, str(tiny)], env=cpu_env(env), cwd=tmp_path,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    found = [line[6:] for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert found, done.stderr[-2000:]
    assert json.loads(found[0]) == [first, 7, 9]


# Of every request, or of every group.
CALLED = {
    "TokenizerManager._handle_batch_request", "TokenizerManager._send_one_request",
    "TokenizerManager._wait_one_response",
    "OpenAIServingCompletion._build_completion_response",
    "Scheduler.init_model_worker", "Scheduler._add_request_to_queue",
    "Scheduler.process_input_requests", "Scheduler._get_new_batch_prefill_raw",
    "Scheduler.update_running_batch",
    "SchedulerBatchResultProcessor.process_batch_result_decode",
    "SchedulerBatchResultProcessor.process_batch_result_prefill",
    "SchedulerOutputStreamer.stream_output", "ModelRunner.sample",
}  # fmt: skip

SCRIPTED = {"Scheduler._add_request_to_queue", "ModelRunner.sample"}


@pytest.mark.modes
@pytest.mark.parametrize("when", ["early", "late"])
def test_hooks_of_a_second_plugin_run_beside_ours_whoever_hooked_first(
    tiny: Path, scripts_env: Any, tmp_path: Path, when: str
):
    env = joined(scripts_env, second_plugin.plugin_env(tmp_path, when))
    with Server(tiny, *COMMON, *MARKER, env=env) as server:
        outputs = ask(server, PRUNE, 8, PAPER)
        assert states(outputs) == ["finished", "finished", *["pruned"] * 6]
        assert [output["text"] for output in outputs[:2]] == scenario.PROMPTS[PRUNE][:2]
        body = {"model": "m", "prompt": DECIDE, "n": 12, "max_tokens": 400, "temperature": 1.0,
                "custom_params": {"deepprune": {"preset": "latency"}}}  # fmt: skip
        record = server.post("/v1/completions", body).json()["metadata"]["deepprune"]
        assert record["answer"] == "7" and record["reason"].startswith("decided")
        assert group_of(ask(server, DECIDE, 12, {"preset": "balanced"}))["answer"] == "7"
        server.wait_idle()
        assert set(server.log_lines("deepprune-tables")[-1].values()) == {0}
        assert "Failed to apply hooks" not in server.log and "Traceback" not in server.log
        ran = {(line["seam"], line["kind"]) for line in server.log_lines("second-plugin")}
    # SGLang passes over what a plugin has patched through its registry, as the scripted one has.
    called = CALLED - (SCRIPTED if when == "late" else set())
    missing = {(name, kind) for name in called for kind in ("around", "after")} - ran
    assert not missing
