"""Finds the answer in prose: the last explicit statement, an option letter, a closing line.

Tiers keep deliberation out: "the answer is" beats "the result is", which beats "seems to be";
in a tier the last statement wins. The rightmost number of a text is never taken. Every search
looks at a bounded tail, and each cue reads at most `_MAX_STATEMENT` characters behind it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from sglang_deepprune.answers import cues
from sglang_deepprune.answers.canonical import canonical, exact_value
from sglang_deepprune.answers.expression import Unreadable, parse
from sglang_deepprune.answers.folding import fold
from sglang_deepprune.answers.places import caseless, last_matches
from sglang_deepprune.answers.quantity import clock, measure

_MAX_CHARS = 16_384
_MAX_STATEMENT = 400
_MAX_WORDS = 12
_DISPLAY = re.compile(r"(?:\\\[|\$\$)\s*(.{1,300}?)\s*(?:\\\]|\$\$)", re.DOTALL)
_INLINE = re.compile(r"(?:\\\((.{1,200}?)\\\)|\$([^$\n]{1,200})\$)(?!\d)")
_LABELS = re.compile(
    r"\(?([A-J])\)?(?:\s*(?:,|;|/|&|\band\b|\bund\b|\bet\b|\by\b|和|、|及)\s*(?:and\s+)?\(?([A-J])\)?)+(?!\w)"
)
_LABEL = re.compile(
    r"(?:\\text\w*\{)?\(([A-Ja-j])\)\}?(?!\s*[-+*/^=])(?:[\s.:].*|)|([A-J])(?:\s*[).:．、]\s*\S.*|[).:．]?)",
    re.DOTALL,
)
_LOWER_LABEL = re.compile(r"([a-j])\)?\s*")
# `b) 12`, but not `a) 12 b) 13`: those are parts.
_LOWER_LABELLED = re.compile(r"([a-j])\)\s*(?:(?!\b[a-j]\)).)+", re.DOTALL)
_PARTS = re.compile(r"\(?A\)\s.{1,80}\s\(?B\)\s", re.DOTALL)
_OPTION_NAME = re.compile(
    r"(?:option|choice|answer|letter|选项|選項|選択肢|opción|opção|antwort)\s*[:：]?\s*"
    r"\(?([A-J])\)?[.．。]?", re.IGNORECASE,
)  # fmt: skip
_ASSIGNED = re.compile(r"^(?:[a-zA-Z]|\\[a-z]+)(?:_\w)?(?:\(\w\))?=")
_UNFINISHED = re.compile(r"\\(?:f?box(?:ed)?|[dt]?frac|sqrt)?\s*$")
_DISPLAY_BLOCK = re.compile(r"\\(begin|end)\{(?:equation|align|gather|displaymath|eqnarray)\*?\}")
_RUN = re.compile(r"\s{9,}")
_LEADING_LABEL = re.compile(r"[*_([]{0,4}([A-J])[*_)\].]{0,5}[ \t]*(?:\n\s*\n|$)")
_QUOTED = re.compile(r"```\w*\n(.{1,200}?)\n?```|[>=→⇒∴]+\s*(.{1,200})", re.DOTALL)
_BOLD = re.compile(r"\*\*([^*\n]{1,80})\*\*")
_TIERS = (
    (cues.ANSWER, cues.ANSWER_WORDS),
    (cues.RESULT, cues.RESULT_WORDS),
    (cues.TENTATIVE, cues.TENTATIVE_WORDS),
)


@dataclass(frozen=True, slots=True)
class Statement:
    """A raw answer and the way it was stated."""

    answer: str
    kind: str


def find_statement(text: str, *, is_cut: bool) -> Statement | None:
    """The last explicit answer statement; of a cut text only one that was finished."""
    text = _DISPLAY_BLOCK.sub(_displayed, _RUN.sub(_shortened, text[-_MAX_CHARS:]))
    folded = caseless(text)
    for pattern, words in _TIERS:
        if pattern is cues.TENTATIVE and is_cut:
            return None
        for match in reversed(last_matches(pattern, words, text, folded)):
            if cues.NOT_STATED.search(text[max(0, match.start() - 30) : match.start()]):
                continue
            is_pick = pattern is cues.RESULT
            found = _state(text[match.end() : match.end() + _MAX_STATEMENT], is_cut, is_pick)
            if found is not None:
                return found
        if (
            pattern is cues.ANSWER
            and (first := _value_first(text, folded) or _label_first(text, folded)) is not None
        ):
            return first
    return None


def _displayed(mark: re.Match[str]) -> str:
    return r"\[" if mark[1] == "begin" else r"\]"


def _shortened(run: re.Match[str]) -> str:
    """Of a long run of spaces, which would make each pattern that looks through it quadratic."""
    return "\n\n" if "\n" in run[0] else "  "


def _value_first(text: str, folded: str) -> Statement | None:
    """`Thus 4 is the answer`."""
    matches = last_matches(cues.VALUE_FIRST, cues.VALUE_FIRST_WORDS, text, folded)
    for match in reversed(matches):
        before = re.split(r"[.\n]", text[max(0, match.start() - 30) : match.start()])[-1]
        if not cues.NOT_STATED.search(before) and not cues.WONDERED.search(before):
            return _checked(match[1].strip("$").removeprefix(r"\(").removesuffix(r"\)"), True)
    return None


def _label_first(text: str, folded: str) -> Statement | None:
    """`Option B is correct`."""
    words = cues.LABEL_FIRST_WORDS
    *_, label = [None, *last_matches(cues.LABEL_FIRST, words, text, folded)]
    *_, labels = [None, *last_matches(cues.LABELS_FIRST, words, text, folded)]
    if labels is not None and (label is None or labels.end() >= label.end()):
        return Statement(option(labels[1]) or labels[1], "letter")
    return None if label is None else Statement(label[1], "letter")


def _state(text: str, is_cut: bool, is_pick: bool) -> Statement | None:
    """What a cue's statement says, or None when it says nothing."""
    lead = text.lstrip(" \t\n*_>`:：")
    display = _DISPLAY.match(lead)
    if display is not None:
        return _checked(display[1], is_pick)
    content, is_finished = _clip(lead)
    if is_cut and not is_finished:
        return None
    if lead[len(content) :].lstrip().startswith("?"):
        return None
    content = content.rstrip(" *_`")
    inline = _INLINE.match(content)
    if inline is not None and len(re.findall(r"[^\W\d_]{2,}", content[inline.end() :])) > 3:
        content = inline[1] or inline[2]
    return _checked(content, is_pick)


