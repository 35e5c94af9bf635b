"""Takes the final answer out of a finished trace, or says that there is none.

Order: a field of structured output, `<answer>` tags, boxes, an explicit statement, a closing
line. Text outside the thinking comes first; a closed thinking block is only asked when nothing
was said outside, and the result is flagged. A cut trace (`is_cut`: length limit, stop string)
or a block that never closes answers only with a complete statement outside its thinking:
its fragments hold intermediate values. All work is linear in the text.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from typing import Any

from sglang_deepprune.answers import cues
from sglang_deepprune.answers.boxes import is_placeholder, read_boxes
from sglang_deepprune.answers.folding import MAX_CHARS
from sglang_deepprune.answers.reasoning import split_reasoning, without_control
from sglang_deepprune.answers.statements import (
    find_closing,
    find_statement,
    option,
    option_name,
)

_FIELDS = ("answer", "final_answer", "finalanswer", "final answer", "result", "solution", "choice")
_MAX_JSON_CHARS = 262_144
_MAX_JSON_TRIES = 8
_FENCE = re.compile(r"```(?:json5?|JSON)?[ \t]*\n(.*?)```", re.DOTALL)
_TAG_END = re.compile(r"</(answer|final_answer|final|solution)>", re.IGNORECASE)
_TEXT_ONLY = re.compile(r"\\(?:text\w*|math(?:rm|bf|it|sf)|mbox)\s*\{([^{}]*)\}")
_PREFIX = re.compile(
    r"(?:\\text\w*\{)?\s*(?:the\s+)?(?:final\s+)?answer(?:\s+is)?\s*[:=]?\s*\}?\s*(?=[^\s}])", re.I
)
_OPTION_MACRO = re.compile(
    r"(?:\\(?:text\w*|math(?:rm|bf)|mbox)\s*\{)?\s*"
    r"(?:\(?([A-J])\s*\)\s*\}?|([A-J])(?:[.:](?=[\s}~\\])|[．、])\s*\}?)[\s\\.:,;~]*(.*)",
    re.DOTALL,
)
_DISCLAIMED = re.compile(
    r"(?:I|we)(?:'m|\s+am|\s+are|\s+do|\s+could|\s+can)?(?:\s+not|\s*n't|\s+don't|\s+can't|\s+cannot|\s+couldn't)\b",
    re.IGNORECASE,
)
_LATEX_ESCAPE = re.compile(
    r"(?<!\\)\\(?=[^\"\\/bfnrtu\s]|u(?![0-9a-fA-F]{4})"
    r"|(?:f?box(?:ed)?|binom|beta|bar|begin|frac|forall|neq?|nu|neg|nabla|not|right|rho|rangle|text\w*|times"
    r"|theta|tau|tan|tfrac|triangle)(?![a-zA-Z]))"
)
_COMMA_AT_END = re.compile(r",(?=\s*[}\]]\s*(?:$|[`\n]))")
_DOT_GROUP = re.compile(r"(-?[1-9]\d{0,2})\.(\d{3})(?=$|[\s€]|\\text)")
_COMMA_DECIMAL = re.compile(r"(-?\d{1,3}),(\d{3})(?=$|[\s€]|\\text)")


@dataclass(frozen=True, slots=True)
class Extraction:
    """One sibling's answer: the raw string, how it was stated, and whether only in the thinking."""

    answer: str
    kind: str
    from_reasoning: bool = False


@dataclass(frozen=True, slots=True)
class _Found:
    extraction: Extraction | None
    is_final: bool = False  # The text itself says that there is no answer.


def extract(
    text: str,
    *,
    is_cut: bool = False,
    json_field: str | None = None,
    starts_in_reasoning: bool = False,
) -> Extraction | None:
    """The final answer of a trace; None is an abstention.

    `starts_in_reasoning`: the chat template opened the thinking block inside the prompt.
    """
    split = split_reasoning(text, starts_inside=starts_in_reasoning)
    for part in split.outside:
        found = _from_part(part, is_cut, json_field)
        if found.extraction is not None or found.is_final:
            return found.extraction
    if is_cut or split.is_open or not split.inside.strip():
        return None
    if any(cues.REFUSAL.search(part[-2000:]) for part in split.outside):
        return None
    inside = _from_part(split.inside, False, json_field).extraction
    return None if inside is None else replace(inside, from_reasoning=True)


def _from_part(text: str, is_cut: bool, json_field: str | None) -> _Found:
    if (structured := _from_json(text, json_field)) is not None:
        return structured
    if (tagged := _tag(text)) is not None:
        return _from_tag(tagged)
    boxes = read_boxes(text)
    if boxes.answer is not None:
        return _Found(_tidied(boxes.answer, "box", text))
    if boxes.is_refused:
        return _Found(None, is_final=True)
    stated = find_statement(text, is_cut=is_cut)
    if stated is None and not is_cut:
        stated = find_closing(text[-4000:])
    return _Found(None if stated is None else _tidied(stated.answer, stated.kind, text))


