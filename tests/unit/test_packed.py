"""Packed passes of a causal LM give the scores of ordinary ones, and read what is shared once."""

from __future__ import annotations

import json
import random
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sglang_deepprune.batcher import DeviceLost
from sglang_deepprune.judges import packed as packed_module
from sglang_deepprune.judges.attention import ENV, FLASHINFER
from sglang_deepprune.judges.gpu import PLAIN
from sglang_deepprune.judges.llm import LLMJudge
from sglang_deepprune.judges.lm_prompt import Prompt
from sglang_deepprune.judges.memory import CACHE_BYTES
from sglang_deepprune.judges.packed import Packed, PrefixCache, Span, passes, specimens
from sglang_deepprune.kernels.prefix_attention import (
    DTYPES,
    HEAD_DIMS,
    choose_blocks,
    prefix_attention,
)
from sglang_deepprune.kernels.prefix_tree import pack
from tests import lm_judge


@pytest.fixture(scope="module")
def judge(tmp_path_factory) -> LLMJudge:
    found = LLMJudge(str(lm_judge.make_base(tmp_path_factory.mktemp("base"))))
    assert found.packed is not None
    return found


def forest(
    seed: int, families: list[list[int]], longest_prefix: int, stem: int = 0
) -> list[Prompt]:
    """`stem`: tokens with which each prefix begins, before those of its own."""
    rng = random.Random(seed)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(512) for _ in range(count))

    found, start = [], ids(stem)
    for rests in families:
        prefix = start + ids(rng.randrange(1, longest_prefix + 1))
        found += [Prompt(prefix, ids(rest), stem_tokens=stem) for rest in rests]
    rng.shuffle(found)
    return found


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    seed=st.integers(0, 10**6),
    families=st.lists(st.lists(st.integers(1, 90), max_size=6), min_size=1, max_size=5).filter(any),
    pass_tokens=st.sampled_from([1, 100, 8192]),
    stem=st.sampled_from([0, 1, 80]),
    kept_bytes=st.sampled_from([0, 60_000, 512 << 20]),
)
def test_scores_are_those_of_ordinary_passes(
    judge: LLMJudge, seed, families, pass_tokens, stem, kept_bytes
):
    prompts = forest(seed, families, 120, stem)
    packed = judge.packed
    assert packed is not None
    packed.pass_tokens, packed.prefixes.max_bytes = pass_tokens, kept_bytes
    try:
        for some in (prompts[::2] or prompts, prompts):  # the second finds what the first has left
            assert judge.score_prompts(some) == pytest.approx(judge.score_padded(some), abs=1e-5)
            assert packed.prefixes.num_bytes <= kept_bytes
    finally:
        packed.pass_tokens, packed.prefixes.max_bytes = 8192, CACHE_BYTES


def test_the_stem_of_a_group_is_read_once(judge: LLMJudge):
    """In front of all its prefixes, and a new prefix rides with its first prompt."""
    packed = judge.packed
    assert packed is not None
    packed.prefixes.clear()
    prompts = forest(7, [[10, 20, 30], [5], [6, 7]], 50, stem=90)
    wanted = judge.score_padded(prompts)
    before = judge.tokens_read
    assert judge.score_prompts(prompts) == pytest.approx(wanted, abs=1e-5)
    bodies = {one.prefix: len(one.prefix) - 90 for one in prompts}
    rests = sum(len(one.rest) for one in prompts)
    assert judge.tokens_read - before == 90 + sum(bodies.values()) + rests
    before = judge.tokens_read
    later = replace(prompts[0], prefix=(*prompts[0].stem, 1, 2, 3))
    score = judge.score_prompts([later])
    assert judge.tokens_read - before == 3 + len(later.rest)
    assert score == pytest.approx(judge.score_padded([later]), abs=1e-5)


