"""Modes that do not start without a GPU, ready to run where there is one.

Small random models, made here; the one thing to bring is a vision model's folder, whose processor
cannot be made up (`DEEPPRUNE_TEST_VLM`). `--attention-backend triton`: our tiny heads are narrower
than what the other kernels take.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
from transformers import AutoTokenizer

from sglang_deepprune.answers import extract
from sglang_deepprune.local_server import has_gpu
from sglang_deepprune.reasoner import model_path, questions
from tests.engine import test_cases
from tests.engine.conftest import COMMON, MARKER
from tests.engine.server import Server
from tests.engine.test_groups import DECIDE, PAPER, PRUNE, ask, group_of, states
from tests.engine.test_lazy import LONG, in_background
from tests.engine.test_mode_servers import (
    aborted,
    bad_setting,
    exact_texts,
    freed_slots,
    streams,
    tables,
)
from tests.engine.tiny_model import make_tokenizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.modes,
    pytest.mark.skipif(not has_gpu(), reason="needs a GPU"),
]

GPU = ("--attention-backend", "triton", "--max-total-tokens", "20000", "--mem-fraction-static",
       "0.5")  # fmt: skip
PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGA"
    "WjR9awAAAABJRU5ErkJggg=="
)


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("page1-overlap", ()),  # CUDA graphs
        ("page1-no-overlap", ("--disable-overlap-schedule", "--disable-cuda-graph")),
        ("page64-overlap", ("--page-size", "64")),
    ],
)
def test_groups_on_a_gpu_with_and_without_cuda_graphs(
    tiny: Path, tokenizer: Any, scripts_env: Any, name: str, flags: tuple[str, ...]
):
    with Server(tiny, *COMMON, *MARKER, *GPU, *flags, env=scripts_env) as server:
        server.name = name
        for check in (freed_slots, exact_texts, streams, aborted, bad_setting):
            check(server, tokenizer)
        server.wait_idle()
        tables(server)


def test_deterministic_inference_gives_each_sibling_a_stream_of_its_own():
    """Four texts of one seed, the same again, and the survivors of pruning untouched."""
    flags = ("--enable-deterministic-inference", *GPU)
    with Server(model_path(), *COMMON, *flags) as server:
        test_cases.test_d5_siblings_of_one_seed_differ_and_are_reproducible(server)
        tables(server)


def make_adapter(path: Path, *, hidden: int = 64, rank: int = 8) -> Path:
    """A random adapter for the tiny model's query projections."""
    from safetensors.torch import save_file

    path.mkdir()
    weights = {}
    for layer in range(2):
        stem = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        weights[f"{stem}.lora_A.weight"] = torch.randn(rank, hidden) * 0.1
        weights[f"{stem}.lora_B.weight"] = torch.randn(64, rank) * 0.1
    save_file(weights, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["q_proj"],
              "bias": "none", "task_type": "CAUSAL_LM"}  # fmt: skip
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def lora_ends(server: Server) -> dict[str, Any]:
    """Every way in which a group of an adapter can end; what each is called, and its runner."""

    def said(prompt: str, n: int, settings: Any, **more: Any) -> dict[str, Any]:
        params = {"n": n, "max_new_tokens": 400, "temperature": 1.0,
                  "custom_params": {"deepprune": settings}}  # fmt: skip
        return {"text": prompt, "sampling_params": params, "lora_path": "one", **more}

    def whole(prompt: str, n: int, settings: Any, *expected: str) -> None:
        reply = server.post("/generate", said(prompt, n, settings))
        assert reply.status_code == 200, reply.text
        assert set(expected) <= set(states(reply.json()))

    def left() -> None:
        body = said(LONG, 8, {"preset": "collect"}, stream=True)
        with requests.post(f"{server.url}/generate", json=body, stream=True, timeout=60) as reply:
            next(reply.iter_lines())
        server.wait_idle()

    def stopped() -> None:
        thread, replies = in_background(server, said(LONG, 8, {"preset": "balanced"}, rid="lora"))
        while not thread.is_alive():
            pass
        server.post("/abort_request", {"rid": "lora"})
        thread.join(timeout=60)
        assert replies[0].status_code == 200

    def refused() -> None:
        assert server.post("/generate", said(PRUNE, 2, {"k1": 0})).status_code == 400
        assert server.post("/generate", said(PRUNE, 5000, True)).status_code == 400

    return {
        "pruned": lambda: whole(PRUNE, 8, PAPER, "finished", "pruned"),
        "decided": lambda: whole(DECIDE, 8, {"preset": "latency", "window": 8}, "decided"),
        "never started": lambda: whole(DECIDE, 12, {"preset": "balanced"}, "not_started"),
        "all finished": lambda: whole(PRUNE, 4, {"preset": "collect"}, "finished"),
        "switched off": lambda: server.post("/generate", said(PRUNE, 4, False)),
        "client left": left,
        "aborted": stopped,
        "refused": refused,
    }


