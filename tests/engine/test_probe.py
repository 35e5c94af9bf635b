"""The judge `probe` in a real server: a live sibling is forked, answers, and leaves no trace.

Scripted siblings; what a probe decodes is the tiny model's own in the tests of the fork, and
scripted through its logits in those of the verdicts. The embedded reasoner samples for real. Strict
memory checks are on: a slot or a row that a probe leaves behind kills the server. Page size 1 with
overlap, and page size 16.
"""

from __future__ import annotations

import hashlib
import threading
import time
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import requests

from benchmarks.scripted import Reading, plugin_env, write_scripts
from sglang_deepprune import metrics
from sglang_deepprune.probing import CLOSING, MAX_TOKENS, SURE
from sglang_deepprune.reasoner import model_path, questions
from tests.engine import scenario
from tests.engine.conftest import COMMON
from tests.engine.counters import scrape
from tests.engine.scenario import trace
from tests.engine.server import Server
from tests.engine.test_groups import ask, group_of, own_slots, states
from tests.engine.test_lazy import in_background, server_load
from tests.engine.test_parallel import CORES
from tests.engine.test_reasoner_server import sample
from tests.engine.versions import probes

pytestmark = [pytest.mark.modes, probes]

CONFIGS = {
    "page1-overlap": (),
    "page16-overlap": ("--page-size", "16"),
    "page16-no-overlap": ("--page-size", "16", "--disable-overlap-schedule"),
}
PAPER = {"preset": "paper", "k2": 2, **scenario.CUT}
OWN, SURELY, DOUBTED, MUTE, LONG = (
    "probe: own words =", "probe: surely =", "probe: doubted =", "probe: mute =", "probe: long ="
)  # fmt: skip
# Five that say 15, three that say 9; traces of about their own length each.
TEXTS = [trace("A", 90 + 6 * turn, "15", turn) for turn in range(8)]
ANSWERS = ["15", "15", "9", "15", "9", "15", "15", "9"]
REASONER_TEXT = "probe: thus the answer is \\boxed{"
HIGH, LOW = 30.0, 3.0  # logits over 511 zeros: a probability of 1.0, and of 0.04


