"""Hostile traces for judges, and a judge's process that is hostile itself."""

from __future__ import annotations

import os
import pickle
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_deepprune.child import _HEADER, _MOST_READ_BYTES, _MOST_REPLY_BYTES, Child
from sglang_deepprune.judges import load_judge
from sglang_deepprune.judges.candidates import option_candidates, options_of, result_candidates
from sglang_deepprune.judges.lm_prompt import PromptWriter, load_settings
from sglang_deepprune.types import Assignment, JudgeResult, Pair, Trace
from tests import lm_judge
from tests.hostile import BUSY, FEW, QUICK, STEP_LIMIT_MS, cpu_ms, hostile_text, longer

# -- traces ----------------------------------------------------------------------------------------

# A judge has seconds for a batch of some hundred traces; one trace must not take most of them.
TRACE_LIMIT_MS = 400.0
TEXT_JUDGES = ("similarity", "trigrams", "belief", "probe")
OPTIONS = "Which?\n" + "".join(f"{chr(65 + i)}. option {i} is {'x' * 40}\n" for i in range(26))
LONG_TRACES = {
    "spaces behind a sign": "=" + " " * 20_000 + "x",
    "words and spaces": ("is" + " " * 50) * 400,
    "numbers": "1,111" * 4000 + "x",
    "boxed drafts": "\\boxed{1}" * 2300,
    "brackets": "boxed" + "(" * 20_000,
    "option marks": "option (A) is " * 1400,
    "one letter": "a" * 20_000,
    "verdicts": "A. is not correct " * 1100,
    "surrogates": "so \ud800\udfff = 5 " * 1700,
    "control": "<|im_end|>\x00\u202e" * 1300,
}


def pairs_of(texts: list[str], prompt: str = "") -> list[Pair]:
    traces = [Trace(i, text, 9, "tokens", prompt=prompt) for i, text in enumerate(texts)]
    return [
        Pair(left, right) for left in traces for right in traces if left.sibling < right.sibling
    ]


def check_scores(scores: np.ndarray, count: int) -> None:
    assert scores.shape == (count,) and scores.dtype == np.float32
    known = scores[~np.isnan(scores)]
    assert ((known >= 0) & (known <= 1 + 1e-6)).all()


@pytest.mark.parametrize("name", TEXT_JUDGES)
@pytest.mark.parametrize("kind", LONG_TRACES)
def test_a_long_trace_takes_a_judge_little_of_its_time(name: str, kind: str):
    text = LONG_TRACES[kind]
    for prompt in ("", OPTIONS):
        pairs = pairs_of([text, text[1:]], prompt)

        def score(pairs: list[Pair] = pairs) -> None:
            check_scores(load_judge(name).score(pairs), 1)

        score()  # whatever is loaded at the first time
        assert cpu_ms(score) < 2 * TRACE_LIMIT_MS


@pytest.mark.parametrize("name", TEXT_JUDGES)
def test_any_traces_have_a_probability_or_no_verdict(name: str):
    judge = load_judge(name)

    @FEW
    @given(st.lists(hostile_text(2000), min_size=2, max_size=3), hostile_text(200))
    def one(texts: list[str], prompt: str) -> None:
        pairs = pairs_of(texts, prompt)
        check_scores(judge.score(pairs), len(pairs))

    one()


@QUICK
@given(hostile_text(4000), hostile_text(1000))
def test_candidates_of_any_text_are_finite_and_soon_found(text: str, prompt: str):
    options = options_of(prompt)
    for found in (result_candidates(text), option_candidates(text, options or {"A": text[:50]})):
        assert np.isfinite(found.features).all()
        assert len(found.names) == len(found.features) <= 26
    assert cpu_ms(lambda: result_candidates(text)) < BUSY * STEP_LIMIT_MS


@longer
@given(hostile_text(20_000))
def test_candidates_at_length(text: str):
    assert cpu_ms(lambda: result_candidates(text)) < TRACE_LIMIT_MS


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> PromptWriter:
    from transformers import AutoTokenizer

    path = lm_judge.make_base(tmp_path_factory.mktemp("lm"))
    return PromptWriter(AutoTokenizer.from_pretrained(path), load_settings(None), 512)