def adapters_are_released_once(server: Server, adapter: Path) -> None:
    """SGLang unloads an adapter when the last reference to it is given back: one too few and it
    waits for ever, one too many and its count never meets zero."""
    for name, end in lora_ends(server).items():
        end()
        gone = server.post("/unload_lora_adapter", {"lora_name": "one"}, timeout_s=30)
        assert gone.status_code == 200, (name, gone.text)
        body = {"lora_name": "one", "lora_path": str(adapter)}
        assert server.post("/load_lora_adapter", body).status_code == 200, name
    server.wait_idle()
    tables(server)


def test_a_lora_adapter_is_released_once_however_its_group_ends(
    tiny: Path, scripts_env: Any, tmp_path: Path
):
    adapter = make_adapter(tmp_path / "one")
    flags = ("--enable-lora", "--max-lora-rank", "8", "--lora-target-modules", "q_proj",
             "--lora-paths", f"one={adapter}", "--lora-backend", "triton")  # fmt: skip
    with Server(tiny, *COMMON, *MARKER, *GPU, *flags, env=scripts_env) as server:
        adapters_are_released_once(server, adapter)


def test_speculative_decoding_votes_on_whole_texts():
    """Several tokens a step: votes come as SGLang finishes a sibling, not before."""
    flags = ("--speculative-algorithm", "NGRAM", "--speculative-num-draft-tokens", "4", *GPU)
    with Server(model_path(), *COMMON, *flags) as server:
        for question in questions(seed=11, count=4):
            for preset in ("collect", "balanced", "latency", "paper"):
                outputs = server.generate(
                    question.prompt, n=8, max_new_tokens=500, temperature=1.0,
                    custom_params={"deepprune": {"preset": preset}},
                )  # fmt: skip
                ended = states(outputs)
                found = [extract(o["text"]) for o, e in zip(outputs, ended, strict=True)
                         if e == "finished"]  # fmt: skip
                group = group_of(outputs)
                votes = sum(vote["votes"] for vote in group["votes"])
                assert votes == sum(one is not None for one in found)
                if preset == "collect":
                    assert ended == ["finished"] * 8
        server.wait_idle()
        tables(server)


def test_the_hierarchical_cache_keeps_groups_as_they_are(
    tiny: Path, tokenizer: Any, scripts_env: Any
):
    flags = ("--enable-hierarchical-cache", "--hicache-size", "1")
    with Server(tiny, *COMMON, *MARKER, *GPU, *flags, env=scripts_env) as server:
        for check in (exact_texts, streams, aborted):
            check(server, tokenizer)
        server.wait_idle()
        tables(server)


