"""Where a trace is cut before a judge reads it (paper, section 4.1), found while it decodes.

Two rules with one interface, both incremental over token ids: `TokenCut` after the first k tokens,
`WordCut` after the token that completes the k-th reasoning word, bounded by `max_tokens`. A cut
point is a pure function of the ids: it does not depend on when or how often `advance` was called.

Text is decoded in windows with an overlap (as in SGLang's incremental detokenizer), so a trace
costs linear time. A cut never splits a multi-byte character: it moves on by a few tokens to where
the text is whole, and what cannot be made whole is stripped. Ids only ever grow. `decode` has to
keep the text of a prefix (see `plain_decoder`).
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, Protocol

from sglang_deepprune.config import DeepPruneConfig
from sglang_deepprune.words import REASONING_WORDS, parse_words

Decode = Callable[[Sequence[int]], str]

_BROKEN = "\ufffd"
_BLOCK = 32  # tokens between two commits of the scan
_LOOK_BACK = 4  # tokens that one incomplete character can hold back
_CALL = 8  # what a call of the decoder costs beside its tokens, in tokens
_EXTRA = 8  # most tokens that a cut moves on to complete a character
CUT_SLACK = 4 * _EXTRA  # tokens behind a cut that can matter to it

# Scripts written without spaces (Hangul glues particles on): their words count as substrings.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1100-\u11ff\u1780-\u17ff\u3040-\u30ff\u3130-\u318f\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\ua960-\ua97f\uac00-\ud7ff\uf900-\ufaff\uff66-\uff9f"
    "\U00020000-\U0003ffff"
)
# Combining marks belong to their letter, but `\w` leaves them out.
_MARKS = "\u0300-\u036f\u064b-\u065f\u0900-\u0903\u093a-\u094f"
_LETTER = rf"(?:[^\W\d_{_UNSPACED}]|[{_MARKS}])"


@dataclass(frozen=True, slots=True)
class CutPoint:
    """The first `num_tokens` output tokens are what the judge reads."""

    num_tokens: int
    kind: Literal["words", "tokens", "end"]


class Cut(Protocol):
    """The cut of one trace; one object per sibling.

    Attributes
    ----------
    num_decoded : int
        Tokens decoded so far, and a few for each call: what the cut has cost.
    is_behind : bool
        The last `advance` ended because it had decoded its share, and not for want of tokens.
    """

    num_decoded: int
    is_behind: bool

    def advance(self, output_ids: Sequence[int], most: int | None = None) -> CutPoint | None:
        """The cut point once the ids hold it. Takes all ids so far, at any times. `most`: tokens
        to decode in this call, about; the next one goes on."""

    def end(self, output_ids: Sequence[int]) -> CutPoint:
        """The cut point of a trace that has ended; kind 'end' when it is shorter than the cut."""

    def text(self, output_ids: Sequence[int], point: CutPoint) -> str:
        """What the judge reads."""


def make_cut(config: DeepPruneConfig, decode: Decode) -> Cut:
    """The cut that a group's settings ask for."""
    if config.cut_kind == "words":
        words = REASONING_WORDS + parse_words(config.reasoning_words)
        return WordCut(config.cut_words, config.cut_max_tokens, words, decode)
    return TokenCut(config.cut_tokens, decode)


def warm_up(config: DeepPruneConfig) -> None:
    """Compile the words' patterns now: it takes a fifth of a second, once."""
    _compile(REASONING_WORDS + parse_words(config.reasoning_words))


def plain_decoder(tokenizer: Any) -> Decode:
    """A tokenizer's decode that a cut can rely on: no special tokens, no tidied spaces.

    Tidying ("wait ." -> "wait.") rewrites text that was there before the last token came.
    """

    def decode(ids: Sequence[int]) -> str:
        text = tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(text)

    return decode


