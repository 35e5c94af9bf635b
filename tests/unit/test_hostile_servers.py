"""Servers that judge and are hostile: whatever they reply is a fault at most, within its time."""

from __future__ import annotations

import gzip
import math
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given

from sglang_deepprune.clustering import JudgeError
from sglang_deepprune.judges.probe_server import ProbeServerJudge
from sglang_deepprune.judges.remote import Circuit, Http, RemoteJudge
from sglang_deepprune.types import Pair
from tests import lm_judge
from tests.hostile import QUICK, json_values
from tests.unit.fake_http import FakeHandler, FakeServer, running
from tests.unit.test_hostile_judges import pairs_of


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
        assert time.monotonic() - start < 4 * 0.8  # of wall time: other work on the machine counts
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

    judge = RemoteJudge("http://127.0.0.1:9", retries=0, circuit=Circuit(limit=10**9))
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
    judge = RemoteJudge(hostile.url, retries=0)  # it loads all the same
    with pytest.raises(JudgeError):
        judge.score(one_pair())


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