def test_a_strict_thinking_budget_holds_for_each_sibling(tiny: Any, tmp_path: Path):
    """`--enable-strict-thinking`: the budget is a grammar of SGLang's over the thinking."""
    model = tmp_path / "thinker"
    shutil.copytree(tiny, model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["<think>", "</think>"], special_tokens=True)
    tokenizer.save_pretrained(model)
    end = tokenizer.convert_tokens_to_ids("</think>")
    flags = ("--enable-strict-thinking", "--reasoning-parser", "qwen3", *GPU)
    with Server(model, *COMMON, *flags) as server:
        params = {"n": 6, "max_new_tokens": 24, "temperature": 1.0,
                  "custom_params": {"deepprune": {"preset": "balanced"}}}  # fmt: skip
        body = {"text": "hello", "sampling_params": params, "require_reasoning": True,
                "max_thinking_tokens": 5}  # fmt: skip
        reply = server.post("/generate", body)
        assert reply.status_code == 200, reply.text
        outputs = reply.json()
        assert group_of(outputs)["size"] == 6
        for output in outputs:
            assert end in output["output_ids"][:7], output["output_ids"]
        server.wait_idle()
        tables(server)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_attention_dp_keeps_a_group_on_one_rank(tiny: Path, scripts_env: Any):
    flags = ("--tp-size", "2", "--attn-dp-size", "2")
    with Server(tiny, *COMMON, *MARKER, *GPU, *flags, env=scripts_env) as server:
        ranks: Counter[int] = Counter()
        for _ in range(6):
            outputs = ask(server, PRUNE, 8, PAPER)
            assert states(outputs) == ["finished", "finished", *["pruned"] * 6]
            (rank,) = {output["meta_info"]["dp_rank"] for output in outputs}
            ranks[rank] += 1
        assert set(ranks) == {0, 1}
        tables(server)


def make_moe(path: Path) -> Path:
    """A two-layer mixture of four experts, of random weights."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    tokenizer = make_tokenizer(["wait thus since the answer is \\boxed{15}"])
    tokenizer.save_pretrained(path)
    config = Qwen3MoeConfig(
        vocab_size=512, hidden_size=256, intermediate_size=256, moe_intermediate_size=128,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
        num_experts=4, num_experts_per_tok=2, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        max_position_embeddings=4096,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return path


def test_routed_experts_come_with_every_choice_that_has_tokens(tmp_path: Path):
    with Server(make_moe(tmp_path / "moe"), *COMMON, *GPU, "--enable-return-routed-experts") as one:
        params = {"n": 6, "max_new_tokens": 24, "temperature": 1.0,
                  "custom_params": {"deepprune": {"preset": "balanced"}}}  # fmt: skip
        body = {"text": "hello", "sampling_params": params, "return_routed_experts": True}
        outputs = one.post("/generate", body).json()
        for output in outputs:
            meta = output["meta_info"]
            assert bool(meta.get("routed_experts")) == bool(meta["completion_tokens"])
        tables(one)


@pytest.mark.skipif(
    not os.environ.get("DEEPPRUNE_TEST_VLM"), reason="DEEPPRUNE_TEST_VLM names no vision model"
)
def test_images_are_for_groups_of_one_request_and_for_no_others():
    flags = ("--max-total-tokens", "20000")
    with Server(os.environ["DEEPPRUNE_TEST_VLM"], *COMMON, *flags) as server:
        assert server.log.count("deepprune has not been run with a multimodal model yet") == 1
        content = [{"type": "image_url", "image_url": {"url": PIXEL}},
                   {"type": "text", "text": "Which colour? Put it into \\boxed{}."}]  # fmt: skip
        said: dict[str, Any] = {
            "model": "m", "n": 6, "max_tokens": 64, "temperature": 1.0,
            "messages": [{"role": "user", "content": content}],
        }  # fmt: skip
        reply = server.post("/v1/chat/completions", said).json()
        group = reply["metadata"]["deepprune"]
        assert group["size"] == 6 and group["settled"] is True
        assert len(reply["choices"]) == 6
        joined = {**said, "n": 1, "custom_params": {"deepprune": {"group": "g", "size": 2}}}
        refused = server.post("/v1/chat/completions", joined)
        assert refused.status_code == 400 and "not for prompts with images" in refused.text
        server.wait_idle()
        tables(server)