def _clip(text: str) -> tuple[str, bool]:
    """The statement up to its end, and whether it has one."""
    end, is_finished = len(text), False
    inline = _INLINE.match(text)
    for stop in cues.STOP.finditer(text, inline.end() if inline else 0):
        if stop.start() > 0 and not cues.TITLES.search(text[: stop.start()][-8:]):
            end, is_finished = stop.start(), True
            break
        if stop[0] == "." and text[: stop.end()].endswith(("a.m.", "p.m.")):
            continue
    sentence = text[:end]
    for _ in range(3):
        filler = cues.FILLER.match(sentence)
        if filler is None:
            break
        sentence = sentence[filler.end() :].lstrip(" *_`")
    clause = cues.CLAUSE.search(sentence)
    if clause is not None and clause.start() > 0:
        return sentence[: clause.start()], True
    return sentence, is_finished


def _checked(content: str, is_pick: bool) -> Statement | None:
    content = cues.SUFFIX.sub("", cues.EMOJI.sub("", content.strip())).strip(" ,:;\"'“”「」")
    if not content or len(content) > 300 or cues.REFUSAL.search(content):
        return None
    if _UNFINISHED.search(content) or content.count("{") > content.count("}"):
        return None  # a text that ends in the middle of its answer
    is_filler = len(content) > 1 and content.casefold() in cues.STOPWORDS
    if is_filler or cues.ANSWER.fullmatch(content):
        return None
    if re.match(
        r"(?:not|n't|wrong|incorrect|correct|right|as follows|below|above)\b", content, re.I
    ):
        return None
    if (label := option(content, is_pick)) is not None:
        return Statement(label, "letter")
    stated = cues.CONCLUDES.search(content) if len(content.split()) > 3 else None
    if (
        stated is not None
        and stated.start() > 3
        and stated[0][0] != "="
        and is_value(stated[1].strip(" $*"))
    ):
        return Statement(stated[1].strip(" *"), "statement")
    is_prose = "\\" not in content and len(content.split()) > _MAX_WORDS
    if is_prose or not any(c.isalnum() or c == "∅" for c in content):
        return None
    return Statement(content, "statement")


