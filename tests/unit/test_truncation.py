"""Where traces are cut. No server, no model: a small ByteLevel BPE tokenizer is trained here."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from sglang_deepprune.config import DeepPruneConfig
from sglang_deepprune.truncation import (
    Cut,
    CutPoint,
    Decode,
    TokenCut,
    WordCut,
    make_cut,
    plain_decoder,
)
from sglang_deepprune.words import REASONING_WORDS

CHINESE = "首先，我们把7乘以8……等等，重新检查一下。因此答案是56，所以没有问题。"
GERMAN = "Moment mal, zuerst rechnen wir 7 mal 8. Also 56, deshalb ist es richtig, waiting."
FORMULAS = "7 \\cdot 8 = 56, \\frac{112}{2} = 56, 56 = 2^3 \\cdot 7 " * 3
EMOJI = "🤔🧮 7×8 👩‍🏫 wait, 🎉🎉 thus 56 😀"
ENGLISH = "Wait, since 7 * 8 is 56, thus the answer is 56. Hmm, waiting... Therefore it is so."


def make_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<think>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator([ENGLISH * 4, GERMAN * 2, CHINESE], trainer)
    return tokenizer


TOKENIZER = make_tokenizer()


def decode(ids: Sequence[int]) -> str:
    return str(TOKENIZER.decode(list(ids)))


def encode(text: str) -> list[int]:
    return list(TOKENIZER.encode(text).ids)


def to_bytes(text: str) -> list[int]:
    """One token a byte, as when no merge fits."""
    chars = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    [(mapped, _)] = chars.pre_tokenize_str(text)
    return [TOKENIZER.token_to_id(char) for char in mapped]


def words(k: int, max_tokens: int = 4096) -> WordCut:
    return WordCut(k, max_tokens, REASONING_WORDS, decode)


def cut_text(cut: Cut, ids: Sequence[int]) -> str:
    return cut.text(ids, cut.end(ids))


@pytest.mark.parametrize(
    ("text", "k", "expected"),
    [
        (CHINESE, 1, "首先"),
        (CHINESE, 2, "首先，我们把7乘以8……等等"),
        (CHINESE, 3, "首先，我们把7乘以8……等等，重新检查"),
        (GERMAN, 1, "Moment mal"),
        (GERMAN, 2, "Moment mal, zuerst"),
        (GERMAN, 3, "Moment mal, zuerst rechnen wir 7 mal 8. Also"),
        (EMOJI, 1, "🤔🧮 7×8 👩‍🏫 wait"),
        (EMOJI, 2, "🤔🧮 7×8 👩‍🏫 wait, 🎉🎉 thus"),
        (ENGLISH, 2, "Wait, since"),
    ],
)
@pytest.mark.parametrize("tokens", [encode, to_bytes])
def test_the_text_ends_with_the_kth_word(
    text: str, k: int, expected: str, tokens: Callable[[str], list[int]]
) -> None:
    ids = tokens(text)
    cut = words(k)
    point = cut.advance(ids)
    assert point is not None and point.kind == "words"
    assert cut.text(ids, point).startswith(expected)
    # A token may hold more than the word, and no token less holds the word.
    assert expected not in decode(ids[: point.num_tokens - 1])
    if tokens is to_bytes:
        assert cut.text(ids, point) == expected


def test_formulas_without_a_word_are_cut_by_the_token_bound() -> None:
    ids = encode(FORMULAS)
    cut = words(25, max_tokens=40)
    assert cut.advance(ids[:39]) is None
    point = cut.advance(ids)
    assert point == CutPoint(40, "tokens")
    assert 0 < len(cut.text(ids, point)) < len(FORMULAS)


def test_the_first_tokens_are_cut_at_k() -> None:
    ids = encode(ENGLISH)
    cut = TokenCut(5, decode)
    assert cut.advance(ids[:4]) is None
    assert cut.advance(ids) == CutPoint(5, "tokens")
    assert cut.end(ids) == CutPoint(5, "tokens")


def test_shorter_traces_are_read_to_their_end() -> None:
    ids = encode(ENGLISH)
    cuts: list[Cut] = [TokenCut(500, decode), words(25)]
    for cut in cuts:
        assert cut.advance(ids) is None
        assert cut.end(ids) == CutPoint(len(ids), "end")
        assert cut_text(cut, ids) == ENGLISH
        assert cut.end([]) == cut.end(ids)  # the end is final


def test_an_empty_trace_has_an_empty_text() -> None:
    cuts: list[Cut] = [TokenCut(500, decode), words(25)]
    for cut in cuts:
        assert cut.end([]) == CutPoint(0, "end") and cut_text(cut, []) == ""


@pytest.mark.parametrize("text", [EMOJI, CHINESE, GERMAN])
def test_no_cut_splits_a_character(text: str) -> None:
    ids = to_bytes(text)
    for k in range(1, len(ids) + 1):
        cut = TokenCut(k, decode)
        point = cut.end(ids)
        assert k <= point.num_tokens <= k + 3
        read = cut.text(ids, point)
        assert read and "\ufffd" not in read and text.startswith(read)


def test_a_cut_waits_for_the_rest_of_a_character() -> None:
    ids = to_bytes("7🤔8")
    cut = TokenCut(2, decode)
    assert [cut.advance(ids[:n]) for n in range(2, 5)] == [None] * 3
    assert cut.advance(ids) == CutPoint(5, "tokens")
    # Ended in the middle: what is incomplete is left out.
    cut = TokenCut(2, decode)
    assert cut.text(ids[:4], cut.end(ids[:4])) == "7"


def test_bytes_that_never_become_a_character_do_not_move_the_cut_for_ever() -> None:
    ids = to_bytes("7") + to_bytes("é")[:1] * 50
    cut = TokenCut(3, decode)
    point = cut.advance(ids)
    assert point == CutPoint(3, "tokens") and cut.text(ids, point) == "7"


def test_tokens_without_text_are_not_all_that_a_judge_gets() -> None:
    ids = [TOKENIZER.token_to_id("<think>")] * 20 + encode("Wait")
    cuts: list[Cut] = [TokenCut(1, decode), words(1, max_tokens=2)]
    for cut in cuts:
        assert cut.advance(ids[:20]) is None
        point = cut.advance(ids)
        assert point is not None and cut.text(ids, point) != ""


def byte_fallback(pieces: list[bytes | str]) -> tuple[list[int], Decode]:
    """Tokens as Llama-2's: a run of byte tokens is text as a whole or broken as a whole."""

    def joined(ids: Sequence[int]) -> str:
        text, run = "", b""
        for piece in [pieces[i] for i in ids] + [""]:
            if isinstance(piece, bytes):
                run += piece
                continue
            try:
                text += run.decode()
            except UnicodeDecodeError:
                text += "\ufffd" * len(run)
            text, run = text + piece, b""
        return text

    return list(range(len(pieces))), joined


