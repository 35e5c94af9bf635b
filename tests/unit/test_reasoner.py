"""The embedded reasoner: exact questions, right gold traces, a lossless tokenizer, real weights."""

from __future__ import annotations

import random
import re
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_deepprune.reasoner import Question, model_path, questions
from sglang_deepprune.reasoner.evaluate import (
    Outcome,
    boxed_answer,
    measure,
    summarise,
    tabulate,
    vote,
)
from sglang_deepprune.reasoner.questions import DIFFICULTIES, MAX_TERMS, parse_terms
from sglang_deepprune.reasoner.sampling import Sample, load, render, sample
from sglang_deepprune.reasoner.tokenizer import build_tokenizer
from sglang_deepprune.reasoner.traces import WORDS, count_reasoning_words, write_trace

TOKENIZER = build_tokenizer()
LEVELS = st.sampled_from(DIFFICULTIES)
SEEDS = st.integers(0, 2**32)
EQUATION = re.compile(r"(\d+) ([-+*]) (\d+) = (\d+)")


def encode(text: str) -> list[int]:
    return list(TOKENIZER(text)["input_ids"])


# Questions


@given(SEEDS, LEVELS)
def test_the_answer_of_a_question_is_what_python_computes(seed: int, level: str) -> None:
    for question in questions(seed, 3, level):
        expression = question.prompt.removeprefix("What is ").removesuffix(" ?")
        assert eval(expression) == int(question.answer)


@given(SEEDS, LEVELS)
def test_no_partial_sum_from_either_end_is_negative(seed: int, level: str) -> None:
    (question,) = questions(seed, 1, level)
    values = [term.sign * term.size for term in parse_terms(question.prompt)]
    assert min(accumulate(values)) >= 0
    assert min(accumulate(reversed(values))) >= 0


def test_the_same_seed_asks_the_same_questions_and_another_seed_others() -> None:
    assert questions(7, 20) == questions(7, 20)
    assert set(questions(7, 20)).isdisjoint(questions(8, 20))


def test_asking_for_more_questions_keeps_the_first_ones() -> None:
    assert questions(7, 20)[:8] == questions(7, 8)


def test_mixed_questions_take_the_levels_in_turn() -> None:
    assert [q.difficulty for q in questions(0, 8)] == [*DIFFICULTIES, *DIFFICULTIES]


@pytest.mark.parametrize("count", [2, 3, 6, 11, 20, MAX_TERMS])
def test_a_number_as_difficulty_is_the_number_of_terms(count: int) -> None:
    for question in questions(0, 5, count):
        assert len(parse_terms(question.prompt)) == count


@pytest.mark.parametrize("difficulty", ["trivial", 1, MAX_TERMS + 1])
def test_an_unknown_difficulty_is_refused(difficulty: str | int) -> None:
    with pytest.raises(ValueError, match="difficulty"):
        questions(0, 1, difficulty)


# Gold traces


@given(SEEDS, LEVELS)
def test_a_gold_trace_is_right_and_ends_with_the_boxed_answer(seed: int, level: str) -> None:
    (question,) = questions(seed, 1, level)
    trace = write_trace(question, random.Random(seed), slip=0.3)
    assert trace.startswith("<think> ")
    assert trace.endswith(f"</think> thus the answer is \\boxed{{{question.answer}}}")


@given(SEEDS, LEVELS)
def test_without_slips_every_step_of_a_trace_is_true(seed: int, level: str) -> None:
    (question,) = questions(seed, 1, level)
    steps = EQUATION.findall(write_trace(question, random.Random(seed), slip=0))
    assert len(steps) >= len(parse_terms(question.prompt)) - 1
    for left, sign, right, result in steps:
        assert eval(f"{left} {sign} {right}") == int(result)


def test_missed_slips_give_various_wrong_answers() -> None:
    (question,) = questions(3, 1, "hard")
    rng = random.Random(0)
    traces = [write_trace(question, rng, slip=0.2, missed=1.0) for _ in range(100)]
    assert len({boxed_answer(trace) for trace in traces}) > 10


def test_traces_of_one_question_differ() -> None:
    (question,) = questions(3, 1, "middle")
    rng = random.Random(0)
    assert len({write_trace(question, rng) for _ in range(50)}) == 50