class _SettledCut:
    """Shared half: the rule (`_find`) wants a target, the cut settles where the text is whole."""

    def __init__(self, decode: Decode):
        self.num_decoded = 0
        self.is_behind = False
        self._share = math.inf  # of `num_decoded`, at which the call under way ends
        self._plain = decode
        self._target: CutPoint | None = None
        self._point: CutPoint | None = None
        self._next = 0  # token count to try next for a whole text
        self._has_text = False  # of the target

    def _find(self, output_ids: Sequence[int], is_final: bool) -> CutPoint | None:
        raise NotImplementedError

    def advance(self, output_ids: Sequence[int], most: int | None = None) -> CutPoint | None:
        if self._point is None:
            self.is_behind = False
            self._share = math.inf if most is None else self.num_decoded + max(1, most)
            self._step(output_ids, is_final=False)
            self._share = math.inf
        return self._point

    def _decode(self, ids: Sequence[int]) -> str:
        self.num_decoded += len(ids) + _CALL
        return self._plain(ids)

    def end(self, output_ids: Sequence[int]) -> CutPoint:
        point = self.advance(output_ids) or self._step(output_ids, is_final=True)
        if point is None:
            is_usable = self._target is not None and self._has_text
            point = self._target if is_usable else None
        self._point = point or CutPoint(len(output_ids), "end")
        return self._point

    def text(self, output_ids: Sequence[int], point: CutPoint) -> str:
        return self._decode(list(output_ids[: point.num_tokens])).rstrip(_BROKEN)

    def _step(self, output_ids: Sequence[int], is_final: bool) -> CutPoint | None:
        if self._target is None:
            self._target = self._find(output_ids, is_final)
            if self._target is None:
                return None
            self._next = self._target.num_tokens
            self._has_text = self._is_text(output_ids, self._target)
        self._point = self._settle(output_ids, self._target)
        return self._point

    def _is_text(self, output_ids: Sequence[int], target: CutPoint) -> bool:
        """Whether the target holds any text; mostly its first tokens say so."""
        first = CutPoint(min(_BLOCK, target.num_tokens), target.kind)
        return bool(self.text(output_ids, first) or self.text(output_ids, target))

    def _settle(self, output_ids: Sequence[int], target: CutPoint) -> CutPoint | None:
        while self._next <= len(output_ids):
            if self.num_decoded >= self._share:
                self.is_behind = True
                return None
            tails = self._tails(output_ids, self._next)
            # Without any text so far (special tokens only) the judge would read nothing: go on.
            if any(t[-1:] != _BROKEN and (t or self._has_text) for t in tails):
                return CutPoint(self._next, target.kind)
            if self._has_text and self._next - target.num_tokens >= _EXTRA:
                return target
            self._next += 1
        return None

    def _tails(self, output_ids: Sequence[int], end: int) -> Iterator[str]:
        """The text up to `end`, decoded from several starts.

        Byte-fallback decoders break a whole run of byte tokens when the first character of it is
        cut; one of four starts in a row lies on a character's border.
        """
        for length in range(2 * _LOOK_BACK, _LOOK_BACK, -1):
            yield self._decode(list(output_ids[max(0, end - length) : end]))


class TokenCut(_SettledCut):
    """The first k tokens."""

    def __init__(self, k: int, decode: Decode):
        super().__init__(decode)
        self.k = k

    def _find(self, output_ids: Sequence[int], is_final: bool) -> CutPoint | None:
        return CutPoint(self.k, "tokens") if len(output_ids) >= self.k else None