def test_on_a_gpu_a_stem_saves_no_less_than_a_pass_costs(judge: LLMJudge, monkeypatch):
    packed = judge.packed
    assert packed is not None
    monkeypatch.setattr(packed, "prefixes", PrefixCache(CACHE_BYTES))
    monkeypatch.setattr(packed, "model", SimpleNamespace(device=torch.device("cuda")))

    def after_stem(families: list[list[int]], stem: int) -> list[int]:
        """Lengths of the rests that are read after the stem."""
        prompts = forest(3, families, 50, stem)
        found = packed._bodies(prompts, packed_module._families(prompts, range(len(prompts))))
        return sorted(len(prompts[place].rest) for place in found)

    assert after_stem([[10, 11], [5]], stem=90) == [5]
    assert after_stem([[10, 10], [5]], stem=1200) == [5, 10]
    assert after_stem([[10, 10]], stem=1200) == []  # no second prefix shares it
    assert after_stem([[1, 1]] * 8, stem=90) == [1] * 8


def test_a_prefix_that_is_known_is_not_read_again(judge: LLMJudge):
    prompts = forest(9, [[10, 20, 30], [5, 40]], 100)
    wanted = judge.score_padded(prompts)
    judge.score_prompts(prompts[:1])
    judge.score_prompts([one for one in prompts if one.prefix != prompts[0].prefix])
    before = judge.tokens_read
    for prompt, score in zip(prompts, wanted, strict=True):
        assert judge.score_prompts([prompt])[0] == pytest.approx(score, abs=1e-5)
    assert judge.score_prompts(prompts) == pytest.approx(wanted, abs=1e-5)
    assert judge.tokens_read - before == 2 * sum(len(one.rest) for one in prompts)


def test_the_prefixes_that_are_kept_are_bounded(judge: LLMJudge):
    packed = judge.packed
    assert packed is not None
    usual, packed.prefixes = packed.prefixes, PrefixCache(40_000)
    try:
        for seed in range(12):
            prompts = forest(seed, [[5, 9], [7]], 60)
            assert judge.score_prompts(prompts) == pytest.approx(
                judge.score_padded(prompts), abs=1e-5
            )
            held = packed.prefixes._items.values()
            size = sum(k.nbytes + v.nbytes for _, layers in held for k, v in layers)
            assert packed.prefixes.num_bytes == size <= 40_000
    finally:
        packed.prefixes = usual


def test_what_is_kept_of_a_pass_holds_no_other_row_nor_any_query():
    tree = pack([5, 2], [3], [1])
    fused = torch.randn(tree.total_tokens, 8, 4)  # queries, keys and values of one product
    heads = fused.transpose(0, 1)[None]
    now = packed_module._Pass(tree, prefix_attention, None, torch.tensor([1, 2, 7]))
    token = packed_module._PASS.set(now)
    try:
        packed_module.attention(None, heads[:, :4], heads[:, 4:6], heads[:, 6:], None)
    finally:
        packed_module._PASS.reset(token)
    (kept,) = now.layers
    rows = fused[[1, 2, 7]]
    assert torch.equal(kept[0], rows[:, 4:6]) and torch.equal(kept[1], rows[:, 6:])
    assert all(one.untyped_storage().nbytes() == one.nbytes for one in kept)


def test_each_prefix_is_kept_for_itself():
    layers = [(torch.randn(5, 2, 4), torch.randn(5, 2, 4))]
    cache = PrefixCache(10_000)
    cache.keep(
        [Span((1, 2), (), "a", range(2)), Span((1, 2, 7, 8, 9), (1, 2), "b", range(4, 7))], layers
    )
    for prefix, rows in (((1, 2), slice(2)), ((1, 2, 7, 8, 9), slice(5))):
        ((key, value),) = cache._items[prefix][1]
        assert key.untyped_storage().nbytes() == key.nbytes == value.nbytes
        assert torch.equal(key, layers[0][0][rows]) and torch.equal(value, layers[0][1][rows])
    cache.max_bytes = 0
    cache.trim()
    assert cache.num_bytes == 0 and (1, 2) not in cache


def test_what_was_kept_for_a_group_is_dropped_when_it_ends(judge: LLMJudge):
    packed = judge.packed
    assert packed is not None
    packed.prefixes.clear()
    prompts = forest(4, [[5, 9], [7]], 60)
    owned = [replace(one, group_id=str(len(one.prefix))) for one in prompts]
    judge.score_prompts(owned)
    first, second = {one.prefix: one.group_id for one in owned}.items()
    judge.forget([first[1], "unknown"])
    assert first[0] not in packed.prefixes and second[0] in packed.prefixes
    judge.forget([second[1]])
    assert packed.prefixes.num_bytes == 0


