"""A judge model on a second SGLang server, asked over `/v1/score` with token ids.

`remote:URL` or `remote:URL,TOKENIZER`. The ids are those of `llm.py` (`lm_prompt.py`), so the
scores are too; pairs that share a prefix are one request, and the server's radix cache keeps it.
The tokenizer is the one that the server names, if it is readable here, else TOKENIZER (a folder or
a hub name). TLS certificates are verified, redirects are not followed, and the API key comes from
the environment variable DEEPPRUNE_JUDGE_API_KEY.

Loading asks the server and reads the tokenizer, if both are there by then; else the first call
does. A prompt has no more tokens than the server takes.

A call has a budget of seconds, below the worker's default deadline: it ends by itself, because a
process that is killed forgets its circuit and is switched off after a few restarts. A server that
sends a byte now and then, or without end, ends with it too. Within it, what failed is tried again
with a back-off. When several calls in a row have failed the circuit opens:
for a while nothing is sent and every call fails at once, which prunes nothing; then the next call
tries again, for as long as the server runs.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import os
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from sglang_deepprune.clustering import JudgeError
from sglang_deepprune.judges.lm_prompt import (
    Prompt,
    PromptWriter,
    load_settings,
    score_readable,
)
from sglang_deepprune.types import Pair

KEY_VARIABLE = "DEEPPRUNE_JUDGE_API_KEY"
_AGAIN = {408, 425, 429, 500, 502, 503, 504}
_AT_FAULT = {400, 413, 422}
_AT_ONCE = 8
_MOST_BYTES = 4 << 20  # of a reply; parsed, a hostile one takes about thirty times as much
_MOST_TOKENS = 1 << 30
_LOAD_S = 5.0  # that a server has to say what it serves while the judge loads


class Refused(JudgeError):
    """This request was at fault, not the server: the next one may be answered."""


class Circuit:
    """Closed: requests pass. Open: none does until `pause_s` are over; then one failure opens it
    again."""

    def __init__(
        self, limit: int = 3, pause_s: float = 30.0, clock: Callable[[], float] = time.monotonic
    ):
        self.limit = limit
        self.pause_s = pause_s
        self.clock = clock
        self._failures = 0  # in a row
        self._opened_s = -math.inf

    @property
    def is_open(self) -> bool:
        return self.clock() - self._opened_s < self.pause_s

    def failed(self) -> None:
        self._failures += 1
        if self._failures >= self.limit:
            self._opened_s = self.clock()

    def succeeded(self) -> None:
        self._failures = 0
        self._opened_s = -math.inf


class Http:
    """JSON over HTTP to one server: retries with back-off, verified TLS, no redirect.

    Attributes
    ----------
    until : float
        `time.monotonic()` at which the call that runs must have ended.
    """

    def __init__(self, url: str, retries: int = 2, backoff_s: float = 0.2):
        self.url = url.rstrip("/")
        self.retries = retries
        self.backoff_s = backoff_s
        self.until = math.inf

    def send(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """A JSON reply. Raises `JudgeError`; its text holds no part of a request."""
        headers = {"Content-Type": "application/json"}
        key = os.environ.get(KEY_VARIABLE)
        if key:
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        reason, kind = "no time is left", JudgeError
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(self.backoff_s * 2 ** (attempt - 1))
            left = self.until - time.monotonic()
            if left <= 0:
                break
            request = urllib.request.Request(self.url + path, data, headers)
            try:
                return _fetch(request, min(left, 3600))
            except urllib.error.HTTPError as error:
                error.close()
                reason = f"HTTP {error.code}"
                kind = Refused if error.code in _AT_FAULT else JudgeError
                if error.code not in _AGAIN:
                    break
            # Not JSON, cut off, nested without end, or no HTTP at all.
            except (OSError, ValueError, RecursionError, http.client.HTTPException) as error:
                reason, kind = type(error).__name__, JudgeError
        raise kind(f"the judge's server does not answer {path}: {reason}")


class _Watch:
    """Ends a request when its time is out. A socket's own time-out starts anew at every byte."""

    def __init__(self, limit_s: float):
        self._sockets: list[socket.socket] = []
        self._timer = threading.Timer(limit_s, self._end)
        self._timer.daemon = True

    def __enter__(self) -> _Watch:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    def opener(self) -> urllib.request.OpenerDirector:
        """One whose connections are watched."""
        note = self._sockets.append

        class Watched(urllib.request.AbstractHTTPHandler):
            def do_open(self, http_class: Any, req: Any, **args: Any) -> Any:
                class Connection(http_class):
                    def connect(self) -> None:
                        super().connect()
                        note(self.sock)

                return super().do_open(Connection, req, **args)

        class Plain(Watched, urllib.request.HTTPHandler):
            pass

        class Tls(Watched, urllib.request.HTTPSHandler):
            pass

        return urllib.request.build_opener(_NoRedirect, Plain, Tls)

    def _end(self) -> None:
        for one in self._sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)


def _fetch(request: urllib.request.Request, limit_s: float) -> Any:
    """The JSON of one reply."""
    with _Watch(limit_s) as watch, watch.opener().open(request, timeout=limit_s) as reply:
        body = reply.read(_MOST_BYTES + 1)
    if len(body) > _MOST_BYTES:
        raise ValueError("too long")
    return json.loads(body)


