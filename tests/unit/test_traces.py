"""The recordings' schema: what is read, what is refused, where a cut falls."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from sglang_deepprune.traces import CutError, TraceFileError, load, parse_cut, truncate
from tests.unit import recordings

ROW = {"question_id": "1", "prompt": "p", "text": "wait. The answer is 5.", "num_tokens": 8}


def test_both_spellings_and_gzip(tmp_path: Path):
    other = {
        "question_id": 1, "question": "Which?", "options": ["x", "y"], "trace": "it is B",
        "trace_tokens": 4, "answer": "B", "gold": "A", "seed": 3, "unknown": None,
    }  # fmt: skip
    path = tmp_path / "traces.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.write(json.dumps(ROW) + "\n\n" + json.dumps(other) + "\n")
    (question,) = load(path)  # ids are strings, whatever the file says
    first, second = question.traces
    assert (first.answer, first.gold, first.seed) == ("5", None, None)  # extracted
    assert second.prompt == "Which?\n\nOptions:\nA. x\nB. y"
    assert (second.text, second.num_tokens, second.answer, second.seed) == ("it is B", 4, "B", 3)


def test_an_answer_of_null_is_an_abstention_and_tokens_may_be_unknown(tmp_path: Path):
    row = {"question_id": "1", "prompt": "p", "text": "the answer is 5" * 4, "answer": None}
    (question,) = load(recordings.write(tmp_path / "f.jsonl", [row]))
    assert question.traces[0].answer is None
    assert question.traces[0].num_tokens == 15  # four characters each


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("{", "line 2: no JSON"),
        ("[1]", "line 2: no object"),
        (json.dumps({**ROW, "text": None}), "line 2: no field text or trace"),
        (json.dumps({**ROW, "text": 5}), "line 2: text is a int"),
        (json.dumps({**ROW, "num_tokens": 0}), "line 2: num_tokens is 0"),
        (json.dumps({**ROW, "num_tokens": True}), "line 2: num_tokens is a bool"),
        (json.dumps({**ROW, "answer": 5}), "line 2: answer is a int"),
        (json.dumps({"prompt": "p", "text": "t"}), "line 2: no field question_id"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, part: str):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(ROW) + "\n" + line + "\n")
    with pytest.raises(TraceFileError, match=part):
        load(path)


def test_missing_empty_and_broken_files(tmp_path: Path):
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "no.jsonl.gz").write_text("no gzip")
    for name in ("missing.jsonl", "empty.jsonl", "no.jsonl.gz"):
        with pytest.raises(TraceFileError, match=name):
            load(tmp_path / name)


def test_cuts(tmp_path: Path):
    text = " ".join(f"w{i}, wait" for i in range(50))
    row = {**ROW, "text": text, "num_tokens": 100, "answer": "7"}
    ((trace,),) = [q.traces for q in load(recordings.write(tmp_path / "f.jsonl", [row]))]
    half = truncate(trace, "share:0.5", sibling=3)
    assert half.text == text[: len(text) // 2]
    assert (half.sibling, half.num_tokens, half.cut, half.answer, half.prompt) == (
        3, 50, "tokens", None, "p",
    )  # fmt: skip
    words = truncate(trace, "words:25")
    assert words.text.count("wait") == 25
    assert words.cut == "words"
    whole = truncate(trace, "tokens:500")
    assert (whole.text, whole.num_tokens, whole.cut, whole.answer) == (text, 100, "end", "7")
    assert truncate(trace, "words:51").cut == "end"


@pytest.mark.parametrize(
    "cut", ["tokens", "tokens:0", "tokens:1.5", "share:1", "lines:3", "words:x"]
)
def test_no_cut(tmp_path: Path, cut: str):
    ((trace,),) = [q.traces for q in load(recordings.write(tmp_path / "f.jsonl", [ROW]))]
    with pytest.raises(CutError, match="use tokens:K"):
        truncate(trace, cut)


def test_a_file_is_read_by_what_it_holds(tmp_path: Path):
    line = json.dumps(ROW)
    (tmp_path / "mark.jsonl").write_text("\ufeff" + line, encoding="utf-8")
    (tmp_path / "packed.jsonl").write_bytes(gzip.compress(line.encode()))
    (tmp_path / "plain.jsonl.gz").write_text(line)
    for name in ("mark.jsonl", "packed.jsonl", "plain.jsonl.gz"):
        assert load(tmp_path / name)[0].question_id == "1"


@pytest.mark.parametrize("cut", ["words:inf", "tokens:inf"])
def test_an_endless_cut_is_none(cut: str):
    with pytest.raises(CutError):
        parse_cut(cut)
