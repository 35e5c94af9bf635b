"""A cue that is only looked for where its words stand finds what it finds everywhere."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_deepprune.answers import cues
from sglang_deepprune.answers.places import MOST, caseless, last_matches, most_places
from sglang_deepprune.answers.statements import _RUN, _shortened
from tests.hostile import FEW, QUICK, STEP_LIMIT_MS, cpu_ms, hostile_text, longer

CUES = {
    "ANSWER": (cues.ANSWER, cues.ANSWER_WORDS),
    "RESULT": (cues.RESULT, cues.RESULT_WORDS),
    "TENTATIVE": (cues.TENTATIVE, cues.TENTATIVE_WORDS),
    "VALUE_FIRST": (cues.VALUE_FIRST, cues.VALUE_FIRST_WORDS),
    "LABEL_FIRST": (cues.LABEL_FIRST, cues.LABEL_FIRST_WORDS),
    "LABELS_FIRST": (cues.LABELS_FIRST, cues.LABEL_FIRST_WORDS),
}
by_name = pytest.mark.parametrize("name", CUES)


def spans(matches):
    return [match.span() for match in matches]


def check(name: str, text: str) -> None:
    pattern, words = CUES[name]
    text = _RUN.sub(_shortened, text)  # as everywhere: a match may hold runs of any length
    folded = caseless(text)
    assert len(folded) == len(text)
    if sum(folded.count(word) for word in words) <= most_places(text):
        assert spans(last_matches(pattern, words, text, folded)) == spans(pattern.finditer(text))


@by_name
@FEW
@given(st.data())
def test_whatever_a_cue_matches_holds_one_of_its_words(name: str, data: st.DataObject):
    said = data.draw(st.from_regex(CUES[name][0]))
    around = [
        data.draw(st.sampled_from(["", " ", "so, ", "\n", "Wir sehen: ", "它"])) for _ in "ab"
    ]
    check(name, around[0] + said + around[1])


@longer
@given(st.data(), st.sampled_from(sorted(CUES)))
def test_whatever_a_cue_matches_at_length(data: st.DataObject, name: str):
    check(name, data.draw(st.from_regex(CUES[name][0])))


@by_name
@QUICK
@given(hostile_text(200))
def test_any_text_is_searched_where_it_matters(name: str, text: str):
    check(name, text)


@by_name
def test_of_many_places_the_last_count(name: str):
    pattern, words = CUES[name]
    said = {"LABEL_FIRST": "B is correct. ", "LABELS_FIRST": "A and B are correct. ",
            "VALUE_FIRST": "4 is the answer. ", "TENTATIVE": "the answer may be 4. "}  # fmt: skip
    text = said.get(name, "the answer is 4, the result is 4. ") * 200 + "and the end"
    found = last_matches(pattern, words, text, caseless(text))
    assert 20 < len(found) <= MOST
    assert spans(found) == spans(pattern.finditer(text))[-len(found) :]


def test_a_text_without_cues_costs_a_tenth_of_a_step_at_most():
    text = "We see that this is so, and so on for each of them. " * 160
    assert cpu_ms(lambda: caseless(text)) < 5
    folded = caseless(text)

    def all_cues() -> None:
        for pattern, words in CUES.values():
            assert last_matches(pattern, words, text, folded) == []

    assert min(cpu_ms(all_cues) for _ in range(5)) < STEP_LIMIT_MS / 10
