"""What a language model judge may take: told before it starts, kept to, and taken first."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_deepprune.config import ConfigError, DeepPruneConfig
from sglang_deepprune.judges import attention, memory
from sglang_deepprune.judges.llm import LLMJudge
from sglang_deepprune.judges.memory import (
    Room,
    check_memory,
    needed,
    num_weights,
    token_bytes_of,
    weight_files,
)
from sglang_deepprune.judging import JudgeWorker
from sglang_deepprune.types import JudgeTask, Pair, Trace
from tests import lm_judge

MIB = 1 << 20
SIZES = {"hidden_size": 2560, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
         "num_hidden_layers": 36, "intermediate_size": 9728}  # fmt: skip
FOUR_BILLION = 4_022_468_096


@pytest.fixture(scope="module")
def base(tmp_path_factory: Any) -> Path:
    return lm_judge.make_base(tmp_path_factory.mktemp("lm"))


def config(base: Path | str, **settings: Any) -> DeepPruneConfig:
    return DeepPruneConfig(enable=True, judge=f"llm:{base}", **settings)


@pytest.mark.parametrize("pass_tokens", [memory.MIN_PASS_TOKENS, 3000, memory.PASS_TOKENS])
@pytest.mark.parametrize("on_gpu", [True, False])
@pytest.mark.parametrize("workspace", [0, 256 * MIB])
def test_what_is_said_to_be_needed_is_enough_and_no_byte_is_used_twice(
    pass_tokens, on_gpu, workspace
):
    token_bytes = token_bytes_of(SIZES, 2)
    total = workspace + needed(2 * FOUR_BILLION, token_bytes, pass_tokens, on_gpu=on_gpu)
    room = Room.of(total, 2 * FOUR_BILLION, token_bytes, on_gpu=on_gpu, workspace=workspace)
    assert room.pass_tokens >= pass_tokens and room.cache <= memory.CACHE_BYTES
    aside = workspace + (memory._CONTEXT_BYTES if on_gpu else 0)
    assert room.weights + room.cache + room.pass_tokens * token_bytes + aside <= total


def test_too_little_is_refused_with_what_it_takes():
    with pytest.raises(ValueError, match=r"needs \d+ MiB at least \(7673 of them weights\)"):
        Room.of(8000 * MIB, 2 * FOUR_BILLION, token_bytes_of(SIZES, 2), on_gpu=True)


def test_weights_are_counted_from_the_files_headers(base: Path):
    assert num_weights(base) == sum(one.numel() for one in LLMJudge(str(base)).model.parameters())
    assert num_weights(base / "none") is None


@pytest.mark.parametrize("shard", ["10KB", "1GB"])
def test_files_that_transformers_does_not_load_are_not_counted(tmp_path: Path, shard: str):
    """Mistral's folders hold their weights twice; a training may leave its adapter behind."""
    model = LLMJudge(str(lm_judge.make_base(tmp_path / "base"))).model
    model.save_pretrained(tmp_path, max_shard_size=shard)
    own = sorted(path.name for path in tmp_path.glob("model*.safetensors"))
    assert (len(own) > 1) == (shard == "10KB")
    for other in ("consolidated.safetensors", "adapter_model.safetensors"):
        shutil.copy(tmp_path / own[0], tmp_path / other)
    assert num_weights(tmp_path) == sum(one.numel() for one in model.parameters())
    assert [path.name for path in weight_files(tmp_path)] == own
    (tmp_path / own[0]).unlink()
    assert num_weights(tmp_path) is None


def test_a_server_refuses_before_it_starts(base: Path):
    with pytest.raises(ConfigError, match="judge_mem.*MiB at least.*raise it"):
        check_memory(config(base, judge_mem=1))
    with pytest.raises(ConfigError, match="leave no room for the server on a GPU of 100 MiB"):
        check_memory(config(base, judge_mem=2000, judge_device="cuda:0"), 100.0)
    with pytest.raises(ConfigError, match="size of this judge is not known"):
        check_memory(config("THU-KEG/DeepPrune-Judge-4B", judge_device="cuda"), 80_000.0)
    with pytest.raises(ConfigError, match="runs no language model here"):
        check_memory(DeepPruneConfig(enable=True, judge="belief", judge_mem=100))