@pytest.fixture(scope="module")
def probe_env(tiny: Path, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("probes")

    def reading(text: str, logit: float = HIGH) -> Reading:
        return tokenizer.encode(text), logit

    said = [reading(f"{answer}}}.") for answer in ANSWERS]
    scripts: dict[str, tuple[list[str], list[list[Reading]]]] = {
        OWN: (TEXTS, []),
        SURELY: (TEXTS, [[one] for one in said]),
        # Siblings 0 to 3 are sure at the second window, 4 to 7 never.
        DOUBTED: (TEXTS, [
            [reading(f"{answer}}}.", LOW), *([said[i]] if i < 4 else [])]
            for i, answer in enumerate(ANSWERS)
        ]),
        MUTE: (TEXTS, [[reading("wait thus since so " * 8)]] * 8),
        LONG: ([trace("A", 600, "1", turn) for turn in range(12)], []),
    }  # fmt: skip
    tokens: dict[tuple[int, ...], Sequence[Sequence[int]]] = {}
    probes: dict[tuple[int, ...], list[list[Reading]]] = {}
    for prompt, (texts, answers) in scripts.items():
        ids = tuple(tokenizer.encode(prompt))
        tokens[ids] = scenario.token_lists(tokenizer, texts)
        probes[ids] = answers
    write_scripts(folder / "scripts.json", tokens, probes)
    return plugin_env(folder / "scripts.json", folder)


@pytest.fixture(scope="module", params=list(CONFIGS))
def prober(request: pytest.FixtureRequest, tiny: Path, probe_env: Any) -> Iterator[Server]:
    flags = (*COMMON, "--deepprune-judge", "probe", "--enable-metrics", *CONFIGS[request.param])
    with Server(tiny, *flags, env=probe_env) as server:
        server.name = request.param
        yield server


def probes_of(server: Server, since: int = 0) -> list[dict[str, Any]]:
    return server.log_lines("deepprune-probe")[since:]


def settle(server: Server) -> None:
    """Idle under the strict check, and nothing of ours left in any table."""
    server.wait_idle()
    assert set(server.log_lines("deepprune-tables")[-1].values()) == {0}
    assert "Traceback" not in server.log


def test_a_fork_answers_as_a_request_with_the_same_tokens_would(prober: Server, tokenizer):
    outputs = ask(prober, OWN, 8, PAPER)
    assert [output["text"] for output in outputs] == TEXTS  # nobody was sure: nobody is stopped
    prober.wait_idle()
    lines = probes_of(prober)
    page = 16 if "page16" in prober.name else 1
    prompt, closing = tokenizer.encode(OWN), tokenizer.encode(CLOSING)
    found: Counter[bool] = Counter()
    for line in lines:
        assert line["failure"] is None
        assert line["shared"] % page == 0 and line["shared"] > len(prompt)
        assert len(closing) <= line["tail"] <= len(closing) + page  # one more under overlap
        known = line["shared"] + line["tail"] - len(closing) - len(prompt)
        said = tokenizer.encode(TEXTS[line["index"]])[:known]
        body = {
            "input_ids": [*prompt, *said, *closing], "return_logprob": True,
            "sampling_params": {"temperature": 0.0, "max_new_tokens": line["decoded"]},
        }  # fmt: skip
        plain = prober.post("/generate", body).json()
        logprobs = plain["meta_info"]["output_token_logprobs"]
        ids = array("q", [token for _, token, _ in logprobs])
        found[hashlib.blake2b(ids.tobytes(), digest_size=8).hexdigest() == line["digest"]] += 1
        pairs = zip(line["probabilities"], (p for p, _, _ in logprobs), strict=True)
        assert all(abs(own - 2.718281828**other) < 0.02 for own, other in pairs)
    assert len(lines) == 16 and found == {True: 16}  # each was asked at two windows
    settle(prober)


def test_agreeing_probes_prune_and_the_pruned_siblings_kv_is_free_in_that_step(prober: Server):
    before, verdicts = len(probes_of(prober)), len(prober.log_lines("deepprune-verdict"))
    told = scrape(prober)
    outputs = ask(prober, SURELY, 8, PAPER)
    group = group_of(outputs)
    lines = probes_of(prober, before)
    assert len(lines) == 8 and all(min(line["probabilities"]) >= SURE for line in lines)
    assert sorted(map(sorted, group["clusters"])) == [[0, 1, 3, 5, 6], [2, 4, 7]]
    ended = states(outputs)
    assert ended.count("finished") == 2 and ended.count("pruned") == 6
    for text, output, state in zip(TEXTS, outputs, ended, strict=True):
        same = output["text"] == text if state == "finished" else text.startswith(output["text"])
        assert same
    assert group["judge_tokens"] == sum(line["tail"] + line["decoded"] for line in lines)
    counted = scrape(prober).since(told)
    assert counted.total(metrics.PROBE_TOKENS) == group["judge_tokens"]
    assert not counted.total(metrics.JUDGE_TOKENS) and counted.total(metrics.JUDGE_PAIRS)
    assert all(line["decoded"] <= 4 for line in lines)  # the box was closed by then
    steps = prober.log_lines("deepprune-verdict")[verdicts:]
    freed = sum(step["after"]["available"] - step["before"]["available"] for step in steps)
    pruned = [o for o, state in zip(outputs, ended, strict=True) if state == "pruned"]
    assert sum(step["doomed"] for step in steps) == 6
    assert freed == sum(own_slots(prober, output) for output in pruned)
    assert counted.of(metrics.FREED_SLOTS) == {"pruned": freed}  # by the allocator's own numbers
    assert all(step["after"]["evictable"] == step["before"]["evictable"] for step in steps)
    settle(prober)


@pytest.mark.parametrize("page", ["1", "16"])
def test_seeded_siblings_sample_the_same_with_probes_and_without(page: str):
    """Real sampling, byte for byte: the embedded reasoner, which is too unsure to stop anybody."""
    flags = (*COMMON, "--page-size", page, "--deepprune-judge", REASONER_TEXT)
    with Server(model_path(), *flags, max_total_tokens=40000) as server:
        for question in questions(seed=11, count=4):
            plain = sample(server, question.prompt, {"preset": "collect"})
            before = len(probes_of(server))
            settings = {**PAPER, "k2": 20, "cut_tokens": 40}
            probed = sample(server, question.prompt, settings)
            assert len(probes_of(server, before)) > 8
            for one, other, state in zip(plain, probed, states(probed), strict=True):
                assert other["text"] == one["text"] if state == "finished" else (
                    one["text"].startswith(other["text"])
                )  # fmt: skip
            settle(server)


def test_a_reading_in_doubt_is_asked_again_and_then_is_no_evidence(prober: Server):
    before = len(probes_of(prober))
    outputs = ask(prober, DOUBTED, 8, {**PAPER, "k2": 1})
    group = group_of(outputs)
    looks = Counter(line["index"] for line in probes_of(prober, before))
    assert looks == dict.fromkeys(range(8), 2)
    assert sorted(map(sorted, group["clusters"])) == [[0, 1, 3], [2]]
    ended = states(outputs)
    assert ended[4:] == ["finished"] * 4  # nothing was found out about them
    assert ended[:4].count("finished") == 1 and ended[:4].count("pruned") == 3
    settle(prober)


def test_probes_without_an_answer_prune_nobody_and_say_so_once(prober: Server):
    for _ in range(2):
        outputs = ask(prober, MUTE, 8, PAPER)
        assert states(outputs) == ["finished"] * 8
        assert group_of(outputs)["clusters"] == []
    assert all(line["decoded"] == MAX_TOKENS for line in probes_of(prober)[-16:])
    assert prober.log.count("judge probe gives no verdict: no answer in its box") == 1
    settle(prober)


def test_a_stream_and_its_usage_know_nothing_of_probes(prober: Server):
    said = {"model": "m", "prompt": SURELY, "n": 8, "max_tokens": 400,
            "custom_params": {"deepprune": {**PAPER, "k2": 20}}}  # fmt: skip
    texts: dict[int, str] = {}
    for chunk in prober.stream("/v1/completions", said):
        for choice in chunk["choices"]:
            texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
    assert all(TEXTS[index].startswith(text) for index, text in texts.items())
    assert sorted(texts) == list(range(8)) and set(texts.values()) & set(TEXTS)
    reply = prober.post("/v1/completions", said).json()
    tokens = sum(choice["tokens"] for choice in reply["metadata"]["deepprune"]["choices"])
    assert reply["usage"]["completion_tokens"] == tokens
    settle(prober)


@pytest.mark.parametrize("way", ["disconnect", "abort by rid", "abort all"])
def test_an_abort_in_the_middle_of_probes_leaves_nothing_behind(prober: Server, way: str):
    settings = {**PAPER, "cut_tokens": 4, "window": 1}
    for delay in (0.0, 0.02, 0.05, 0.1, 0.15):
        before = len(probes_of(prober))
        body = {
            "text": LONG, "rid": f"probed-{delay}",
            "sampling_params": {
                "n": 12, "max_new_tokens": 700, "custom_params": {"deepprune": settings},
            },
        }  # fmt: skip
        if way == "disconnect":
            with pytest.raises(requests.exceptions.ReadTimeout):
                requests.post(f"{prober.url}/generate", json=body, timeout=0.3 + delay)
        else:
            thread, _ = in_background(prober, body)
            while thread.is_alive() and len(probes_of(prober)) == before:
                time.sleep(0.005)
            time.sleep(delay)
            named = {"rid": body["rid"]} if way == "abort by rid" else {"abort_all": True}
            assert prober.post("/abort_request", named).status_code == 200
            thread.join(timeout=30)
            assert not thread.is_alive()
        settle(prober)
    assert prober.is_alive and prober.generate("a stranger", max_new_tokens=4)["meta_info"]


@pytest.mark.parametrize("mode", ["in_place", "retract"])
def test_a_pause_in_the_middle_of_probes_loses_nobody(prober: Server, mode: str):
    settings = {**PAPER, "cut_tokens": 4, "window": 2, "k2": 20}
    params = {"n": 12, "max_new_tokens": 200, "custom_params": {"deepprune": settings}}
    for _ in range(3):
        before = len(probes_of(prober))
        thread, replies = in_background(prober, {"text": LONG, "sampling_params": params})
        while thread.is_alive() and len(probes_of(prober)) == before:
            time.sleep(0.002)
        assert prober.post("/pause_generation", {"mode": mode}).status_code == 200
        time.sleep(0.1)
        assert prober.post("/continue_generation", {}).status_code == 200
        thread.join(timeout=60)
        assert states(replies[0].json()) == ["finished"] * 12
        settle(prober)


@pytest.mark.parametrize(
    "more",
    [("--schedule-policy", "lpm"), ("--enable-priority-scheduling",), ("--disable-radix-cache",),
     ("--enable-mixed-chunk", "--chunked-prefill-size", "128")],
    ids=lambda more: more[0].strip("-"),
)  # fmt: skip
def test_forks_in_other_modes_of_queue_tree_and_prefill(
    tiny: Path, probe_env: Any, more: tuple[str, ...]
):
    flags = (*COMMON, "--deepprune-judge", "probe", "--page-size", "16", *more)
    with Server(tiny, *flags, env=probe_env) as server:
        for _ in range(2):
            outputs = ask(server, SURELY, 8, PAPER)
            assert sorted(map(sorted, group_of(outputs)["clusters"])) == [
                [0, 1, 3, 5, 6],
                [2, 4, 7],
            ]
            assert states(outputs).count("finished") == 2
            for text, output in zip(TEXTS, outputs, strict=True):
                assert text.startswith(output["text"])
            settle(server)
        assert all(one["failure"] is None for one in probes_of(server))


@pytest.mark.slow
def test_two_tensor_parallel_ranks_fork_and_prune_alike(tiny: Path, probe_env: Any):
    flags = (*COMMON, "--deepprune-judge", "probe", "--tp", "2")
    with Server(tiny, *flags, env={**probe_env, **CORES}) as server:
        for _ in range(3):
            before = len(probes_of(server))
            group = group_of(ask(server, SURELY, 8, PAPER))
            assert sorted(map(sorted, group["clusters"])) == [[0, 1, 3, 5, 6], [2, 4, 7]]
            server.wait_idle()
            # Both ranks log every probe: the same siblings, cut at the same token, same answers.
            keys = ("index", "shared", "tail", "decoded", "digest", "failure")
            seen = Counter(tuple(one[key] for key in keys) for one in probes_of(server, before))
            assert len(seen) == 8 and set(seen.values()) == {2}
        settle(server)


@pytest.mark.parametrize("page", ["1", "16"])
def test_probes_give_way_when_rows_or_kv_are_short(tiny: Path, probe_env: Any, page: str):
    """Six rows for six siblings: whoever else comes needs a probe's or waits as ever."""
    flags = (*COMMON, "--deepprune-judge", "probe", "--page-size", page)
    settings = {**PAPER, "cut_tokens": 4, "window": 1, "k2": 20}
    params = {"n": 6, "max_new_tokens": 400, "custom_params": {"deepprune": settings}}
    tight = ("--max-running-requests", "8", "--schedule-conservativeness", "0.1")
    env = {**probe_env, "SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION": "16"}
    with Server(tiny, *flags, *tight, env=env, max_total_tokens=1600) as server:
        for _ in range(9):  # on a busy machine a probe may have ended before anybody came
            thread, replies = in_background(server, {"text": LONG, "sampling_params": params})
            while thread.is_alive() and server_load(server)["num_running_reqs"] < 6:
                time.sleep(0.005)
            others = [threading.Thread(target=stranger, args=(server,)) for _ in range(12)]
            for other in others:
                other.start()
                time.sleep(0.02)
            for other in [thread, *others]:
                other.join(timeout=120)
                assert not other.is_alive()
            assert states(replies[0].json()) == ["finished"] * 6
            settle(server)
            num_taken = server.log_lines("deepprune-counts")[-1]["probes_taken"]
            if num_taken > 0:
                break
        assert num_taken > 0


def stranger(server: Server) -> None:
    reply = server.generate("a stranger", max_new_tokens=30, ignore_eos=True, temperature=0.0)
    assert reply["meta_info"]["completion_tokens"] == 30
