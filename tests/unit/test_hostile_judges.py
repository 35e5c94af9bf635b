"""Hostile traces for judges, and judges, servers and files that are hostile themselves."""

from __future__ import annotations

import gzip
import json
import math
import os
import pickle
import resource
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_deepprune.card import Card, CardError
from sglang_deepprune.card import load as load_card
from sglang_deepprune.child import _HEADER, _MOST_READ_BYTES, _MOST_REPLY_BYTES, Child
from sglang_deepprune.clustering import JudgeError
from sglang_deepprune.config import ConfigError, DeepPruneConfig
from sglang_deepprune.judges import load_judge
from sglang_deepprune.judges.belief import load_weights
from sglang_deepprune.judges.candidates import option_candidates, options_of, result_candidates
from sglang_deepprune.judges.lm_prompt import PromptError, PromptWriter, Settings, load_settings
from sglang_deepprune.judges.oracle import OracleJudge
from sglang_deepprune.judges.permission import allowed, with_card
from sglang_deepprune.judges.probe_server import ProbeServerJudge
from sglang_deepprune.judges.remote import Circuit, Http, RemoteJudge
from sglang_deepprune.types import Assignment, JudgeResult, Pair, Trace
from tests import lm_judge
from tests.hostile import BUSY, FEW, QUICK, STEP_LIMIT_MS, cpu_ms, hostile_text, json_values, longer
from tests.unit.fake_http import FakeHandler, FakeServer, running

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


# -- a server that judges --------------------------------------------------------------------------


