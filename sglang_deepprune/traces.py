"""Recorded traces: the one JSONL schema that judge training and evaluation read.

One trace a line, plain or gzipped. Fields: `question_id` (str), `prompt` (or `question` with a list
of `options`, which are lettered), `text` (or `trace`), `num_tokens` (or `trace_tokens`; int, > 0;
without it a token is taken for four characters), `answer` (str or null = abstention; without the
field it is extracted from the text), `gold` (optional), `seed` (optional). Other keys are ignored.

Without the tokenizer of the recorded model a cut of k tokens is taken at the trace's own mean of
characters a token; word cuts are exact.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from sglang_deepprune.answers import extract
from sglang_deepprune.truncation import WordCut
from sglang_deepprune.types import Trace
from sglang_deepprune.words import REASONING_WORDS

_CHARS_PER_TOKEN = 4
_PIECE = re.compile(r"\s*\S{1,64}")
CUTS = ("tokens:500", "tokens:1000", "tokens:2000", "tokens:4000", "words:25",
        "share:0.25", "share:0.5", "share:0.75")  # fmt: skip


class TraceFileError(ValueError):
    """A recording that cannot be read: names file, line and field."""


class CutError(ValueError):
    """Not a cut: `tokens:K`, `words:K` or `share:F` with 0 < F < 1."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """One recorded trace. `answer` None: it gave none."""

    question_id: str
    prompt: str
    text: str
    num_tokens: int
    answer: str | None
    gold: str | None = None
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Question:
    """All traces of one prompt, in the order of the file."""

    question_id: str
    prompt: str
    traces: tuple[Recorded, ...]

    @property
    def gold(self) -> str | None:
        return self.traces[0].gold


def load(path: str | Path) -> list[Question]:
    """Questions in the order in which they first appear. Raises `TraceFileError`."""
    path = Path(path)
    found: dict[str, list[Recorded]] = {}
    try:
        with _opened(path) as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    trace = _recorded(line, f"{path.name}, line {number}")
                    found.setdefault(trace.question_id, []).append(trace)
    except (OSError, UnicodeDecodeError, EOFError) as error:
        raise TraceFileError(f"{path.name}: {error}") from error
    if not found:
        raise TraceFileError(f"{path.name} holds no trace")
    return [Question(name, rows[0].prompt, tuple(rows)) for name, rows in found.items()]


def _opened(path: Path) -> IO[str]:
    """By what the file holds, whatever it is called; a byte order mark is no text."""
    with path.open("rb") as file:
        is_gzip = file.read(2) == b"\x1f\x8b"
    opener = gzip.open if is_gzip else open
    return cast(IO[str], opener(path, "rt", encoding="utf-8-sig"))


def truncate(trace: Recorded, cut: str, sibling: int = 0) -> Trace:
    """What a judge may read of a recorded trace. `cut`: see `CutError`, which it raises."""
    kind, amount = parse_cut(cut)
    total = trace.num_tokens
    if kind == "words":
        text = _first_words(trace.text, int(amount))
        tokens = max(1, round(total * len(text) / max(1, len(trace.text))))
        return _trace(trace, sibling, text, tokens, "words")
    tokens = round(total * amount) if kind == "share" else int(amount)
    return _trace(trace, sibling, trace.text[: len(trace.text) * tokens // total], tokens, "tokens")


def parse_cut(cut: str) -> tuple[str, float]:
    """("tokens" | "words" | "share", amount)."""
    kind, _, amount = cut.partition(":")
    try:
        value = float(amount)
    except ValueError:
        value = 0.0
    is_good = 0 < value < 1 if kind == "share" else value >= 1 and value.is_integer()
    if kind not in ("tokens", "words", "share") or not is_good:
        raise CutError(f"no cut {cut!r}; use tokens:K, words:K or share:F with 0 < F < 1")
    return kind, value


def _trace(trace: Recorded, sibling: int, text: str, tokens: int, kind: str) -> Trace:
    is_whole = len(text) >= len(trace.text)
    return Trace(
        sibling, text, min(tokens, trace.num_tokens), "end" if is_whole else kind,
        answer=trace.answer if is_whole else None, prompt=trace.prompt,
    )  # fmt: skip


def _first_words(text: str, count: int) -> str:
    pieces: list[str] = _PIECE.findall(text)

    def decode(ids: Sequence[int]) -> str:
        return "".join(pieces[i] for i in ids)

    cut = WordCut(count, len(pieces) + 1, REASONING_WORDS, decode)
    ids = range(len(pieces))
    point = cut.advance(ids) or cut.end(ids)
    return text if point.kind == "end" else cut.text(ids, point)


def _recorded(line: str, where: str) -> Recorded:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise TraceFileError(f"{where}: no JSON: {error}") from error
    if not isinstance(row, dict):
        raise TraceFileError(f"{where}: no object")
    text = _field(row, ("text", "trace"), str, where)
    tokens = _field(row, ("num_tokens", "trace_tokens"), int, where, is_needed=False)
    if tokens is not None and tokens < 1:
        raise TraceFileError(f"{where}: num_tokens is {tokens}; a trace has at least one token")
    if "answer" in row:
        answer = _field(row, ("answer",), str, where, is_needed=False) or None
    else:
        extraction = extract(text)
        answer = extraction.answer if extraction else None
    prompt = _field(row, ("prompt", "question"), str, where)
    options = _field(row, ("options",), list, where, is_needed=False) or []
    if options:
        lettered = "\n".join(f"{chr(65 + i)}. {option}" for i, option in enumerate(options))
        prompt = f"{prompt}\n\nOptions:\n{lettered}"
    gold, seed = row.get("gold"), row.get("seed")
    return Recorded(
        str(_field(row, ("question_id",), (str, int), where)), prompt, text,
        tokens or max(1, len(text) // _CHARS_PER_TOKEN), answer,
        None if gold is None else str(gold), seed if isinstance(seed, int) else None,
    )  # fmt: skip


def _field(
    row: dict[str, Any], names: tuple[str, ...], kind: Any, where: str, *, is_needed: bool = True
) -> Any:
    for name in names:
        value = row.get(name)
        if value is None:
            continue
        if not isinstance(value, kind) or isinstance(value, bool):
            raise TraceFileError(f"{where}: {name} is a {type(value).__name__}")
        return value
    if is_needed:
        raise TraceFileError(f"{where}: no field {' or '.join(names)}")
    return None
