"""Which words count, in any language, and when. Tokens are characters or hand-made pieces."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from sglang_deepprune.config import DeepPruneConfig
from sglang_deepprune.truncation import CutPoint, Decode, WordCut, make_cut
from sglang_deepprune.words import REASONING_WORDS, WORDS_BY_LANGUAGE, parse_words


def encode(text: str) -> list[int]:
    return [ord(char) for char in text]


def decode(ids: Sequence[int]) -> str:
    return "".join(map(chr, ids))


def letters(pieces: Sequence[str]) -> tuple[list[int], Decode]:
    """Hand-made tokens: id i decodes to pieces[i]."""
    return list(range(len(pieces))), lambda ids: "".join(pieces[i] for i in ids)


def words(k: int, more: str = "") -> WordCut:
    return WordCut(k, 4096, REASONING_WORDS + parse_words(more), decode)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("WAIT! Thus? sInCe.", 3),
        ("await waits sincere thusly waitâ", 0),
        ("wait1 wait_ (wait) wait", 4),
        ("d'abord, d’abord", 2),
        ("moment\nmal. moment  mal. moment. mal", 2),
        ("嗯wait我想。然而", 2),
        ("等等等等", 2),
        ("그래서, 따라서는", 2),
        ("ich denke, dass es wartend ist", 0),
        ("wait\u0301 is no wait", 1),
        ("Donc, puisque c'est vrai; así que no", 2),
        ("Следовательно, ответ 56. Значит, всё.", 2),
        ("por lo tanto, já que não", 2),
        ("pero\u0300 percio\u0300 = perciò", 2),
        ("इसलिए उत्तर 56 है", 1),
        ("", 0),
    ],
)
def test_words_are_counted_whole_and_in_any_case(text: str, count: int) -> None:
    ids = encode(text)
    kinds = [words(k).end(ids).kind for k in (count, count + 1) if k]
    assert kinds == ["words", "end"][-len(kinds) :]


def test_every_built_in_word_counts_once() -> None:
    for language, listed in WORDS_BY_LANGUAGE.items():
        for word in parse_words(listed):
            ids = encode(f"7 {word.upper()} 8")
            assert words(1).end(ids).kind == "words", (language, word)
            assert words(2).end(ids).kind == "end", (language, word)


def test_further_words_come_from_the_settings() -> None:
    ids = encode("Nochmal: 7 mal 8. Rechne nach, 检算 56.")
    assert words(2).end(ids).kind == "end"
    assert words(2, more="nochmal，检算").end(ids).kind == "words"
    config = DeepPruneConfig(cut="words", cut_words=1, reasoning_words="nochmal")
    assert make_cut(config, decode).end(ids).kind == "words"


def test_a_listed_word_inside_another_one_counts_alone() -> None:
    # "moment" is complete before "moment mal" is: counting the longer one would depend on timing.
    cut = words(1, more="moment")
    ids = encode("Moment mal, ")
    assert cut.text(ids, cut.end(ids)) == "Moment"


def test_a_word_counts_only_once_it_is_complete() -> None:
    pieces = ["So ", "wa", "it", "ing", " thus", "ly", " si", "nce", ",", " thus", "."]
    ids, joined = letters(pieces)
    cut = WordCut(1, 99, REASONING_WORDS, joined)
    seen = [cut.advance(ids[:n]) for n in range(len(ids) + 1)]
    assert seen[:9] == [None] * 9 and seen[9] == CutPoint(8, "words")
    second = WordCut(2, 99, REASONING_WORDS, joined)
    assert second.advance(ids) == CutPoint(10, "words")


def test_the_end_of_the_trace_completes_a_word() -> None:
    ids, joined = letters(["7", " = ", "7, ", "th", "us"])
    cut = WordCut(1, 99, REASONING_WORDS, joined)
    assert cut.advance(ids) is None
    assert cut.end(ids) == CutPoint(5, "words")


def test_a_word_that_waited_long_for_its_end_is_cut_at_its_own_token() -> None:
    # Special tokens decode to nothing; the word's last token lies far behind the window by then.
    pieces = ["x "] * 30 + ["wa", "it"] + [""] * 200 + [", "]
    ids, joined = letters(pieces)
    for step in (1, 7, 300):
        cut = WordCut(1, 999, REASONING_WORDS, joined)
        for n in range(0, len(ids), step):
            assert cut.advance(ids[:n]) is None
        assert cut.advance(ids) == CutPoint(32, "words")
