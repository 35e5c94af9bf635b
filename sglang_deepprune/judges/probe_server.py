"""Recorded traces, probed: an SGLang server is asked what the engine would ask a fork.

For studies (`eval-judge`) of traces that nobody decodes any more. Each trace is asked once, by a
whole prefill; the closing text and the reading of what comes back are those of `probing.py`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from sglang_deepprune.clustering import JudgeError
from sglang_deepprune.judges.probe import ProbeJudge
from sglang_deepprune.judges.remote import Http
from sglang_deepprune.probing import CLOSING, MAX_TOKENS, THINK_MARKS, read
from sglang_deepprune.types import Pair, Reading, Trace

_MAX_TEXTS = 4096
_AT_ONCE = 8
_ROUNDING = 1e-3  # by which a log-probability may be above 0


class ProbeServerJudge:
    """Scores as `probe` does, whatever the probability of a reading.

    Parameters
    ----------
    target : str
        URL or URL,CLOSING: where the serving model answers, and the text that opens the box.
    budget_s : float
        Seconds for one call of `score`.
    """

    name = "probe-server"
    mixes_groups = True

    def __init__(self, target: str, *, budget_s: float = 600.0) -> None:
        url, _, closing = target.partition(",")
        self.closing = closing or CLOSING
        self.budget_s = budget_s
        self._http = Http(url)
        self._probe = ProbeJudge()
        self._readings: dict[str, Reading | None] = {}  # what was asked -> what was read

    def score(self, pairs: Sequence[Pair]) -> np.ndarray:
        """[num_pairs] float32 in [0, 1]; see `Judge.score`. Raises `JudgeError` when the server
        does not answer."""
        self._ask_all({trace for pair in pairs for trace in (pair.left, pair.right)})
        told = [Pair(self._told(one.left), self._told(one.right)) for one in pairs]
        return self._probe.score(told)

    def _told(self, trace: Trace) -> Trace:
        return replace(trace, reading=self._readings.get(self._question(trace)))

    def _question(self, trace: Trace) -> str:
        """An open think block is closed first."""
        text = trace.text
        for start, end in THINK_MARKS.items():
            if start in text and end not in text:
                text = f"{text} {end}"
        joint = "" if not trace.prompt or trace.prompt[-1].isspace() else " "
        return f"{trace.prompt}{joint}{text}{self.closing}"

    def _ask_all(self, traces: Iterable[Trace]) -> None:
        """Those that have said nothing yet, once each, a few at a time."""
        self._http.until = time.monotonic() + self.budget_s
        if len(self._readings) > _MAX_TEXTS:
            self._readings.clear()
        open_ = [one for one in traces if one.answer is None and one.text.strip()]
        new = list({self._question(one) for one in open_} - self._readings.keys())
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            self._readings.update(zip(new, pool.map(self._ask, new), strict=True))

    def _ask(self, text: str) -> Reading | None:
        params = {"temperature": 0.0, "max_new_tokens": MAX_TOKENS}
        body = {"text": text, "sampling_params": params, "return_logprob": True,
                "return_text_in_logprobs": True}  # fmt: skip
        reply = self._http.send("/generate", body)
        try:
            tokens = [(float(p), str(s)) for p, _, s in reply["meta_info"]["output_token_logprobs"]]
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise JudgeError("the probed server replied with no tokens") from error
        if len(tokens) > MAX_TOKENS or not all(p < _ROUNDING for p, _ in tokens):  # nor NaN
            raise JudgeError("the probed server replied with something that is no log-probability")
        pieces = [piece for _, piece in tokens]
        return read(
            range(len(pieces)), [min(1.0, math.exp(logprob)) for logprob, _ in tokens],
            lambda places: "".join(pieces[place] for place in places),
        )  # fmt: skip