class Hostile(FakeServer):
    """Answers with whatever `reply` is: bytes as they are, anything else as JSON."""

    def __init__(self, model: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.model = model
        self.is_over = False
        self.reply: Any = None
        self.info: Any = None
        self.server_info: Any = {"context_length": 512}


class Handler(FakeHandler):
    server: Hostile
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        known = {"tokenizer_path": str(self.server.model)}
        info = known if self.server.info is None else self.server.info
        self.send_json(200, info if "model" in self.path else self.server.server_info)

    def do_POST(self) -> None:
        self.read_json()
        reply = self.server.reply
        if callable(reply):
            reply(self)
        elif isinstance(reply, bytes):
            self.whole(reply)
        else:
            self.send_json(200, reply)

    def whole(self, body: bytes, **headers: str) -> None:
        self.send_response(200)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def for_ever(self, piece: bytes, pause_s: float) -> None:
        """Until the client goes away, or the test is over."""
        self.close_connection = True
        try:
            while not self.server.is_over:
                self.wfile.write(piece)
                self.wfile.flush()
                time.sleep(pause_s)
        except OSError:
            pass


def drips(handler: Handler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
    handler.for_ever(b" ", 0.02)


def drips_headers(handler: Handler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
    handler.for_ever(b"x", 0.02)


def chunks_for_ever(handler: Handler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    handler.for_ever(b"10000\r\n" + b" " * 0x10000 + b"\r\n", 0.0)


def many_headers(handler: Handler) -> None:
    handler.close_connection = True
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 500 + b"\r\n{}")


def no_http(handler: Handler) -> None:
    handler.close_connection = True
    handler.wfile.write(b"\x00\xff hello\r\n\r\n")


def breaks_off(handler: Handler) -> None:
    handler.close_connection = True
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{")


def redirects(handler: Handler) -> None:
    handler.send_response(302)
    handler.send_header("Location", "http://127.0.0.1:1/elsewhere")
    handler.send_header("Content-Length", "0")
    handler.end_headers()


BOMB = gzip.compress(b" " * (64 << 20))
REPLIES: dict[str, Any] = {
    "HTML": b"<html><body>All is well</body></html>",
    "nothing": b"",
    "a bomb": lambda handler: handler.whole(BOMB, Content_Encoding="gzip"),
    "too long": b'{"scores": [' + b"[0.5, 0.5]," * 600_000 + b"[0.5, 0.5]]}",
    "nested": b"[" * 500_000,
    "long number": b'{"scores": [[1' + b"0" * 400 + b", 0]]}",
    "NaN": b'{"scores": [[NaN, 0.5]]}',
    "infinity": b'{"scores": [[Infinity, 0.5]]}',
    "negative": {"scores": [[-0.5, 1.5]]},
    "too many": {"scores": [[0.5, 0.5]] * 3},
    "too few": {"scores": []},
    "flat": {"scores": [0.5, 0.5]},
    "text": {"scores": "ab"},
    "object": {"scores": {"0": 0.5}},
    "null": {"scores": None},
    "a list": [[0.5, 0.5]],
    "null alone": None,
    "bytes": b"\xff\xfe\x00",
    "drip": drips,
    "headers that drip": drips_headers,
    "chunks": chunks_for_ever,
    "headers": many_headers,
    "no HTTP": no_http,
    "cut off": breaks_off,
    "redirect": redirects,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lm_judge.make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def hostile(base: Path) -> Iterator[Hostile]:
    server = Hostile(base)
    with running(server):
        yield server
        server.is_over = True


def one_pair() -> list[Pair]:
    return pairs_of(["so it is east", "so it may be west"])


@pytest.mark.parametrize("name", REPLIES)
def test_a_reply_that_is_none_is_a_fault_within_its_time(hostile: Hostile, name: str):
    judge = RemoteJudge(hostile.url, budget_s=0.8, retries=1, backoff_s=0.01)
    hostile.reply = {"scores": [[0.5, 0.5]]}
    assert judge.score(one_pair()) == pytest.approx([0.5])
    hostile.reply = REPLIES[name]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(2):
        start = time.monotonic()
        with pytest.raises(JudgeError) as caught:
            judge.score(one_pair())
        assert time.monotonic() - start < 0.8 * BUSY
        assert "east" not in str(caught.value) and "west" not in str(caught.value)
    grown_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown_mib < 200, f"{grown_mib:.0f} MiB"
    with pytest.raises(JudgeError):
        judge.score(one_pair())
    assert judge.circuit.is_open  # three in a row, whatever they were


@QUICK
@given(json_values())
def test_any_scores_are_probabilities_or_an_error(value: Any):
    class Told(Http):
        def send(self, path: str, body: Any = None) -> Any:
            return value

    judge = RemoteJudge("http://127.0.0.1:9", circuit=Circuit(limit=10**9))
    judge._http = Told("http://127.0.0.1:9")
    judge._prompts = _Labels()  # type: ignore[assignment]
    try:
        found = judge._ask([1], [[2]])
    except JudgeError:
        return
    assert len(found) == 1 and 0 <= found[0] <= 1


class _Labels:
    label_ids = (1, 2)


@pytest.mark.parametrize(
    ("info", "server_info"),
    [([], {}), ({}, []), ("x", "y"), (None, None), ({"tokenizer_path": None}, {}),
     ({"tokenizer_path": "\x00"}, {}), ({"tokenizer_path": "../" * 2000}, {}),
     ({"tokenizer_path": ["a"]}, {"context_length": 5})],
)  # fmt: skip
def test_a_server_that_says_nonsense_of_itself_is_a_fault(
    hostile: Hostile, monkeypatch: pytest.MonkeyPatch, info: Any, server_info: Any
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # as in its process
    hostile.info, hostile.server_info = info if info is not None else "null", server_info
    with pytest.raises(JudgeError):
        RemoteJudge(hostile.url, retries=0).score(one_pair())


@pytest.mark.parametrize("limit", ["x", math.nan, math.inf, -5, 0, True, [1], 10**400, None])
def test_a_context_length_that_is_none_is_not_taken(hostile: Hostile, limit: Any):
    hostile.server_info = {"context_length": limit}
    hostile.reply = {"scores": [[0.25, 0.75]]}
    assert RemoteJudge(hostile.url, retries=0).score(one_pair()) == pytest.approx([0.25])


@pytest.mark.parametrize(
    "tokens",
    [None, "x", [[math.nan, 1, "5}"]], [[math.inf, 1, "5}"]], [[2.0, 1, "5}"]],
     [[10**400, 1, "5}"]], [[0.0, 1]], [["x", 1, "y"]], [[0.0, 1, "5}"]] * 1000],
)  # fmt: skip
def test_a_probed_server_that_says_no_log_probability_is_a_fault(hostile: Hostile, tokens: Any):
    hostile.reply = {"meta_info": {"output_token_logprobs": tokens}}
    with pytest.raises(JudgeError):
        ProbeServerJudge(hostile.url).score(one_pair())


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


# -- files -----------------------------------------------------------------------------------------


def card_body() -> dict[str, Any]:
    return {
        "format": "sglang-deepprune judge card 1", "judge": "similarity", "data": {},
        "figures": [{"cut": "tokens:500", "gain_low": 0.1}], "taus": {"tokens:500": 0.5},
        "may_prune": True, "reason": "good",
    }  # fmt: skip


def file_of(folder: Path, value: Any) -> Path:
    path = folder / "file.json"
    path.write_bytes(value if isinstance(value, bytes) else json.dumps(value).encode())
    return path


FILES = {
    "empty": b"", "nested": b"[" * 200_000, "a pickle": pickle.dumps({"a": 1}),
    "UTF-16": "{}".encode("utf-16"), "null": b"null", "a number": b"1" * 5000, "NUL": b"\x00" * 100,
}  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
def test_a_file_that_is_none_is_one_sentence(tmp_path: Path, kind: str):
    path = file_of(tmp_path, FILES[kind])
    with pytest.raises(CardError):
        load_card(path)
    with pytest.raises(ValueError, match="file.json"):
        load_weights(path)
    with pytest.raises(ConfigError) as caught:
        with_card(DeepPruneConfig(judge_card=str(path)))
    assert caught.value.field == "judge_card"
    (tmp_path / "deepprune_judge.json").write_bytes(path.read_bytes())
    with pytest.raises(PromptError):
        load_settings(tmp_path)
    if kind != "empty":  # a recording of no rows
        with pytest.raises(ValueError):
            OracleJudge(str(path))


def test_any_card_is_taken_or_refused(tmp_path: Path):
    @QUICK
    @given(st.sampled_from([*card_body(), "more"]), json_values())
    def one(name: str, value: Any) -> None:
        try:
            body = json.dumps({**card_body(), name: value})
        except ValueError:  # a number of too many digits
            return
        path = tmp_path / "any.card.json"
        path.write_bytes(body.encode("utf-8", "surrogatepass"))
        try:
            found = load_card(path)
        except CardError as error:
            assert len(str(error)) < 500
            return
        assert isinstance(found, Card)
        for cut, tau in allowed(found):
            assert isinstance(cut, str) and 0 <= tau <= 1

    one()


def test_figures_of_any_shape_allow_nothing_by_accident(tmp_path: Path):
    @QUICK
    @given(st.lists(json_values(), max_size=3), st.sampled_from(["cut", "gain_low"]), json_values())
    def one(figures: list[Any], name: str, value: Any) -> None:
        body = {key: known for key, known in card_body().items() if key != "format"}
        good = {"cut": "tokens:500", "gain_low": 0.1, name: value}
        try:
            card = Card(**{**body, "figures": [*figures, good]})
        except CardError:
            return
        for cut, tau in allowed(card):
            assert (cut, tau) == ("tokens:500", 0.5)

    one()


def test_any_weights_are_taken_or_refused(tmp_path: Path):
    shipped = json.loads((Path(load_weights.__code__.co_filename).parent / "embedded" /
                          "belief.json").read_text())  # fmt: skip
    kind = next(name for name in ("results", "options") if shipped.get(name))

    @QUICK
    @given(st.sampled_from(["candidate", "other", "pair", kind]), json_values())
    def one(name: str, value: Any) -> None:
        body = {**shipped, kind: value if name == kind else {**shipped[kind], name: value}}
        path = tmp_path / "any.json"
        try:
            path.write_text(json.dumps(body))
        except (ValueError, UnicodeEncodeError):
            return
        try:
            found = load_weights(path)
        except ValueError as error:
            assert len(str(error)) < 500
            return
        for weights in found.values():
            assert all(map(math.isfinite, [*weights.candidate, *weights.other, *weights.pair]))

    one()


@pytest.mark.parametrize("prompt", ["", "{first}", "{second}{first}", "{problem}" * 9])
def test_a_prompt_without_its_fields_is_refused(prompt: str):
    with pytest.raises(PromptError):
        Settings(prompt)