class WordCut(_SettledCut):
    """The first k reasoning words with all the text before them; `max_tokens` when they are rare.

    A word counts once it is known to be complete: a character that is no letter follows it, or the
    trace has ended. State moves on at fixed token counts only; what lies beyond is looked at afresh
    in each call, which is what makes the result independent of the calls.
    """

    def __init__(self, k: int, max_tokens: int, words: Sequence[str], decode: Decode):
        super().__init__(decode)
        self.k = k
        self.max_tokens = max_tokens
        self._words = _compile(tuple(words))
        self._base = 0  # the decoding window starts here, on a character's border
        self._read = 0  # text up to this token is committed
        self._num_prefix = 0  # characters of ids[base:read]
        self._block_end = _BLOCK  # token count of the next commit
        self._carry = ""  # the end of the committed text
        self._open = 0  # first position in it that may start a word
        self._tail = 0  # token that completed the word at the very end of it
        self._count = 0

    def _find(self, output_ids: Sequence[int], is_final: bool) -> CutPoint | None:
        limit = min(len(output_ids), self.max_tokens)
        while self._block_end <= limit:
            if self.num_decoded >= self._share:
                self.is_behind = True
                return None
            found = self._scan(output_ids, self._block_end, is_commit=True)
            if found is not None:
                return found
            self._block_end += _BLOCK
        # Not final at the bound: a call that already had more ids must not answer differently.
        is_last = is_final and limit < self.max_tokens
        found = self._scan(output_ids, limit, is_final=is_last)
        if found is None and limit == self.max_tokens:
            return CutPoint(limit, "tokens")
        return found

    def _scan(
        self, ids: Sequence[int], upto: int, *, is_commit: bool = False, is_final: bool = False
    ) -> CutPoint | None:
        """Look for the k-th word in ids[:upto]; `is_commit` keeps what was learned."""
        # Garbage that never becomes whole must not hold the window back for ever.
        is_forced = is_final or (is_commit and upto - self._read >= 2 * _BLOCK)
        end, text = self._whole(ids, upto, is_forced)
        if end <= self._read and not is_final:
            return None
        fresh = _lower(text[self._num_prefix :])
        buffer = self._carry + fresh
        pattern = self._words.at_end if is_final else self._words.inside
        count, last = self._count, self._open
        for match in pattern.finditer(buffer, self._open):
            count, last = count + 1, match.end()
            if count == self.k:
                size = last - len(self._carry)
                token = self._locate(ids, end, self._num_prefix + size) if size > 0 else self._tail
                return CutPoint(token, "words")
        if is_commit:
            if fresh and self._words.ends(buffer, last):
                self._tail = self._locate(ids, end, len(text))
            self._commit(ids, end, buffer, last)
            self._count = count
        return None

    def _whole(self, ids: Sequence[int], upto: int, is_forced: bool) -> tuple[int, str]:
        """The last token count in reach at which the text is whole, and the window's text there."""
        for end in range(upto, max(self._read, upto - _LOOK_BACK), -1):
            text = self._decode(list(ids[self._base : end]))
            if not text.endswith(_BROKEN):
                return end, text
        if not is_forced:
            return self._read, ""
        return upto, self._decode(list(ids[self._base : upto])).rstrip(_BROKEN)

    def _locate(self, ids: Sequence[int], end: int, size: int) -> int:
        """The first token count at which the window holds `size` characters. Runs rarely."""
        for token in range(self._read + 1, end):
            if len(self._decode(list(ids[self._base : token])).rstrip(_BROKEN)) >= size:
                return token
        return end

    def _commit(self, ids: Sequence[int], end: int, buffer: str, last: int) -> None:
        self._base, self._read = self._read, end
        self._num_prefix = len(self._decode(list(ids[self._base : end])).rstrip(_BROKEN))
        dropped = max(0, len(buffer) - self._words.reach)
        self._carry = buffer[dropped:]
        # The first kept character has lost what stood before it: no word may start there.
        self._open = max(last - dropped, min(dropped, 1))


@dataclass(frozen=True, slots=True)
class _Patterns:
    inside: re.Pattern[str]  # words that something which is no letter follows
    at_end: re.Pattern[str]  # the same, or the end of the text
    reach: int  # characters that a word and its left neighbour take at most

    def ends(self, text: str, start: int) -> bool:
        """Whether a word stands at the very end of the text, still open."""
        start = max(start, len(text) - self.reach)
        return any(m.end() == len(text) for m in self.at_end.finditer(text, start))


@lru_cache(maxsize=16)
def _compile(words: tuple[str, ...]) -> _Patterns:
    kept: list[str] = []
    forms = {unicodedata.normalize(f, _lower(w.strip())) for w in words for f in ("NFC", "NFD")}
    for word in sorted(forms - {""}, key=lambda w: (len(w), w)):
        # A word that holds another one is complete only after that one: it never counts.
        if not any(k in word and re.search(_pattern([k], r"\Z|"), word) for k in kept):
            kept.append(word)
    reach = 1 + max((len(w) + 3 * w.count(" ") for w in kept), default=0)
    return _Patterns(re.compile(_pattern(kept, "")), re.compile(_pattern(kept, r"\Z|")), reach)


def _lower(text: str) -> str:
    """Lower case of the same length, so that positions hold. Turkish i with and without a dot are
    one letter here: their upper case is ambiguous, and a dotted capital would become two.
    """
    return text.replace("\u0130", "i").lower().replace("\u0131", "i")


def _pattern(words: Sequence[str], or_end: str) -> str:
    """One branch for each first character: so the search skips to these in one pass.

    A side of a word is a border only where the word has a letter of a spaced script there.
    """
    branches: dict[tuple[str, bool], list[str]] = {}
    for word in words:
        body = r"\s{1,3}".join(re.escape(p).replace("'", "['\u2019]") for p in word.split())
        key = word[0], re.search(_LETTER + r"\Z", word) is not None
        branches.setdefault(key, []).append(body[len(re.escape(word[0])) :])
    parts = []
    for (first, is_bordered), rests in branches.items():
        head = re.escape(first)
        left = rf"(?<!{_LETTER}{head})" if re.match(_LETTER, first) else ""
        right = rf"(?:{or_end}(?!{_LETTER})(?=[\s\S]))" if is_bordered else ""
        parts.append(f"{head}{left}(?:{'|'.join(rests)}){right}")
    return "|".join(parts) or r"(?!)"