def test_on_a_gpu_it_takes_what_it_needs_unless_told(base: Path):
    on_gpu = config(base, judge_device="cuda:0")
    own = check_memory(on_gpu, 80_000.0)
    assert 500 < own < 3000  # a small model: CUDA's context and the cache are most of it
    assert check_memory(config(base, judge_device="cuda:0", judge_mem=own + 1), 80_000.0) == own + 1
    assert check_memory(config(base)) == 0
    assert check_memory(config("THU-KEG/DeepPrune-Judge-4B", judge_mem=9000)) == 9000


def test_flashinfers_workspaces_are_part_of_the_number(base: Path, monkeypatch):
    usual = check_memory(config(base, judge_device="cuda:0"), 80_000.0)
    on_gpu = config(base, judge_device="cuda:0", judge_attention="flashinfer")
    assert check_memory(on_gpu, 80_000.0) == usual + 2 * 128
    with pytest.raises(ConfigError, match="MiB at least"):
        check_memory(replace(on_gpu, judge_mem=600), 80_000.0)
    monkeypatch.setenv(memory.ENV, "300")
    model = LLMJudge(str(base)).model
    plain = memory.take(model)
    monkeypatch.setenv(attention.ENV, attention.FLASHINFER)
    beside = memory.take(model)
    assert plain is not None and beside is not None and beside.cache < plain.cache - 60 * MIB


def test_a_judge_keeps_to_its_number(base: Path, monkeypatch: pytest.MonkeyPatch):
    usual = LLMJudge(str(base))
    assert usual.pass_tokens == memory.PASS_TOKENS and usual.packed is not None
    assert usual.packed.prefixes.max_bytes == memory.CACHE_BYTES
    monkeypatch.setenv(memory.ENV, "8")
    small = LLMJudge(str(base))
    assert small.packed is not None and small.pass_tokens < memory.PASS_TOKENS
    assert small.packed.prefixes.max_bytes < 3 * MIB
    left, right = Trace(0, "so it is east " * 40, 4, "tokens"), Trace(1, "west", 4, "tokens")
    pairs = [Pair(left, right)] * 3
    assert small.score(pairs) == pytest.approx(usual.score(pairs), abs=1e-5)
    monkeypatch.setenv(memory.ENV, "1")
    with pytest.raises(ValueError, match="MiB at least"):
        LLMJudge(str(base))


def test_no_prompt_is_longer_than_the_pass_that_memory_was_planned_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    base = lm_judge.make_base(tmp_path)
    place = base / "config.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | {"max_position_embeddings": 8192}))
    left, right = (Trace(i, "so it is east " * 900, 4, "tokens") for i in range(2))
    (usual,) = LLMJudge(str(base)).prompts.write([Pair(left, right)])
    monkeypatch.setenv(memory.ENV, "8")
    judge = LLMJudge(str(base))
    (prompt,) = judge.prompts.write([Pair(left, right)])
    assert len(prompt.prefix) + len(prompt.rest) <= judge.pass_tokens
    assert judge.pass_tokens < len(usual.prefix) + len(usual.rest)


def test_a_judge_on_a_gpu_is_loaded_before_the_servers_model(monkeypatch: pytest.MonkeyPatch):
    from sglang_deepprune.patches import build, hooks, server_args

    order: list[str] = []

    class Worker:
        def start(self) -> None:
            order.append("start")

        def wait_loaded(self) -> bool:
            order.append("loaded")
            return True

    monkeypatch.setattr(build, "_worker", lambda config: Worker())
    monkeypatch.setattr(build, "_early", None)
    ranks = SimpleNamespace(attn_tp_rank=0, attn_cp_rank=0, pp_rank=0)
    for device, rank, wanted in (("cuda:0", 0, ["start", "loaded", "model"]),
                                 ("cuda:0", 1, ["model"]), ("cpu", 0, ["model"])):  # fmt: skip
        found = DeepPruneConfig(enable=True, judge="llm:x", judge_device=device)
        monkeypatch.setattr(server_args, "config_of", lambda _, found=found: found)
        ranks.attn_tp_rank = rank
        order.clear()
        scheduler = SimpleNamespace(server_args=None, ps=ranks)
        hooks.init_model_worker(lambda self: order.append("model"), scheduler)
        assert order == wanted


def test_a_judge_that_cannot_load_before_the_server_is_off(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "none"}))
    worker = JudgeWorker(f"llm:{tmp_path}", 20.0)
    worker.start()
    assert not worker.wait_loaded() and worker.is_disabled
    worker.submit(JudgeTask("g", 0, (), (), (), 0.5, 32, 10, 0))
    (result,) = worker.poll()
    assert result.error is not None and "could not load" in result.error
    worker.close()
