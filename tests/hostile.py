"""Hostile input for tests: how it is drawn, and what a call of ours may cost.

Examples are drawn from a fixed seed, so that a run of `make test` is like any other; under the
marker `slow` there are more of them. Time is CPU time of this thread: other work on the machine is
no fault of the code's, but for the caches that it evicts, hence `BUSY`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

STEP_LIMIT_MS = 50.0  # of whatever runs in a decode step or on an event loop
BUSY = 2.0

QUICK = settings(max_examples=100, deadline=None, derandomize=True, database=None,
                 suppress_health_check=list(HealthCheck))  # fmt: skip
FEW = settings(QUICK, max_examples=25)
LONG = settings(QUICK, max_examples=1000, derandomize=False)

# What patterns of answers, cues, marks and LaTeX begin with, go on with, or stumble over.
ATOMS = (
    "a", "A", "1", "0", "9,999", "1,", "1.", "1 ", "12 ", "(", ")", "[", "]", "{", "}", "\\{",
    "\\}", "\\boxed{", "\\fbox{", "\\frac{1}{", "\\frac", "\\sqrt", "\\sqrt[3]{8^{5000}}",
    "\\text{", "^", "_", "^{", "9^", "9^{9999}+", "2500!+", "\\binom{2500}{9}", "!", "°", "%",
    "$", "$1 ", "\\$", "\\(", "\\)", "\\[", "\\]", "=", "x=", "x=1,", "<", "x<", "\\le ", "|",
    ",", " or ", " and ", ";", " ", "\n", "\t", "\\ ", "\\,", "~", "-", "+", "/", "*", "**", "`",
    "```\n", "'", '"', ":", ".", "...", "?", "\\pm ", "(1,2)\\cup ", "\\setminus",
    "\\begin{matrix}", "&", "\\\\", "answer", "answer is ", "The answer is ", "the answer ",
    "result ", "Option ", "A, ", "B is ", "is ", "not ", "<think>", "</think>", "<|im_end|>",
    "<|im_start|>", "<answer>", "</answer>", '{"answer": ', "so ", "Therefore ", "m ", "km/",
    "cm^2 ", "1 hour ", "kilograms, ", "\u200f", "\u202e", "\u200b", "\ud800", "\udfff", "\x00",
    "\x08", "\ufffd", "ſ", "İ", "½", "²", "α", "答案", "是", "、", "，", "é", "🙂", "e\u0301",
    "1e9", "10^", "\\cdot ", "log ", "sin ", "\\overline{3}", "\\pi", "million ", "{,}",
    "I would ", "answer:\n", "####", "x_{", "a.m.", "wait ", "thus ", "等等",
)  # fmt: skip


@st.composite
def pumped(draw: st.DrawFn, size: int) -> str:
    """Prefix, one piece over and over, suffix: what makes a careless pattern look at all pairs of
    places. About `size` characters, often."""
    atoms = st.sampled_from(ATOMS)
    pieces = st.lists(atoms, min_size=1, max_size=3).map("".join)
    pump = draw(pieces)
    length = draw(st.sampled_from([size, size, size // 4, 40]))
    more = draw(st.lists(atoms, max_size=2).map("".join))
    text = pump * (length // len(pump) + 1) + more * draw(st.sampled_from([0, 1, length // 4]))
    ends = [draw(st.lists(atoms, max_size=3).map("".join)) for _ in range(2)]
    return f"{ends[0]}{text}{ends[1]}"[: 2 * size]


def hostile_text(size: int) -> st.SearchStrategy[str]:
    """Mostly pumped; sometimes any characters at all, halves of surrogate pairs too."""
    anything = st.text(st.characters(exclude_categories=()), max_size=200)
    return st.one_of(pumped(size), pumped(size), anything)


def json_values() -> st.SearchStrategy[Any]:
    """Any JSON value that a Python parser can make: NaN, infinity, numbers of a thousand digits."""
    number = st.one_of(
        st.integers(), st.integers(-5000, 5000), st.sampled_from([2**63, -(10**400), 10**4000]),
        st.floats(), st.sampled_from([1e308, -0.0, 5e-324, 0.5, 1.0, 32.0]),
    )  # fmt: skip
    scalar = st.one_of(st.none(), st.booleans(), number, hostile_text(300))
    return st.recursive(
        scalar,
        lambda inner: st.one_of(
            st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)
        ),
        max_leaves=6,
    )


def cpu_ms(call: Callable[[], Any], tries: int = 3) -> float:
    """CPU time of one call: the least of a few, the first of which may have been interrupted."""
    least = float("inf")
    for _ in range(tries):
        start = time.thread_time()
        call()
        least = min(least, (time.thread_time() - start) * 1e3)
        if least < STEP_LIMIT_MS:
            break
    return least


def longer(test: Callable[..., Any]) -> Any:
    """The same property under the marker `slow`, with more examples."""
    return pytest.mark.slow(LONG(test))