def test_byte_fallback_runs_are_cut_between_characters() -> None:
    run: list[bytes | str] = [bytes([b]) for b in "首先等等因此等等".encode()]
    ids, joined = byte_fallback(["x", *run, "."])
    for step in (1, 2, 5, 40):
        cut = WordCut(3, 99, REASONING_WORDS, joined)
        for n in range(0, len(ids), step):
            cut.advance(ids[:n])
        assert cut.end(ids) == CutPoint(19, "words")
        assert cut.text(ids, cut.end(ids)) == "x首先等等因此"
    for k in range(2, 24):
        cut_at = TokenCut(k, joined)
        assert cut_at.end(ids).num_tokens == 1 + -(-(k - 1) // 3) * 3


def test_plain_decoder_drops_special_tokens_and_keeps_spaces() -> None:
    class Fake:
        def decode(self, ids: list[int], **options: bool) -> str:
            assert ids == [1, 2] and isinstance(ids, list)
            assert options == {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
            return "wait ."

    assert plain_decoder(Fake())((1, 2)) == "wait ."


def test_the_settings_choose_the_cut() -> None:
    assert isinstance(make_cut(DeepPruneConfig(preset="paper"), decode), WordCut)
    tokens = make_cut(DeepPruneConfig(cut_tokens=7), decode)
    assert isinstance(tokens, TokenCut) and tokens.k == 7


def walk(cut: Cut, ids: Sequence[int], steps: Sequence[int]) -> CutPoint:
    """Call `advance` at irregular lengths, then end the trace."""
    at = 0
    for step in steps:
        at = min(len(ids), at + step)
        cut.advance(ids[:at])
    return cut.end(ids)


fragments = st.lists(
    st.sampled_from(
        [*"  ,.7", "wait", "wa", "it", "thus", "since ", "ly", "moment ", "mal", "等", "等等",
         "因此", "🤔", "é", "İ", "\u0301", "因", "此", "\n", "<think>"]
    ),
    max_size=60,
)  # fmt: skip
steps = st.lists(st.integers(0, 50), max_size=60)


@settings(max_examples=150, deadline=None)
@given(
    parts=fragments, steps=steps, k=st.integers(1, 6), bound=st.integers(1, 200), raw=st.booleans()
)
def test_the_cut_does_not_depend_on_when_it_was_asked_for(
    parts: list[str], steps: list[int], k: int, bound: int, raw: bool
) -> None:
    text = "".join(parts)
    ids = to_bytes(text) if raw and text else encode(text)
    makes: list[Callable[[], Cut]] = [
        lambda: words(k, max_tokens=bound),
        lambda: TokenCut(bound, decode),
    ]
    for make in makes:
        point = make().end(ids)
        assert walk(make(), ids, steps) == point
        assert walk(make(), ids, [1] * len(ids)) == point
        read = make().text(ids, point)
        assert decode(ids).startswith(read) and "\ufffd" not in read
        assert read != "" or decode(ids) == ""


@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(0, TOKENIZER.get_vocab_size() - 1), max_size=150), steps=steps)
def test_random_bytes_are_cut_alike_too(ids: list[int], steps: list[int]) -> None:
    makes: list[Callable[[], Cut]] = [
        lambda: words(1, max_tokens=90),
        lambda: TokenCut(40, decode),
    ]
    for make in makes:
        point = make().end(ids)
        assert walk(make(), ids, steps) == point
        assert walk(make(), ids, [1] * len(ids)) == point
        assert not make().text(ids, point).endswith("\ufffd")


def test_a_long_trace_is_decoded_in_linear_time() -> None:
    decoded = 0

    def counting(ids: Sequence[int]) -> str:
        nonlocal decoded
        decoded += len(ids)
        return decode(ids)

    ids = (encode(FORMULAS) * 400)[:30_000]
    cut = WordCut(25, 10**6, REASONING_WORDS, counting)
    start = time.perf_counter()
    for n in range(32, len(ids) + 32, 32):
        assert cut.advance(ids[:n]) is None
    assert decoded < 8 * len(ids)
    assert time.perf_counter() - start < 5.0