def test_a_shared_prefix_is_read_once(judge: LLMJudge):
    prompts = forest(1, [[10, 20, 30], [5]], 200)
    before = judge.tokens_read
    judge.score_prompts(prompts)
    shared = {one.prefix for one in prompts}
    wanted = sum(map(len, shared)) + sum(len(one.rest) for one in prompts)
    assert judge.tokens_read - before == wanted


def test_passes_hold_every_prompt_once_and_keep_to_their_size():
    prompts = forest(3, [[40] * 9, [7, 90], [300], [1]], 60)
    seen = []
    for families in passes(prompts, 200, range(len(prompts))):
        size = sum(len(prefix) + sum(len(prompts[i].rest) for i in places)
                   for prefix, places in families)  # fmt: skip
        count = sum(len(places) for _, places in families)
        assert size <= 200 or count == 1
        assert all(prompts[i].prefix == prefix for prefix, places in families for i in places)
        seen += [i for _, places in families for i in places]
    assert sorted(seen) == list(range(len(prompts)))


def test_long_prompts_agree_too(tmp_path: Path):
    lm_judge.make_base(tmp_path)
    config = tmp_path / "config.json"
    body = json.loads(config.read_text()) | {"max_position_embeddings": 8192}
    config.write_text(json.dumps(body))
    judge = LLMJudge(str(tmp_path))
    prompts = forest(5, [[3000, 1], [700]], 2048, stem=2048)
    assert judge.score_prompts(prompts) == pytest.approx(judge.score_padded(prompts), abs=1e-5)


def test_a_model_that_cannot_be_packed_is_asked_the_ordinary_way(tmp_path: Path):
    from transformers import GPT2Config, GPT2LMHeadModel

    from tests.engine.tiny_model import make_tokenizer

    torch.manual_seed(0)
    GPT2LMHeadModel(
        GPT2Config(vocab_size=512, n_positions=512, n_embd=32, n_layer=1, n_head=2)
    ).save_pretrained(tmp_path)
    make_tokenizer(["Yes", "No"]).save_pretrained(tmp_path)
    judge = LLMJudge(str(tmp_path))
    assert judge.packed is None
    scores = judge.score(lm_judge.pairs(1)[0])
    assert np.isfinite(scores).all()


def test_kernels_that_cannot_be_compiled_cost_the_packing_and_not_the_judge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def broken(*_: object) -> None:
        raise subprocess.CalledProcessError(1, ["gcc"])

    monkeypatch.setattr(packed_module, "choose_attention", lambda device: broken)
    judge = LLMJudge(str(lm_judge.make_base(tmp_path)))
    assert judge.packed is None
    assert np.isfinite(judge.score(lm_judge.pairs(1)[0])).all()
    (record,) = caplog.records
    assert "judges without packing: CalledProcessError" in record.getMessage()


def test_on_a_gpu_each_part_of_what_a_model_is_tried_on_is_more_than_a_block_of_keys(
    judge: LLMJudge,
):
    most = max(choose_blocks(dim, kind).keys for dim in HEAD_DIMS for kind in DTYPES)
    on_gpu = SimpleNamespace(
        device=torch.device("cuda"), get_input_embeddings=judge.model.get_input_embeddings
    )
    long = specimens(on_gpu, judge.prompts.label_ids)[-3:]
    assert all(most < one.stem_tokens < len(one.prefix) - most for one in long)
    assert [len(one.rest) > most for one in long] == [True, False, True]
    assert long[0].prefix == long[1].prefix != long[2].prefix and long[0].stem == long[2].stem


@pytest.mark.parametrize("fault", ["many keys", "kept prefixes"])
def test_what_a_model_is_tried_on_when_it_loads_holds_all_that_serving_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fault: str
):
    def attend(q, k, v, tree, scale=None):
        out = prefix_attention(q, k, v, tree, scale)
        is_wrong = len(q) < len(k) if fault == "kept prefixes" else max(tree.child_lengths) > 12
        return out * 0 if is_wrong else out

    monkeypatch.setattr(packed_module, "choose_attention", lambda device: attend)
    assert LLMJudge(str(lm_judge.make_base(tmp_path))).packed is None
    assert "packed scores are off by" in caplog.text


