"""Recorded traces as scripts for a tiny model: loading, tokenizer, checkpoint, oracle file.

A recording is gzipped JSON lines, one trace a row: question_id, question, options, gold, trace,
answer. The question's text and its options are separate fields (the text may quote other options),
so a prompt shows both. `(question_id, seed)` is no key: traces are told apart by their order.

A recorded trace is the thinking alone; its final answer is a field. Each script therefore ends
with a closing of ours, `</think>` and "The answer is (X).", from which the server's extractor
reads the recorded letter, and with the end token. A trace that was recorded without an answer,
finished or cut, closes with a refusal and abstains.

Everything derived lies in a cache directory outside the repository, keyed by the recording's hash:
the recordings have no licence, so neither their text nor a tokenizer of it is kept here.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.scripted import write_scripts

VOCAB_SIZE = 8192
MAX_POSITIONS = 40960
EOS = "<|im_end|>"
NO_ANSWER = "I could not reach an answer."
ORACLE_PREFIX_CHARS = 2000  # nine questions have traces that share their first 200
_FORM = 5  # of the cached files


@dataclass(frozen=True, slots=True)
class Recorded:
    """One sibling of a question."""

    text: str
    answer: str | None

    @property
    def script(self) -> str:
        """What the model is made to say, the end token aside."""
        said = f"The answer is ({self.answer})." if self.answer else NO_ANSWER
        return f"{self.text}\n</think>\n\n{said}"


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt with its recorded traces, in the order of the recording."""

    question_id: str
    prompt: str
    gold: str
    traces: tuple[Recorded, ...]


@dataclass(frozen=True, slots=True)
class Played:
    """A question in tokens."""

    question: Question
    prompt_ids: tuple[int, ...]
    lengths: tuple[int, ...]  # script tokens a sibling, the end token included

    @property
    def answers(self) -> tuple[str | None, ...]:
        return tuple(trace.answer for trace in self.question.traces)


@dataclass(frozen=True, slots=True)
class Workspace:
    """What a server needs to play a recording."""

    folder: Path
    questions: tuple[Played, ...]

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def oracle(self) -> Path:
        return self.folder / "oracle.jsonl"


def cache_root() -> Path:
    """Where derived files may lie: never in the repository."""
    return Path(os.environ.get("XDG_CACHE_HOME") or tempfile.gettempdir()) / "deepprune-replay"


def load_questions(path: Path) -> list[Question]:
    """All questions of a recording, in the order in which they first appear."""
    opener = gzip.open if path.suffix == ".gz" else open
    rows: dict[str, list[dict[str, Any]]] = {}
    with opener(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            rows.setdefault(row["question_id"], []).append(row)
    return [_question(name, found) for name, found in rows.items()]


def _question(name: str, rows: Sequence[dict[str, Any]]) -> Question:
    first = rows[0]
    options = "\n".join(f"{chr(65 + i)}. {text}" for i, text in enumerate(first["options"]))
    ask = "Think, then give one letter."
    prompt = f"{first['question']}\n\nOptions:\n{options}\n\n{ask}\n<think>\n"
    traces = tuple(Recorded(row["trace"], row["answer"] or None) for row in rows)
    return Question(name, prompt, first["gold"], traces)


def spread(questions: Sequence[Question], count: int) -> list[Question]:
    """`count` questions at equal distances, so that every part of the recording is there."""
    count = min(count or len(questions), len(questions))
    return [questions[i * len(questions) // count] for i in range(count)]


def prepare(path: Path, count: int) -> Workspace:
    """The model, the tokenizer and the scripts of `count` questions (0: all), from the cache."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    folder = cache_root() / f"{digest}-v{_FORM}"
    everything = load_questions(path)
    if not (folder / "done").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        _make_model(folder / "model", everything)
        write_oracle(folder / "oracle.jsonl", everything)
        (folder / "done").touch()
    return Workspace(folder, tuple(_encode(folder / "model", spread(everything, count))))


def write_workspace_scripts(workspace: Workspace, path: Path) -> None:
    """The scripted plugin's file for the workspace's questions."""
    tokenizer = _tokenizer(workspace.model)
    end = tokenizer.token_to_id(EOS)
    scripts: dict[tuple[int, ...], Sequence[Sequence[int]]] = {}
    for played in workspace.questions:
        texts = [trace.script for trace in played.question.traces]
        scripts[played.prompt_ids] = [[*e.ids, end] for e in tokenizer.encode_batch(texts)]
    write_scripts(path, scripts)


def write_oracle(path: Path, questions: Sequence[Question]) -> None:
    """The oracle judge's file; see `sglang_deepprune/judges/oracle.py`."""
    with path.open("w", encoding="utf-8") as out:
        for question in questions:
            for trace in question.traces:
                row = {"text_prefix": trace.text[:ORACLE_PREFIX_CHARS], "answer": trace.answer}
                out.write(json.dumps(row) + "\n")


def _encode(model: Path, questions: Sequence[Question]) -> list[Played]:
    tokenizer = _tokenizer(model)
    prompts = tokenizer.encode_batch([question.prompt for question in questions])
    played = []
    for question, prompt in zip(questions, prompts, strict=True):
        scripts = tokenizer.encode_batch([trace.script for trace in question.traces])
        lengths = tuple(len(script.ids) + 1 for script in scripts)
        played.append(Played(question, tuple(prompt.ids), lengths))
    if len({one.prompt_ids for one in played}) != len(played):
        raise ValueError("two questions have the same prompt: their scripts cannot be told apart")
    return played


def _tokenizer(model: Path) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(model / "tokenizer.json"))


def _make_model(path: Path, questions: Sequence[Question]) -> None:
    """One layer, one head: the forward pass is real, and the KV of a token takes 64 bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from tests.engine.tiny_model import random_qwen3

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (trace.script for question in questions for trace in question.traces)
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=EOS, pad_token=EOS)
    tokenizer.save_pretrained(path)
    random_qwen3(
        tokenizer,
        vocab_size=VOCAB_SIZE,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=MAX_POSITIONS,
    ).save_pretrained(path)
