"""Extraction and comparison of answers, over our own cases and hostile inputs. No server."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_deepprune.answers import Extraction, Fence, canonical, compare, extract
from sglang_deepprune.answers.equivalence import equivalent

CASES = [
    json.loads(line)
    for line in Path(__file__).with_name("answer_cases.jsonl").read_text("utf-8").split("\n")
    if line
]
ANSWERS = sorted({case["extracted"] for case in CASES if case["extracted"] is not None})
MATHS = st.text(
    alphabet="0123456789xyeiA.,;:+-*/^_!%$€°|<>=(){}[]\\ \u200b−½ fracsqtpminboxd", max_size=60
)
HOSTILE = {
    "open boxes": "\\boxed{" * 100_000,
    "closed boxes": "\\boxed{1}" * 60_000,
    "boxes of braces": "\\boxed{" + "{" * 500_000,
    "closing braces": "}" * 500_000,
    "backslashes": "\\" * 500_000,
    "cues": "the answer is " * 40_000,
    "heading": "answer\n" * 60_000,
    "blank": "answer" + " " * 500_000 + "x",
    "think marks": "<think>" * 70_000,
    "closing think marks": "</think>" * 60_000,
    "angle brackets": "<|" * 250_000,
    "tags": "<answer>" * 60_000 + "</answer>",
    "json": '{"answer":' * 50_000,
    "lists": "A, " * 150_000,
    "digits": "1" * 500_000,
    "surrogates": "\ud800" * 500_000,
    "zero width": "\u200b" * 500_000,
    "text macros": "\\boxed{" + "\\text{" * 50_000 + "}" * 50_001,
    "fractions": "\\boxed{" + "\\frac" * 50_000 + "}",
    "powers": "\\boxed{" + "9^" * 1_900 + "9}",
    "zeros": "\\boxed{0." + "0" * 4_000 + "1}",
    "commas": "\\boxed{" + "1," * 2_000 + "1}",
    "signs": "\\boxed{" + "-" * 4_000 + "1}",
    "units": "\\boxed{5 " + "m/" * 2_000 + "}",
    "plus-minus": "\\boxed{" + "\\pm " * 900 + "}",
}


def is_same(a: Extraction | None, b: Extraction | None) -> bool:
    return a is not None and b is not None and equivalent(a.answer, b.answer)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['id']}-{case['kind']}")
def test_case_has_the_stated_verdict_and_extraction(case: dict[str, Any]) -> None:
    left, right = extract(case["text"]), extract(case["other_text"])
    assert is_same(left, right) == case["same"]
    assert is_same(right, left) == case["same"]
    if case["extracted"] is None or left is None:
        assert left is None and case["extracted"] is None
    else:
        assert compare(left.answer, case["extracted"]) is True


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_fast_comparison_never_contradicts_the_slow_one(case: dict[str, Any]) -> None:
    left, right = extract(case["text"]), extract(case["other_text"])
    if left is not None and right is not None:
        fast = compare(left.answer, right.answer)
        assert fast is None or fast == equivalent(left.answer, right.answer)


@pytest.mark.parametrize(
    ("a", "b", "verdict"),
    [
        ("12", "12.0", True),
        ("3/4", "0.75", True),
        ("\\frac{1}{3}", "0.333", False),
        ("17", "18", False),
        ("B", "C", False),
        ("b", "B", True),
        ("yes", "no", False),
        ("Paris", "12", False),
        ("x+1", "1+x", None),
        ("\\sqrt{8}", "2\\sqrt{2}", None),
    ],
)
def test_plain_answers_are_decided_without_algebra(a: str, b: str, verdict: bool | None) -> None:
    assert compare(a, b) is verdict
    assert compare(b, a) is verdict


@pytest.fixture(scope="module")
def fence() -> Iterator[Fence]:
    fence = Fence()
    yield fence
    fence.close()


@given(st.sampled_from(ANSWERS), st.sampled_from(ANSWERS))
@settings(max_examples=400, deadline=None)
def test_compare_is_symmetric_on_answers(a: str, b: str) -> None:
    assert compare(a, b) is compare(b, a)


@given(MATHS, MATHS)
@settings(max_examples=400, deadline=None)
def test_compare_and_canonical_survive_any_string(a: str, b: str) -> None:
    assert compare(a, b) is compare(b, a)
    assert compare(a, a) is True
    assert canonical(canonical(a)) is not None


@given(st.sampled_from(ANSWERS), st.sampled_from(ANSWERS))
@settings(max_examples=60, deadline=None)
def test_equivalent_is_symmetric(fence: Fence, a: str, b: str) -> None:
    # Behind the fence, as in the engine: some pairs are towers of exponents that never end.
    there, back = fence.equivalent(a, b), fence.equivalent(b, a)
    assert there == back


@given(
    st.fractions(), st.sampled_from(["{0}/{1}", "\\frac{{{0}}}{{{1}}}", "\\dfrac{{{0}}}{{{1}}}"])
)
@settings(deadline=None)
def test_every_spelling_of_a_fraction_has_one_canonical_form(value: Any, form: str) -> None:
    text = form.format(3 * value.numerator, 3 * value.denominator)
    assert canonical(text) == str(value)


@given(st.text(max_size=300), st.booleans())
@settings(deadline=None)
def test_extract_survives_any_text(text: str, is_cut: bool) -> None:
    found = extract(text, is_cut=is_cut)
    assert found is None or found.answer


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_costs_linear_time(name: str) -> None:
    text = HOSTILE[name]
    start = time.process_time()
    found = extract(text)
    extract(text, is_cut=True)
    answer = found.answer if found else text
    canonical(answer)
    compare(answer, answer[1:])
    compare(text[:4_000], "x+1")
    # A quadratic pass over half a megabyte would take minutes.
    assert time.process_time() - start < 3.0


def test_a_typical_trace_costs_a_few_milliseconds() -> None:
    text = "We have x^2 = 4 and so x = 2. The result is not yet clear. " * 135
    extract(text + "The answer is 5.")
    start = time.process_time()
    for _ in range(10):
        assert extract(text + "The answer is 5.") == Extraction("5", "statement")
    assert (time.process_time() - start) / 10 < 0.05


def test_huge_numbers_are_compared_without_being_written_out() -> None:
    start = time.process_time()
    assert not equivalent("10^{10000000}", "10^{10000000}+1")
    assert equivalent("2^{2^{64}}", "4^{2^{63}}")
    assert not equivalent("9^{9^{9^{9}}}", "8^{8^{8^{8}}}")
    assert time.process_time() - start < 2.0


def test_answer_only_in_the_thinking_is_flagged() -> None:
    found = extract("<think>So \\boxed{5}.</think>")
    assert found is not None and found.from_reasoning and found.answer == "5"
    found = extract("<think>So \\boxed{5}.</think>The answer is 6.")
    assert found is not None and not found.from_reasoning and found.answer == "6"


@pytest.mark.parametrize(
    "text",
    [
        "<think>First, 3 + 4 = 7, so the answer is 7.",
        "<think>So \\boxed{5}.</think>",
        "12",
        "Therefore x = 12.",
        "**12**",
        "The answer is 12",
        "So \\boxed{1",
        '{"answer": 12',
        "The answer seems to be 12.",
    ],
)
def test_fragment_of_a_cut_trace_abstains(text: str) -> None:
    """A stop string inside the thinking must not vote with an intermediate value."""
    assert extract(text, is_cut=True) is None


@pytest.mark.parametrize(
    "text",
    [
        "The answer is 12. Let me also",
        "\\boxed{12}. To double-check",
        "<think>3</think>\\boxed{12}",
    ],
)
def test_complete_statement_of_a_cut_trace_counts(text: str) -> None:
    found = extract(text, is_cut=True)
    assert found is not None and found.answer == "12"


def test_block_opened_by_the_prompt_hides_a_cut_trace() -> None:
    text = "Half of 24 is \\boxed{12}. Then"
    assert extract(text, is_cut=True, starts_in_reasoning=True) is None
    assert extract(text + "</think>\\boxed{9}", starts_in_reasoning=True) == Extraction("9", "box")


def test_named_json_field_wins() -> None:
    text = '{"answer": "1", "total": 2.50}'
    assert extract(text, json_field="total") == Extraction("2.50", "json")
    assert extract(text) == Extraction("1", "json")


def test_oversized_answers_have_bounded_canonical_forms() -> None:
    long = "x+" * 500_000 + "x"
    assert len(canonical(long)) < 100
    assert canonical(long) == canonical(long)
    assert canonical(long) != canonical(long + "+x")


def test_nested_sets_cost_a_bounded_number_of_comparisons() -> None:
    """Eight sets of eight sets of eight formulas once took fifteen seconds, in a decode step."""

    def nested(name: str, depth: int, index: int = 0) -> str:
        if depth == 0:
            return f"{name}+{index}"
        members = (nested(name, depth - 1, index * 8 + i) for i in range(8))
        return "\\{" + ",".join(members) + "\\}"

    start = time.process_time()
    assert compare(nested("x", 3), nested("y", 3)) is None
    assert time.process_time() - start < 1.0


@pytest.mark.parametrize(
    ("a", "b"),
    [("3万", "3億"), ("101_2", "101_3"), ("0x1F", "0x1E"), ("2^{3}5", "2^{35}"),
     ("\\sin^{-1}(x)", "\\frac{1}{\\sin x}"), ("1:2:3", "1:3:2"), ("5千米", "5米")],
)  # fmt: skip
def test_what_the_algebra_cannot_read_is_not_the_same(a: str, b: str) -> None:
    """Math-Verify leaves out what it does not know, and finds the rest equal."""
    assert not equivalent(a, b) and not equivalent(b, a)


def test_deep_nesting_ends() -> None:
    """Math-Verify took more than ten minutes for this."""
    start = time.process_time()
    assert not equivalent("\\frac{" * 60 + "1" + "}{2}" * 60, "1")
    assert time.process_time() - start < 1.0


@pytest.mark.parametrize(
    "text",
    [
        "Is it possible that 2.37 is the answer?",
        "Suppose 4 is the answer.",
        "Maybe 4 is the answer to this.",
        "The answer is $\\frac{3}{",
        "So the answer is \\boxed",
        '{"answer": "N/A"}',
        "\\boxed{\\text{I don't know}}",
    ],
)
def test_a_thought_or_a_fragment_is_no_answer(text: str) -> None:
    assert extract(text) is None