def _tag(text: str) -> str | None:
    """The content of the last complete `<answer>` element."""
    *_, end = [None, *_TAG_END.finditer(text)]
    if end is None:
        return None
    opening = f"<{end[1]}>"
    start = text.rfind(opening, 0, end.start())
    return None if start < 0 else text[start + len(opening) : end.start()]


def _from_tag(content: str) -> _Found:
    inside = _from_part(content, False, None)
    if inside.extraction is not None or inside.is_final:
        return inside
    content = content.strip()
    is_answer = bool(content) and len(content) <= 400 and not cues.REFUSAL.search(content)
    return _Found(_tidied(content, "tag", content) if is_answer else None, is_final=True)


def _tidied(answer: str, kind: str, text: str) -> Extraction | None:
    """Drop what is dress in any reading: a text macro around it all, `(C)` next to its value."""
    answer = _PREFIX.sub("", answer.strip())
    if (wrapped := _TEXT_ONLY.fullmatch(answer)) is not None:
        answer = wrapped[1].strip()
    if is_placeholder(answer) or _DISCLAIMED.match(answer):
        return None
    name = option_name(_TEXT_ONLY.sub(r"\1", answer).strip())
    if name is not None:
        return Extraction(name, "letter" if kind != "box" else kind)
    labelled = _OPTION_MACRO.fullmatch(answer)
    if labelled is not None and (kind == "box" or option(answer)):
        return Extraction(labelled[1] or labelled[2], "letter" if kind != "box" else kind)
    if re.fullmatch(r"\W*[?？]+\W*", answer) or not answer:
        return None
    if len(answer) > MAX_CHARS:
        return None  # nothing that siblings could agree on, and a vote would carry it n times
    return Extraction(_localised(answer, text), kind)


def _localised(answer: str, text: str) -> str:
    """`1.250` is a thousand in a German text and `1,250` a decimal; elsewhere the reverse."""
    is_group, is_decimal = _DOT_GROUP.match(answer), _COMMA_DECIMAL.match(answer)
    if is_group is None and is_decimal is None:
        return answer
    tail = text[-2000:]
    if len(cues.EUROPEAN.findall(tail)) <= len(cues.ENGLISH.findall(tail)):
        return answer
    return answer.replace(".", "", 1) if is_group else answer.replace(",", ".", 1)


def _from_json(text: str, json_field: str | None) -> _Found | None:
    """The answer field of a JSON object that is the text, or stands in it."""
    if "{" not in text or len(text) > _MAX_JSON_CHARS or '"' not in text:
        return None
    names = (json_field,) if json_field else _FIELDS
    text = _COMMA_AT_END.sub("", _LATEX_ESCAPE.sub(r"\\\\", text))
    for candidate in _json_candidates(text, names):
        value = _field(candidate, names)
        if value is not None:
            return _from_value(value)
        if json_field and candidate.get(json_field, ...) is None:
            return _Found(None, is_final=True)
    return None


def _json_candidates(text: str, names: tuple[str, ...]) -> list[dict[str, Any]]:
    decoder = json.JSONDecoder(parse_float=str, parse_int=str, strict=False)
    starts = [fence.start(1) for fence in _FENCE.finditer(text)][-_MAX_JSON_TRIES:]
    stripped = len(text) - len(text.lstrip())
    position = len(text)
    pattern = re.compile("|".join(f'"{re.escape(name)}"' for name in names), re.IGNORECASE)
    keys = [match.start() for match in pattern.finditer(text)]
    for _ in range(_MAX_JSON_TRIES):
        while keys and keys[-1] >= position:
            keys.pop()
        position = text.rfind("{", 0, keys[-1] if keys else 0)
        if position < 0:
            break
        starts.append(position)
    found = []
    for start in (stripped, *starts):
        try:
            value, _ = decoder.raw_decode(
                text, start + len(text[start:]) - len(text[start:].lstrip())
            )
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def _field(value: dict[str, Any], names: tuple[str, ...]) -> Any:
    if not any(name in value for name in names):
        value = {name.lower(): inside for name, inside in value.items()}  # "Answer"
    return next((value[name] for name in names if value.get(name) is not None), None)


def _from_value(value: Any) -> _Found:
    if isinstance(value, dict):
        value = _field(value, (*_FIELDS, "value")) or value
    if isinstance(value, bool):
        value = "true" if value else "false"
    if isinstance(value, list):
        is_flat = all(isinstance(item, (str, bool)) for item in value)
        value = ", ".join(str(item) for item in value) if is_flat else json.dumps(value)
    if not isinstance(value, str):
        value = json.dumps(value, sort_keys=True)
    value = without_control(value).strip()
    boxed = read_boxes(value)
    if boxed.is_refused or not value or cues.REFUSAL.fullmatch(value):
        return _Found(None, is_final=True)
    return _Found(_tidied(boxed.answer or option(value) or value, "json", value), is_final=True)
