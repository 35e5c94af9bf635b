"""Hostile traces and answers: no call of the decode step takes long, keeps much, or raises."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_deepprune.answers import canonical, compare, extract
from sglang_deepprune.answers.folding import MAX_CHARS
from sglang_deepprune.ending import TAIL_CHARS
from sglang_deepprune.truncation import TokenCut, WordCut
from sglang_deepprune.voting import BALLOT_WORK, MAX_QUESTIONS, Ballot, Tally
from sglang_deepprune.words import REASONING_WORDS
from tests.hostile import BUSY, QUICK, STEP_LIMIT_MS, cpu_ms, hostile_text, longer

LIMIT_MS = BUSY * STEP_LIMIT_MS

EXPONENTS = "^".join(["9"] * 300)
ANSWERS = {
    "units": ", ".join(f"{i}x kilograms" for i in range(40)),
    "nested sets": "\\{" + ",".join("\\{x+1,x+2,x+3,x+4\\}" for _ in range(24)) + "\\}",
    "named": ", ".join(f"x=y+{i}" for i in range(64)),
    "intervals": "\\cup ".join(f"({i}+x,{i}+y)" for i in range(32)),
    "plus-minus": ", ".join(f"x\\pm {i}" for i in range(32)),
    "factorials": "+".join(["2500!"] * 90),
    "roots": "+".join(["\\sqrt[3]{8^{5000}/27^{900}}"] * 20),
    "exponents": EXPONENTS,
    "powers": ", ".join(f"9^9999+{i}" for i in range(50)),
    "halves": "½" * MAX_CHARS,
    "spaces": "1 h " + " " * (MAX_CHARS - 10) + "e",
    "surrogates": "\ud800" * MAX_CHARS,
    "digits": "1" * MAX_CHARS,
    "braces": "{" * MAX_CHARS,
    "commands": "\\frac" * 400,
    "megabyte": "x+" * 500_000,
}
TRACES = {
    "option and control tokens": "Option " + "<|im_end|>" * 3200,
    "spaces behind a cue": "the answer" + " " * 32_000 + "is",
    "line ends behind a cue": "The result of" + "\n" * 32_000,
    "stars behind a cue": "answer" + "*" * 16_000 + "_" * 16_000,
    "cues": "the answer of the answer " * 1300,
    "boxes": "\\boxed{1}" * 10_000,
    "open boxes": "\\boxed{" * 10_000,
    "ten thousand boxes of the same": ("\\boxed{" + "x+" * 20 + "1} and ") * 10_000,
    "unbalanced": "}{" * 16_000,
    "tags": "<answer>The answer is {,}" * 1300 + "</answer>",
    "think marks": "<think></think>" * 2100,
    "json": '{"answer": ' * 3000,
    "fences": "```\n" * 8000,
    "control": "<|" * 16_000,
    "nul": "\x00" * 32_000,
    "right to left": "\u202e\u200f" * 16_000,
    "lone surrogates": "\ud800\udfff" * 16_000,
}


def forget() -> None:
    """Nothing is in a cache: the first time is the dearest."""
    modules = [
        sys.modules[f"sglang_deepprune.answers.{n}"] for n in ("canonical", "shapes", "exact")
    ]
    modules.append(sys.modules["sglang_deepprune.answers.compare"])
    for module in modules:
        for one in vars(module).values():
            if hasattr(one, "cache_clear"):
                one.cache_clear()


def cold_ms(call: Callable[[], Any]) -> float:
    times = []
    for _ in range(2):
        forget()
        times.append(cpu_ms(call, tries=1))
    return min(times)


def check_trace(text: str) -> None:
    """As `Coordinator.vote` does it."""
    text = text[-TAIL_CHARS:]
    for is_cut in (False, True):
        found = extract(text, is_cut=is_cut)
        assert found is None or 0 < len(found.answer) <= MAX_CHARS
        spent = cpu_ms(functools.partial(extract, text, is_cut=is_cut))
        assert spent < LIMIT_MS, f"{spent:.0f} ms"
    extract(text, json_field="answer", starts_in_reasoning=True)


@pytest.mark.parametrize("name", TRACES)
def test_a_known_trace_is_read_within_a_step(name: str):
    check_trace(TRACES[name])


@QUICK
@given(hostile_text(16_000))
def test_any_trace_is_read_within_a_step(text: str):
    check_trace(text)


@longer
@given(hostile_text(32_000))
def test_any_trace_at_length(text: str):
    check_trace(text)


def check_pair(a: str, b: str) -> None:
    verdict = compare(a, b)
    assert verdict is compare(b, a)
    assert compare(a, a) is True
    assert len(canonical(a)) <= 64 * MAX_CHARS
    spent = cold_ms(lambda: compare(a, b))
    assert spent < LIMIT_MS, f"{spent:.0f} ms"


@pytest.mark.parametrize("name", ANSWERS)
def test_known_answers_are_compared_within_a_step(name: str):
    answer = ANSWERS[name]
    for other in (answer[:-1] + "7", answer.replace("x", "z"), answer[::2], "x+1", "12"):
        check_pair(answer, other)


@QUICK
@given(hostile_text(600), hostile_text(600))
def test_any_answers_are_compared_within_a_step(a: str, b: str):
    check_pair(a, b)
    check_pair(a, a[:-1] + b[:1])


@longer
@given(hostile_text(2000), hostile_text(600))
def test_any_answers_at_length(a: str, b: str):
    check_pair(a, b)


@pytest.mark.parametrize("kind", ["units", "sets", "numbers", "factorials", "long"])
def test_a_ballot_among_hundreds_of_others_is_counted_within_a_step(kind: str):
    make: dict[str, Callable[[int], str]] = {
        "units": lambda i: ", ".join(f"{i + j}x kilograms" for j in range(30)),
        "sets": lambda i: "\\{" + ",".join(f"x+{i * 20 + j}" for j in range(20)) + "\\}",
        "numbers": str,
        "factorials": lambda i: "+".join(["2500!"] * 80) + f"+{i}",
        "long": lambda i: f"x+{i}" + "+y" * 800,
    }
    forget()
    tally = Tally()
    slowest = 0.0
    for sibling in range(400):
        answer = make[kind](sibling)
        if sibling % 40:
            tally.add(Ballot(answer, sibling))
        else:
            add = functools.partial(tally.add, Ballot(answer, sibling))
            slowest = max(slowest, cpu_ms(add, tries=1))
    assert slowest < LIMIT_MS, f"{slowest:.0f} ms"
    assert tally.num_votes == 400 and len(tally.open_questions) <= MAX_QUESTIONS


def test_work_is_counted_and_runs_out():
    """Who says the same in the same words joins after that, too; the vote goes on."""
    tally = Tally()
    asked = 0

    def doubtful(a: str, b: str) -> None:
        nonlocal asked
        asked += 1

    tally = Tally(doubtful)
    for sibling in range(1000):
        before = asked
        tally.add(Ballot(f"x+{sibling}", sibling))
        assert asked - before <= BALLOT_WORK
    assert asked < 20_000
    tally.add(Ballot("x+999", 1000))
    assert tally.leader is not None and tally.leader.siblings == (999, 1000)


def test_no_cache_is_without_a_bound_and_none_keeps_a_long_text():
    modules = [m for name, m in sys.modules.items() if name.startswith("sglang_deepprune.answers.")]
    caches = {
        f"{one.__module__}.{one.__name__}": one.cache_parameters()["maxsize"]
        for module in modules for one in vars(module).values() if hasattr(one, "cache_parameters")
    }  # fmt: skip
    assert len(caches) >= 5
    assert [name for name, size in caches.items() if size is None] == [
        "sglang_deepprune.answers.exact._totient"  # of three primes, and theirs
    ]
    forget()
    found = extract("\\boxed{" + "x" * 60_000 + "}")
    assert found is None
    canonical_module: Any = sys.modules["sglang_deepprune.answers.canonical"]
    assert canonical_module._canonical.cache_info().currsize == 0


# -- the cut -----------------------------------------------------------------------------------


def decode(ids: Any) -> str:
    return "".join(map(chr, ids))


def check_cut(text: str, share: int) -> None:
    """The same cut, however little is looked at in one call; and no more than its share is."""
    ids = [ord(c) for c in text]
    for make in (lambda: WordCut(5, 2000, REASONING_WORDS, decode), lambda: TokenCut(700, decode)):
        whole, pieces = make(), make()
        point = whole.advance(ids)
        found = None
        for _ in range(10_000):
            before = pieces.num_decoded
            found = pieces.advance(ids, share)
            # A whole text, asked for once or twice, is the least.
            assert pieces.num_decoded - before <= share + 4 * 2000
            if found is not None or not pieces.is_behind:
                break
        assert found == point
        assert whole.end(ids) == pieces.end(ids)


@QUICK
@given(hostile_text(3000), st.integers(0, 400))
def test_a_cut_does_not_depend_on_how_much_is_read_at_once(text: str, share: int):
    check_cut(text, share)


@longer
@given(hostile_text(3000), st.integers(0, 400))
def test_a_cut_at_length(text: str, share: int):
    check_cut(text, share)