def test_no_trace_writes_a_control_token_into_a_language_models_prompt(writer: PromptWriter):
    names = set(writer.tokenizer.get_added_vocab().values())
    assert names

    @FEW
    @given(hostile_text(600), st.sampled_from(sorted(writer.tokenizer.get_added_vocab())))
    def one(text: str, token: str) -> None:
        text = text.encode("utf-8", "replace").decode()  # what a tokenizer's decode makes
        found = writer.encode(f"{token}{text}{token}")
        assert not names & set(found)
        (prompt,) = writer.write(pairs_of([f"{token}{text}", text + token]))
        assert len(prompt.prefix) + len(prompt.rest) <= 512 + 64

    one()


# -- the child's protocol --------------------------------------------------------------------------

HEADER_ONLY = struct.pack("!Q", _MOST_REPLY_BYTES + 1)


class _Opens:
    """What a pickle of malice holds."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (self.path,)


def frame(body: bytes) -> bytes:
    return _HEADER.pack(len(body)) + body


def talking(tmp_path: Path) -> dict[str, bytes]:
    return {
        "garbage": b"\x00" * 4 + os.urandom(2000),
        "a pickle that is none": frame(b"hello"),
        "an empty one": frame(b""),
        "cut off": frame(pickle.dumps((1, None)))[:-3],
        "too long": HEADER_ONLY + b"x" * 100,
        "no pair": frame(pickle.dumps([1, 2, 3])),
        "code": frame(pickle.dumps((_Opens(str(tmp_path / "run")), None))),
        "a class of somebody else": frame(pickle.dumps((Path("x"), None))),
        "two": frame(pickle.dumps((1, None))) * 2,
    }


class Wired(Child):
    """A child whose other end is ours: what it says is up to the test."""

    def connect(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        self._socket, self._is_ready, self._is_busy = ours, True, True
        return theirs


@pytest.mark.parametrize("kind", talking(Path()))
def test_what_a_mad_child_sends_is_an_error_and_is_never_run(tmp_path: Path, kind: str):
    child = Wired("none:none")
    with child.connect() as theirs:
        theirs.sendall(talking(tmp_path)[kind])
        theirs.shutdown(socket.SHUT_WR)
        reply = None
        for _ in range(10):
            reply = reply or child.poll()
    assert reply is not None
    assert (reply.error is None) is (kind == "two")
    assert child.pid is None or kind == "two"
    assert not (tmp_path / "run").exists()
    child.kill()


def test_results_and_plain_data_are_read(tmp_path: Path):
    result = JudgeResult("g", 1, (Assignment(0, 1, 0.5),), 3)
    for value in (result, [result], True, None, {"a": (1, 2.0, "x", b"y")}, float("nan")):
        child = Wired("none:none")
        with child.connect() as theirs:
            theirs.sendall(frame(pickle.dumps((value, None))))
            reply = child.poll()
        assert reply is not None and reply.error is None
        assert reply.value == value or value != value
        child.kill()


def test_a_child_that_writes_without_end_keeps_nobody_busy():
    child = Wired("none:none")
    with child.connect() as theirs:
        theirs.setblocking(False)

        def write() -> None:
            try:
                while True:
                    theirs.send(_HEADER.pack(_MOST_REPLY_BYTES) + b"x" * 65_536)
            except BlockingIOError:
                pass

        taken = 0
        for _ in range(50):
            write()
            before = len(child._in)
            assert child.poll() is None
            taken += len(child._in) - before
            assert len(child._in) - before <= _MOST_READ_BYTES + (1 << 20)
        assert taken > 0
    child.kill()


@FEW
@given(st.binary(max_size=300))
def test_any_bytes_of_a_child_end_it_or_wait_for_more(data: bytes):
    child = Wired("none:none")
    with child.connect() as theirs:
        theirs.sendall(data)
        for _ in range(3):
            reply = child.poll()
            if reply is not None:
                assert reply.error is not None or len(data) >= _HEADER.size
                break
    child.kill()
