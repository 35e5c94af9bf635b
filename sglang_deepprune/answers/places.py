"""Looks for a pattern of many words only where one of its words stands.

A cue is an alternation over the words of twenty languages, without regard to case, which `re` tries
at every character: a millisecond or two for the end of a trace, in the decode step in which it
ends. Most texts hold none of the words, which `str.rfind` tells in a tenth of the time; and of the
others only as much is searched as the last places of a word need: a trace that says nothing but
"the answer of the answer of" costs no more than others.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import islice

MOST, FEWEST = 64, 8  # places of words in a text that are looked at, one for each
_CHARS_A_PLACE = 128
_BEFORE = 200  # characters of a match in front of its word, "the final and correct " and the like
# What `re.IGNORECASE` takes for one letter, and keeps a text's length.
_CASES = {ord("İ"): "i", ord("ı"): "i", ord("ſ"): "s"}
_FIRST_CJK = "\u2e80"  # from here on words stand without spaces around them


def caseless(text: str) -> str:
    """A text in lower case, character by character, as `re.IGNORECASE` compares it."""
    return text.translate(_CASES).lower()


def last_matches(
    pattern: re.Pattern[str], words: Sequence[str], text: str, folded: str
) -> list[re.Match[str]]:
    """The pattern's last matches, in order: all of them, as long as its words do not stand in the
    text more often than `most_places` says.

    Parameters
    ----------
    words : Sequence[str]
        Each match holds one of them, `caseless`, and letters that need a border in front of them
        have it.
    folded : str
        The text, `caseless`.
    """
    most = most_places(text)
    places: list[int] = []
    for word in words:
        places += islice(_places(word, folded), most)
    if not places:
        return []
    first = sorted(places)[-most:][0]
    return list(pattern.finditer(text, max(0, first - _BEFORE)))[-most:]


def most_places(text: str) -> int:
    """How many places of its words a text is searched at."""
    return min(MOST, max(FEWEST, len(text) // _CHARS_A_PLACE))


def _places(word: str, folded: str) -> Iterator[int]:
    """Where a word begins, from the end."""
    is_bordered = word[0].isalpha() and word[0] < _FIRST_CJK
    place = len(folded)
    while (place := folded.rfind(word, 0, place + len(word) - 1)) >= 0:
        before = folded[place - 1] if place else " "
        if not (is_bordered and (before.isalnum() or before == "-")):
            yield place
