"""The judge on a second server, against a small HTTP server that can misbehave."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from sglang_deepprune.clustering import JudgeError
from sglang_deepprune.config import ConfigError, DeepPruneConfig
from sglang_deepprune.judges import check_judge
from sglang_deepprune.judges.remote import KEY_VARIABLE, Circuit, RemoteJudge
from sglang_deepprune.types import Pair, Trace
from tests import lm_judge
from tests.unit.fake_http import FakeHandler, FakeServer, running


class Fake(FakeServer):
    """Scores an item by its length; `errors` come first, `reply` replaces the scores."""

    def __init__(self, model: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.model = model
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.errors: list[int] = []
        self.reply: Any = None
        self.delay_s = 0.0
        self.limits = {"context_length": None, "max_req_input_len": 507}


class Handler(FakeHandler):
    server: Fake

    def do_GET(self) -> None:
        names = {"/get_model_info": {"tokenizer_path": str(self.server.model)},
                 "/get_server_info": self.server.limits}  # fmt: skip
        self.send_json(200, names[self.path])

    def do_POST(self) -> None:
        body = self.read_json()
        time.sleep(self.server.delay_s)
        self.server.asked.append(body)
        self.server.keys.append(self.headers.get("Authorization"))
        status = self.server.errors.pop(0) if self.server.errors else 200
        most = min(one for one in self.server.limits.values() if one)
        if any(len(body["query"]) + len(item) >= most for item in body["items"]):
            status = 400  # as SGLang refuses: at its limit, not beyond it
        scores = [[1 / len(item), 1 - 1 / len(item)] for item in body["items"]]
        reply = self.server.reply if self.server.reply is not None else {"scores": scores}
        elsewhere = {"Location": f"{self.server.url}/get_model_info"} if status == 302 else {}
        if isinstance(reply, bytes):
            self.send_page(reply)
        else:
            self.send_json(status, reply, **elsewhere)


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[Fake]:
    server = Fake(lm_judge.make_base(tmp_path))
    with running(server):
        yield server


def traces(count: int) -> list[Trace]:
    return [Trace(i, "so " * (i + 1) + "it is east", 4, "tokens") for i in range(count)]


def pair() -> Pair:
    left, right = traces(2)
    return Pair(left, right)


def test_pairs_with_one_prefix_are_one_request(fake: Fake):
    judge = RemoteJudge(fake.url)
    a, b, c, d = traces(4)
    scores = judge.score([Pair(d, b), Pair(c, d), Pair(b, a), Pair(a, d)])
    assert len(fake.asked) == 2
    shared = max(fake.asked, key=lambda body: len(body["items"]))
    assert len(shared["items"]) == 3 and shared["label_token_ids"] == list(judge.prompts.label_ids)
    wanted = [1 / len(p.rest) for p in judge.prompts.write(
        [Pair(d, b), Pair(c, d), Pair(b, a), Pair(a, d)])]  # fmt: skip
    assert scores == pytest.approx(wanted, abs=1e-6)


def test_the_key_comes_from_the_environment(fake: Fake, monkeypatch: pytest.MonkeyPatch):
    judge = RemoteJudge(fake.url)
    monkeypatch.setenv(KEY_VARIABLE, "secret")
    judge.score([pair()])
    assert fake.keys == ["Bearer secret"]


def test_a_busy_server_is_asked_again(fake: Fake):
    judge = RemoteJudge(fake.url, backoff_s=0.01)
    fake.errors = [503, 429]
    assert np.isfinite(judge.score([pair()])).all()
    assert len(fake.asked) == 3


@pytest.mark.parametrize("status", [400, 401, 302])
def test_what_will_not_get_better_is_not_asked_again(fake: Fake, status: int):
    judge = RemoteJudge(fake.url, backoff_s=0.01)
    fake.errors = [status]
    with pytest.raises(JudgeError, match=f"HTTP {status}"):
        judge.score([pair()])
    assert len(fake.asked) == 1


@pytest.mark.parametrize("context_length", [None, 400, 4096])
def test_a_prompt_is_cut_to_what_the_server_takes(fake: Fake, context_length: int | None):
    fake.limits["context_length"] = context_length
    long = [Trace(i, "so " * 600 + "it is east", 600, "tokens") for i in range(2)]
    assert np.isfinite(RemoteJudge(fake.url).score([Pair(long[0], long[1])])).all()
    (asked,) = fake.asked
    read = len(asked["query"]) + len(asked["items"][0])
    assert read >= min(context_length or 507, 507) - 2


def test_what_the_server_refuses_is_no_failure_of_the_server(fake: Fake):
    judge = RemoteJudge(fake.url, retries=0, circuit=Circuit(limit=1))
    fake.errors = [400, 500]
    with pytest.raises(JudgeError, match="HTTP 400"):
        judge.score([pair()])
    assert not judge.circuit.is_open
    with pytest.raises(JudgeError, match="HTTP 500"):
        judge.score([pair()])
    assert judge.circuit.is_open


def test_what_takes_long_is_done_when_it_loads(fake: Fake, monkeypatch: pytest.MonkeyPatch):
    judge = RemoteJudge(fake.url)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", None)
    assert np.isfinite(judge.score([pair()])).all()


def test_a_named_tokenizer_is_read_at_load_though_the_server_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    read: list[str] = []
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda name, **_: read.append(name))
    RemoteJudge("http://127.0.0.1:9,org/name", retries=0)
    assert read == ["org/name"]


@pytest.mark.parametrize("reply", [{}, {"scores": []}, {"scores": [[2.0, -1.0]]}, [1],
                                   {"scores": [["x", 0]]}, {"scores": [[None, 0]]},
                                   {"scores": [[float("nan"), 0.5]]}, b"",
                                   b"<html><body>502 Bad Gateway</body></html>"])  # fmt: skip
def test_a_reply_that_is_no_probability_is_an_error(fake: Fake, reply: Any):
    judge = RemoteJudge(fake.url)
    fake.reply = reply
    with pytest.raises(JudgeError):
        judge.score([pair()])


def test_after_failures_in_a_row_the_circuit_opens_and_closes_again(fake: Fake):
    now = [0.0]
    circuit = Circuit(limit=2, pause_s=30, clock=lambda: now[0])
    judge = RemoteJudge(fake.url, retries=0, circuit=circuit)
    asked = pair()
    fake.errors = [500, 500, 500]
    for _ in range(2):
        with pytest.raises(JudgeError, match="HTTP 500"):
            judge.score([asked])
    with pytest.raises(JudgeError, match="pause"):
        judge.score([asked])
    assert len(fake.asked) == 2  # nothing was sent
    now[0] = 31
    with pytest.raises(JudgeError, match="HTTP 500"):  # one trial, and it opens again
        judge.score([asked])
    assert circuit.is_open
    now[0] = 62
    judge.score([asked])
    assert not circuit.is_open


def test_a_server_that_hangs_ends_the_call_within_its_budget_and_opens_the_circuit(fake: Fake):
    judge = RemoteJudge(fake.url)
    asked = pair()
    judge.score([asked])
    judge.budget_s, fake.delay_s = 0.3, 1.0
    for _ in range(judge.circuit.limit):
        start = time.monotonic()
        with pytest.raises(JudgeError, match="does not answer"):
            judge.score([asked])
        assert time.monotonic() - start < 0.9
    with pytest.raises(JudgeError, match="pause"):
        judge.score([asked])


def test_a_slow_server_has_as_long_as_the_batch_has(fake: Fake):
    judge = RemoteJudge(fake.url)
    judge.score([pair()])
    judge.budget_s, fake.delay_s = 0.2, 0.6
    judge.until = time.monotonic() + 20
    assert np.isfinite(judge.score([pair()])).all()


def test_a_call_ends_before_the_workers_deadline_would_kill_it():
    assert RemoteJudge("http://127.0.0.1:9").budget_s < DeepPruneConfig().judge_deadline_ms / 1e3


def test_a_server_may_start_later_than_the_judge():
    judge = RemoteJudge("http://127.0.0.1:9", retries=0)  # nobody is there yet
    with pytest.raises(JudgeError, match="does not answer"):
        judge.score([pair()])


def test_what_is_no_url_is_refused_at_start():
    for spec in ("remote", "remote:judge:30000", "remote:ftp://x", "remote:http://"):
        with pytest.raises(ConfigError):
            check_judge(spec)
    with pytest.raises(ConfigError, match="DEEPPRUNE_JUDGE_API_KEY"):
        check_judge("remote:https://me:secret@judge:30000")
    check_judge("remote:https://judge:30000/base,org/name")