def test_the_harder_half_reasons_for_25_words_and_150_to_400_tokens() -> None:
    rng = random.Random(0)
    asked = [q for q in questions(5, 400) if q.difficulty in DIFFICULTIES[2:]]
    traces = [write_trace(question, rng) for question in asked]
    words = sorted(map(count_reasoning_words, traces))
    lengths = sorted(len(encode(trace)) for trace in traces)
    assert words[len(words) // 2] >= 25
    assert 150 <= lengths[len(lengths) // 2] <= 400
    assert lengths[-1] < 1000


# Tokenizer


@given(st.text())
def test_any_text_survives_encoding_and_decoding(text: str) -> None:
    assert TOKENIZER.decode(encode(text)) == text


@given(SEEDS, LEVELS)
def test_a_trace_decoded_token_by_token_is_the_whole_trace(seed: int, level: str) -> None:
    (question,) = questions(seed, 1, level)
    trace = write_trace(question, random.Random(seed))
    ids = encode(trace)
    assert "".join(TOKENIZER.decode([i]) for i in ids) == TOKENIZER.decode(ids) == trace


@given(st.text("0123456789 +-x"))
def test_no_token_holds_two_digits(text: str) -> None:
    for i in encode(text):
        assert sum(c.isdigit() for c in TOKENIZER.decode([i])) <= 1


def test_words_marks_and_the_box_are_single_visible_tokens() -> None:
    for text in (*(f" {word}" for word in WORDS), "<think>", "</think>", "\\boxed{", "}"):
        assert len(encode(text)) == 1, text
        assert TOKENIZER.decode(encode(text), skip_special_tokens=True) == text


def test_the_chat_template_passes_the_question_through() -> None:
    text = render(TOKENIZER, "What is 1 + 2 ?")
    assert text == "<|im_start|>user\nWhat is 1 + 2 ?<|im_end|>\n<|im_start|>assistant\n"


# Votes and rows


def outcome(answers: str, right: str = "a") -> Outcome:
    marks = tuple(None if letter == "-" else letter for letter in answers)
    samples = tuple(Sample("so wait", 2, True) for _ in marks)
    return Outcome(Question("?", right, "easy"), samples, marks)


def test_a_vote_takes_the_plurality_and_the_first_on_a_tie() -> None:
    assert vote(["b", "a", "a", None, None, None]) == "a"
    assert vote(["b", "a"]) == "b"
    assert vote([None]) is None


def test_pairs_without_an_answer_do_not_agree() -> None:
    assert outcome("aabb").same_answer_rate() == pytest.approx(2 / 6)
    assert outcome("----").same_answer_rate() == 0


def test_small_ballots_are_disjoint_parts_of_all_samples() -> None:
    assert outcome("aab" + "bba").vote_accuracy(3) == 0.5


def test_a_row_counts_samples_over_all_questions() -> None:
    row = summarise("easy", [outcome("aa"), outcome("ab")], 2)
    assert (row["single"], row["wrong_answers"], row["words"], row["ended"]) == (0.75, 0.5, 2, 1)


def test_the_last_box_is_the_answer() -> None:
    assert boxed_answer("\\boxed{1} or \\boxed{ 23 }") == "23"
    assert boxed_answer("\\boxed{") is None


# The packaged checkpoint


@pytest.fixture(scope="module")
def reasoner() -> tuple[Any, Any]:
    return load(model_path())


def test_the_checkpoint_is_small() -> None:
    assert sum(f.stat().st_size for f in Path(model_path()).iterdir()) < 4_000_000


def test_the_model_is_small_and_its_vocabulary_fits_a_server(reasoner: tuple[Any, Any]) -> None:
    model, _ = reasoner
    assert sum(p.numel() for p in model.parameters()) <= 2_000_000
    assert model.config.vocab_size % 64 == 0
    assert model.config.model_type == "qwen3"


def test_the_packaged_tokenizer_is_the_built_one(reasoner: tuple[Any, Any]) -> None:
    _, tokenizer = reasoner
    assert tokenizer.get_vocab() == TOKENIZER.get_vocab()
    assert tokenizer.chat_template == TOKENIZER.chat_template
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")


def test_easy_questions_are_mostly_right_and_always_answered(reasoner: tuple[Any, Any]) -> None:
    outcomes = measure(*reasoner, questions(99, 8, "easy"), size=4)
    (row, _) = tabulate(outcomes, 4)
    assert row["single"] >= 0.7
    assert row["ended"] == 1
    for one in outcomes:
        for trace in one.samples:
            assert re.search(r"^<think> .* </think> thus the answer is \\boxed\{\d+\}$", trace.text)


def test_the_bare_question_is_answered_too(reasoner: tuple[Any, Any]) -> None:
    (question,) = questions(99, 1, "easy")
    (trace,) = sample(*reasoner, [question.prompt], temperature=0)
    assert boxed_answer(trace.text) is not None


def test_sampling_is_seeded(reasoner: tuple[Any, Any]) -> None:
    prompts = [question.prompt for question in questions(99, 4, "easy")]
    first, same, other = (sample(*reasoner, prompts, seed=seed) for seed in (1, 1, 2))
    assert first == same != other


@settings(max_examples=5, deadline=None)
@given(text=st.text(max_size=40))
def test_any_user_text_gets_an_ending_in_bounds(reasoner: tuple[Any, Any], text: str) -> None:
    (trace,) = sample(*reasoner, [render(reasoner[1], text)], max_tokens=20)
    assert 1 <= trace.num_tokens <= 20
