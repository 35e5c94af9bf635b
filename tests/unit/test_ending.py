"""What of a long trace is searched for its answer. Ids are whole texts, or letters of a mark."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_deepprune.actions import End
from sglang_deepprune.answers import extract
from sglang_deepprune.config import MOST_CUT_TOKENS, DeepPruneConfig
from sglang_deepprune.coordinator import Coordinator
from sglang_deepprune.ending import TAIL_CHARS, TAIL_TOKENS, EndingReader, mark_ids_of

OPEN, CLOSE, CHANNEL = 1, 2, 3
TEXTS = {
    OPEN: "<think>", CLOSE: "</think>", CHANNEL: "<|channel|>", 4: "analysis<|message|>",
    5: "final<|message|>", 6: "So the answer is 12. Wait", 7: "\\boxed{7}", 8: "<rea", 9: "soning>",
    10: "</rea", 11: '{"steps": [{"result": 3}, ', 12: '{"result": 4}], "result": 7}', 13: "</th",
    14: "ink>", 15: "\\boxed{x}" + " " * 100,
}  # fmt: skip
VOCABULARY = {"<think>": OPEN, "</think>": CLOSE, "<|channel|>": CHANNEL, "<|im_end|>": 99}
MARKS = mark_ids_of(SimpleNamespace(get_added_vocab=lambda: VOCABULARY))
LONG = [0] * (TAIL_TOKENS + 50)
VERY_LONG = [0] * 30_000


def decode(ids: Sequence[int]) -> str:
    return "".join(TEXTS.get(one, "a ") for one in ids)


def answer(ids: Sequence[int], *, is_cut: bool = False, inside: bool = False, marks: Any = MARKS,
           field: str | None = None) -> str | None:  # fmt: skip
    ending = EndingReader(decode, marks).read(ids, starts_inside=inside, is_whole=field is not None)
    if ending is None:
        return None
    found = extract(
        ending.text, is_cut=is_cut, json_field=field, starts_in_reasoning=ending.is_inside
    )
    return found.answer if found else None


def test_marks_are_found_in_a_vocabulary():
    assert frozenset({OPEN, CLOSE, CHANNEL}) == MARKS
    assert mark_ids_of(SimpleNamespace()) == frozenset()


@pytest.mark.parametrize("marks", [MARKS, ()])
@pytest.mark.parametrize("thinking", [LONG, [0] * 6000])
def test_a_trace_that_is_cut_in_its_own_thinking_abstains(marks: Any, thinking: list[int]):
    assert answer([OPEN, *thinking, 6], is_cut=True, marks=marks) is None
    assert answer([*thinking, 6], is_cut=True, inside=True, marks=marks) is None
    assert answer([*thinking, 6], is_cut=True, marks=marks) == "12"


@pytest.mark.parametrize("marks", [MARKS, ()])
def test_a_final_section_that_is_longer_than_the_tail_votes(marks: Any):
    assert answer([0, CLOSE, *LONG, 7], inside=True, marks=marks) == "7"
    assert answer([OPEN, *LONG, CLOSE, *LONG, 7], marks=marks) == "7"
    assert answer([0, 13, 14, *LONG, 7], inside=True, marks=()) == "7"


def test_a_mark_as_a_token_is_found_however_far_it_stands():
    assert answer([0, CLOSE, *VERY_LONG, 7], inside=True) == "7"
    assert answer([0] * 500 + [OPEN, *VERY_LONG, 6], is_cut=True) is None


def test_a_long_trace_is_not_walked_token_by_token():
    """Many siblings may end in one step, which all others wait for."""

    class Ids(list[int]):
        looks = 0

        def __getitem__(self, place: Any) -> Any:
            self.looks += isinstance(place, int)
            return super().__getitem__(place)

    reader = EndingReader(decode, MARKS)
    ids = Ids([*VERY_LONG, CLOSE, *VERY_LONG, 7])
    ending = reader.read(ids, starts_inside=True)
    assert ending is not None and not ending.is_inside and ids.looks <= 1024
    for place in range(2048):  # wherever in a run it stands
        ids = Ids([OPEN, *[0] * place, CLOSE, *LONG])
        assert reader._at(ids, place + 2, False, TAIL_TOKENS) == (False, place + 1)
        assert reader._at(ids, place + 1, False, TAIL_TOKENS) == (True, 0)


def test_a_channel_is_told_by_the_word_behind_it():
    assert answer([CHANNEL, 4, *LONG, 6], is_cut=True) is None
    assert answer([CHANNEL, 4, *LONG, CHANNEL, 5, *LONG, 7]) == "7"
    assert answer([CHANNEL, 4, *[CHANNEL, 0] * 2000, 6], is_cut=True) is None


def test_a_mark_of_several_tokens_is_read_beside_those_that_are_one():
    assert answer([8, 9, *LONG, 6], is_cut=True) is None
    assert answer([8, 9, *LONG, 10, 9, *LONG, 7]) == "7"


def test_without_its_mark_in_sight_the_thinking_counts_as_open():
    assert answer([0] * 100 + [13, 14, *VERY_LONG, 7], inside=True, marks=()) is None


def test_marks_in_front_of_the_last_characters_count():
    spaces = [15] * (TAIL_CHARS // 100)
    assert answer([OPEN, *spaces, 6], is_cut=True) is None
    assert answer([0, CLOSE, *spaces, 7], inside=True) == "7"


@pytest.mark.parametrize("marks", [MARKS, ()])
def test_a_field_is_read_from_the_whole_of_a_structured_output(marks: Any):
    whole = [11, *LONG, 12]
    ending = EndingReader(decode, marks).read(whole, starts_inside=False, is_whole=True)
    assert ending is not None and ending.text == decode(whole)
    body = ['{"why": "', *["a "] * (TAIL_TOKENS + 50), '", "result": 7}']
    texts = dict(enumerate(body, start=100))
    TEXTS.update(texts)
    assert answer([*texts], field="result", marks=marks) == "7"
    assert answer([OPEN, *LONG, CLOSE, *texts], field="result", marks=marks) == "7"


def test_a_structured_output_that_is_too_long_abstains():
    assert answer([*LONG, 12], field="result") is not None
    assert answer([0] * MOST_CUT_TOKENS + [12], field="result") is None
    assert answer([15] * (TAIL_CHARS // 100) + [12], field="result") is None
    assert answer([OPEN, *VERY_LONG, CLOSE, 12], field="result") is not None


def test_the_coordinator_reads_endings_so():
    c = Coordinator(DeepPruneConfig(preset="collect"), decode, mark_ids=MARKS)
    for index in range(3):
        c.admit("g", index, 3, {"answer_field": "result"} if index else {}, 9999)
    c.vote("g", [End(0, [OPEN, *LONG, 6], True), End(1, [OPEN, *LONG, CLOSE, *LONG, 7], False)])
    siblings = c.runs["g"].group.siblings
    assert (siblings[0].answer, siblings[1].answer) == (None, "7")
    c.admit("h", 0, 2, {"answer_field": "result"}, 99_999)
    c.vote("h", [End(0, [0] * MOST_CUT_TOKENS + [12], False)])
    assert c.runs["h"].group.siblings[0].has_voted
    assert c.runs["h"].group.siblings[0].answer is None