def option(content: str, is_pick: bool = False) -> str | None:
    """The option letter (or letters) that a statement names, else None."""
    content = content.strip().strip("*_`").strip()
    if (several := _LABELS.fullmatch(content)) is not None:
        return ", ".join(re.findall(r"(?<![A-Za-z])[A-J](?![A-Za-z])", several[0]))
    if (name := option_name(content)) is not None:
        return name
    if (label := _LOWER_LABELLED.fullmatch(content)) is not None:
        return label[1].upper()
    if _PARTS.match(content):
        return None
    if (label := _LABEL.fullmatch(content)) is not None:
        return (label[1] or label[2]).upper()
    if is_pick and (label := _LOWER_LABEL.fullmatch(content)) is not None:
        return label[1].upper()
    return None


def option_name(content: str) -> str | None:
    """The letter of `Option C`."""
    name = _OPTION_NAME.fullmatch(content)
    return name[1] if name is not None and name[1].isupper() else None


def find_closing(text: str) -> Statement | None:
    """Weaker forms at the very end: bold value, bare value, `Thus x = 5.`; never of a cut text."""
    text = _RUN.sub(_shortened, text.strip())
    if (label := _LEADING_LABEL.match(text)) is not None:
        return Statement(label[1], "letter")
    if not text or text.endswith(("...", "…", ",", ":")):
        return None
    if (
        len(text) <= 80
        and ("\n" not in text or text.startswith("```"))
        and (bare := _bare(text)) is not None
    ):
        return bare
    if (display := cues.DISPLAYED.search(text[-400:])) is not None:
        return Statement(display[1].strip(), "conclusion")
    line = text.rsplit("\n", 1)[-1].strip()[-400:]
    if (nothing := cues.NO_SOLUTION.search(line)) is not None:
        return Statement(nothing[1], "conclusion")
    *_, bold = [None, *_BOLD.finditer(line)]
    if bold is not None and not line[bold.end() :].strip(" .!") and is_value(bold[1]):
        return Statement(option(bold[1]) or bold[1].strip(), "bold")
    return _conclusion(line)


def _bare(text: str) -> Statement | None:
    if (quoted := _QUOTED.fullmatch(text)) is not None:
        text = (quoted[1] or quoted[2]).strip()
    if (label := option(text, is_pick=True)) is not None:
        return Statement(label, "letter")
    trimmed = text.strip("*_` ").rstrip(".。!")
    display, inline = _DISPLAY.fullmatch(trimmed), _INLINE.fullmatch(trimmed)
    if display is not None or inline is not None:
        content = display[1] if display else inline[1] or inline[2] if inline else ""
        return Statement(content.strip(), "bare")
    words = trimmed.casefold().split()
    if is_value(trimmed):
        return Statement(trimmed, "bare")
    is_short = 0 < len(words) <= 2 and all(re.fullmatch(r"[^\W\d_]{2,20}", w) for w in words)
    if is_short and not cues.STOPWORDS & set(words) and not cues.REFUSAL.search(trimmed):
        return Statement(trimmed, "bare")
    return None


def is_value(text: str) -> bool:
    """Whether a string is plainly a number, a quantity, a clock time or an expression."""
    if len(text) > 120 or option(text) is not None:
        return len(text) <= 120
    folded = _ASSIGNED.sub("", fold(text), count=1)
    value = canonical(measure(folded).value)
    if exact_value(value) is not None or clock(folded) is not None:
        return True
    try:
        parse(folded)
    except (Unreadable, RecursionError):
        return False
    return "\\" in folded or any(c.isdigit() for c in folded)


def _conclusion(line: str) -> Statement | None:
    """`Therefore the slope equals 3/4.` as the last, finished sentence of a text."""
    if not line.endswith((".", "。", "$", r"\)", r"\]", "!")):
        return None
    sentence = re.split(r"(?<=[.!?])\s+(?=[A-ZÄÖÜÉ])|(?<=[。！？])", line.rstrip(".。! "))[-1]
    is_conclusion = cues.OPENING.match(sentence.lstrip(" -*>")) or cues.OVERALL.search(sentence)
    if not is_conclusion or cues.REFUSAL.search(sentence):
        return None
    if (label := _OPTION_NAME.search(sentence)) is not None and label.end() == len(sentence):
        return Statement(label[1], "letter")
    stated = cues.CONCLUDES.search(sentence)
    if stated is None:
        return None
    value = cues.CLAUSE.split(stated[1], maxsplit=1)[0]
    value = value.strip(" $*").removesuffix(r"\)").removeprefix(r"\(").strip()
    return Statement(value, "conclusion") if is_value(value) else None