class RemoteJudge:
    """See the module. NaN: a trace without text."""

    name = "remote"
    mixes_groups = True

    def __init__(
        self, target: str, *, budget_s: float = 8.0, retries: int = 2, backoff_s: float = 0.2,
        circuit: Circuit | None = None,
    ):  # fmt: skip
        url, _, self._tokenizer = target.partition(",")
        self._http = Http(url, retries, backoff_s)
        self.budget_s = budget_s
        self.until = math.inf  # when whoever asks stops waiting, on the monotonic clock
        self.circuit = circuit or Circuit()
        self._prompts: PromptWriter | None = None
        self._pool = ThreadPoolExecutor(_AT_ONCE)
        self._load()

    def _load(self) -> None:
        """What takes seconds, and must not be the first batch's: the import, and the tokenizer,
        which the hub may have to send. A server may start later than we do."""
        import transformers  # noqa: F401

        self._http.until = time.monotonic() + _LOAD_S
        try:
            _ = self.prompts
        except Exception:  # whatever it was, the first call meets it too and tells of it
            if self._tokenizer:
                with contextlib.suppress(JudgeError):
                    _tokenizer(self._tokenizer)  # on this machine by now, whoever asks again
        self._http.until = math.inf

    @property
    def prompts(self) -> PromptWriter:
        """Made when the server first answers. Raises `JudgeError`."""
        if self._prompts is None:
            model, server = map(self._http.send, ("/get_model_info", "/get_server_info"))
            if not isinstance(model, dict) or not isinstance(server, dict):
                raise JudgeError("the judge's server does not say what it serves")
            source = self._tokenizer or model.get("tokenizer_path")
            if not isinstance(source, str) or not source:
                raise JudgeError("the judge's server names no tokenizer; use remote:URL,TOKENIZER")
            tokenizer = _tokenizer(source)  # first: it refuses what is no name of a folder
            self._prompts = PromptWriter(tokenizer, load_settings(source), _most_tokens(server))
        return self._prompts

    def forget(self, group_ids: Sequence[str]) -> None:
        """Texts that were kept for groups that have ended."""
        if self._prompts is not None:
            self._prompts.forget(group_ids)

    def score(self, pairs: Sequence[Pair]) -> np.ndarray:
        """[num_pairs] float32; see `Judge.score`. Raises `JudgeError` when the server does not
        answer or the circuit is open."""
        return score_readable(pairs, self._score)

    def _score(self, pairs: Sequence[Pair]) -> np.ndarray:
        if self.circuit.is_open:
            raise JudgeError("the judge's server has failed several times; it has a pause")
        # `budget_s` where nobody says how long it may take (no batch's deadline).
        is_told = self.until < math.inf
        self._http.until = self.until if is_told else time.monotonic() + self.budget_s
        try:
            scores = self._score_prompts(self.prompts.write(pairs))
        except Refused:
            raise
        except Exception:  # whatever it was: the next call would most likely meet it too
            self.circuit.failed()
            raise
        self.circuit.succeeded()
        return scores

    def _score_prompts(self, prompts: Sequence[Prompt]) -> np.ndarray:
        """[num_prompts] float32 P(same answer)."""
        by_prefix: dict[tuple[int, ...], list[int]] = {}
        for place, prompt in enumerate(prompts):
            by_prefix.setdefault(prompt.prefix, []).append(place)
        scores = np.zeros(len(prompts), dtype=np.float32)
        replies = self._pool.map(
            lambda entry: self._ask(entry[0], [prompts[i].rest for i in entry[1]]),
            by_prefix.items(),
        )
        for places, found in zip(by_prefix.values(), replies, strict=True):
            scores[places] = found
        return scores

    def _ask(self, prefix: Sequence[int], rests: Sequence[Sequence[int]]) -> list[float]:
        """P(same) of each rest after the prefix. `OpenAIServingScore.handle` answers."""
        reply = self._http.send("/v1/score", {
            "query": list(prefix), "items": [list(rest) for rest in rests],
            "label_token_ids": list(self.prompts.label_ids), "apply_softmax": True,
            "model": "default",
        })  # fmt: skip
        try:
            found = [float(same) for same, _ in reply["scores"]]
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise JudgeError("the judge's server replied with no scores") from error
        if len(found) != len(rests) or not all(0 <= one <= 1 for one in found):
            raise JudgeError("the judge's server replied with something that is no probability")
        return found


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key and the traces to another host."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _most_tokens(server: dict[str, Any]) -> int:
    """Of a prompt that the server takes: fewer than its context, which it may not name, and than
    what its KV pool leaves (SGLang's `validate_input_length`, `_validate_one_request`)."""
    limits = [server.get("context_length"), server.get("max_req_input_len")]
    known = [one for one in limits if type(one) is int and one > 1]
    return min(known, default=_MOST_TOKENS) - 1


def _tokenizer(source: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # the server names it: it may be any file, or none
        raise JudgeError(
            "the tokenizer of the judge's server is not readable here; use remote:URL,TOKENIZER"
        ) from error