def test_a_kernel_that_breaks_the_gpu_ends_the_process_and_the_next_one_does_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def broken(*_: object) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(packed_module, "choose_attention", lambda device: broken)
    path = str(lm_judge.make_base(tmp_path))
    with pytest.raises(DeviceLost, match="AcceleratorError"):
        LLMJudge(path)
    monkeypatch.setenv(PLAIN, "1")
    judge = LLMJudge(path)
    assert judge.packed is None and np.isfinite(judge.score(lm_judge.pairs(1)[0])).all()
    (record,) = caplog.records
    assert "judges without packing: its kernels have failed" in record.getMessage()


def test_on_a_gpu_heads_that_no_kernel_takes_are_not_packed(
    judge: LLMJudge, monkeypatch: pytest.MonkeyPatch
):
    """The reference would take more memory there than a pass has."""

    def of(head_dim: int, kv_heads: int, dtype: torch.dtype = torch.bfloat16) -> bool:
        config = SimpleNamespace(
            num_attention_heads=128, num_key_value_heads=kv_heads, head_dim=head_dim
        )
        return packed_module._has_kernel(SimpleNamespace(config=config, dtype=dtype))

    monkeypatch.setattr(packed_module, "has_triton", lambda: True)
    assert of(128, 8) and of(64, 2) and not of(96, 8) and not of(64, 1)
    assert not of(64, 2, torch.float64)
    monkeypatch.setattr(packed_module, "has_triton", lambda: False)
    assert not of(128, 8)
    monkeypatch.setenv(ENV, FLASHINFER)
    assert of(128, 8)
    on_gpu = SimpleNamespace(device=torch.device("cuda"))
    monkeypatch.setattr(packed_module, "_has_kernel", lambda model: False)
    assert Packed.of(on_gpu, (1, 2), 512, judge.score_padded) is None


def test_a_prompt_beyond_the_sliding_window_is_not_packed(judge: LLMJudge):
    packed = judge.packed
    assert packed is not None
    packed.window = 50
    try:
        short, long = forest(1, [[1]], 20)[0], forest(1, [[60]], 20)[0]
        assert packed.fits(short) and not packed.fits(long)
        before = packed.tokens_read
        found = judge.score_prompts([long, short])
        assert packed.tokens_read - before == len(short.prefix) + len(short.rest)
        assert found == pytest.approx(judge.score_padded([long, short]), abs=1e-5)
    finally:
        packed.window = 1 << 30


@pytest.mark.parametrize(
    "rope", [
        {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8,
         "original_max_position_embeddings": 64, "factor": 8.0},
        {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 64},
    ],
)  # fmt: skip
def test_no_prompt_is_packed_at_which_rotary_embeddings_change(tmp_path: Path, rope):
    """A kept prefix was turned as its first pass was: a longer pass turns it otherwise."""
    lm_judge.make_base(tmp_path)
    config = tmp_path / "config.json"
    body = json.loads(config.read_text())
    body["rope_parameters"] = rope | {"rope_theta": 10000.0}
    config.write_text(json.dumps(body))
    judge = LLMJudge(str(tmp_path))
    assert judge.packed is not None and judge.packed.window == 64
    short = forest(1, [[10]], 30)[0]
    long = Prompt(short.prefix, tuple(range(90)))
    judge.score_prompts([short])
    for prompt in (long, short):
        assert judge.score_prompts([prompt]) == pytest.approx(
            judge.score_padded([prompt]), abs=1e-5
        )


def test_rotary_embeddings_are_looked_up_under_their_names_of_any_release():
    def window(**settings: object) -> int:
        return packed_module._window(SimpleNamespace(max_position_embeddings=99, **settings))

    assert window() == window(rope_parameters={"rope_type": "default"}) == 1 << 30
    assert window(rope_scaling={"type": "dynamic"}) == 99
    old = {"type": "longrope", "original_max_position_embeddings": None}
    assert window(rope_scaling=old, original_max_position_embeddings=44) == 44
    by_layer = {"full": {"rope_type": "dynamic", "original_max_position_embeddings": 33}}
    assert window(rope_parameters=by_layer, sliding_window=40) == 33
