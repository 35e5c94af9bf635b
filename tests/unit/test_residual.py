"""A judge in half precision keeps what its layers add up in float32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from sglang_deepprune.judges import llm
from sglang_deepprune.judges.llm import LLMJudge
from sglang_deepprune.judges.residual import widen_residual
from tests import lm_judge
from tests.unit.test_packed import forest


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Deep enough for roundings to add up; its weights are exact in bfloat16."""
    folder = lm_judge.make_base(tmp_path_factory.mktemp("base"), num_layers=16)
    model, _ = llm.load_model(str(folder), torch.bfloat16)
    model.save_pretrained(folder)
    return folder


def errors_of(judge: LLMJudge, exact: LLMJudge) -> list[float]:
    """Largest difference from float32: padded in one batch, one by one, and packed."""
    prompts = forest(3, [[30, 12, 60], [5, 44], [80]], 120)
    wanted = exact.score_padded(prompts)
    single = np.concatenate([judge.score_padded([one]) for one in prompts])
    ways = [judge.score_padded(prompts), single, judge.score_prompts(prompts)]
    return [float(np.abs(way - wanted).max()) for way in ways]


def test_every_way_comes_closer_to_float32(base: Path, monkeypatch: pytest.MonkeyPatch):
    exact, wide = LLMJudge(str(base)), LLMJudge(str(base), torch.bfloat16)
    monkeypatch.setattr(llm, "widen_residual", lambda model: False)
    narrow = LLMJudge(str(base), torch.bfloat16)
    assert wide.packed is not None and narrow.packed is not None
    ours, plain = errors_of(wide, exact), errors_of(narrow, exact)
    assert max(ours) < 1e-2
    assert max(ours) < max(plain)


def test_weights_and_products_stay_in_half_precision(base: Path):
    judge = LLMJudge(str(base), torch.bfloat16)
    seen = set()
    for module in judge.model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(
                lambda _, inputs, out: seen.add((inputs[0].dtype, out.dtype))
            )
    judge.score_padded(forest(1, [[4]], 9))
    assert seen == {(torch.bfloat16, torch.bfloat16)}
    assert {one.dtype for one in judge.model.parameters()} == {torch.bfloat16}


def test_a_model_with_products_of_its_own_is_left_as_it_was(base: Path):
    model, _ = llm.load_model(str(base), torch.bfloat16)
    layer = model.base_model.layers[0].mlp
    weight = torch.eye(model.config.hidden_size, dtype=torch.bfloat16)
    layer.forward = lambda x: torch.nn.functional.linear(x, weight)
    ids = torch.tensor([[1, 2, 3]])
    before = model(input_ids=ids).logits
    assert not widen_residual(model)
    assert torch.equal(model(input_ids=ids).logits, before)
