"""Recorded traces are probed over a server, once each."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sglang_deepprune.clustering import JudgeError
from sglang_deepprune.config import ConfigError
from sglang_deepprune.judges import load_judge
from sglang_deepprune.types import Pair, Trace
from tests.unit.fake_http import FakeHandler, FakeServer, running

SURE = math.log(0.999)


class Says(FakeHandler):
    """`reply` to everything; remembers what it was asked."""

    asked: list[Any] = []
    reply: Any = None

    def do_POST(self) -> None:
        Says.asked.append(self.read_json())
        self.send_json(200, {"meta_info": {"output_token_logprobs": Says.reply}})


@pytest.fixture
def url() -> Any:
    Says.asked.clear()
    server = FakeServer(("127.0.0.1", 0), Says)
    with running(server):
        yield server.url


def trace(sibling: int, text: str, answer: str | None = None) -> Trace:
    return Trace(sibling, text, 5, "tokens", answer=answer, prompt="7 + 8 =")


def test_each_trace_is_asked_once_and_read_up_to_the_end_of_its_box(url: str):
    Says.reply = [[SURE, 1, "15"], [SURE, 2, "}"], [-9.0, 3, " ab"]]
    judge = load_judge(f"probe-server:{url}, so \\boxed{{")
    left, right = trace(0, "<think> it may be 15"), trace(1, "<think> it is </think> so")
    ended = trace(2, "9", "9")
    scores = judge.score([Pair(left, right), Pair(right, ended), Pair(right, left)])
    assert sorted(one["text"] for one in Says.asked) == [
        "7 + 8 = <think> it is </think> so so \\boxed{",
        "7 + 8 = <think> it may be 15 </think> so \\boxed{",
    ]
    assert scores == pytest.approx([0.999**4, 0.0, 0.999**4])


def test_a_box_that_stays_open_is_no_verdict(url: str):
    Says.reply = [[SURE, 1, "15"], [SURE, 2, " and"]]
    judge = load_judge(f"probe-server:{url}")
    assert np.isnan(judge.score([Pair(trace(0, "a"), trace(1, "b"))])).all()


@pytest.mark.parametrize("reply", [None, [[0.0]], [["x", 1, "2"]], 3])
def test_a_reply_without_tokens_is_an_error(url: str, reply: Any):
    Says.reply = reply
    with pytest.raises(JudgeError):
        load_judge(f"probe-server:{url}").score([Pair(trace(0, "a"), trace(1, "b"))])


def test_a_live_server_refuses_it_at_start():
    from sglang_deepprune.patches import server_args

    values = {"enable": True, "judge": "probe-server:http://127.0.0.1:1"}
    with pytest.raises(ConfigError, match="is for recorded traces; use probe"):
        server_args._attach(SimpleNamespace(), values)
