"""A causal LM that the project makes and trains to judge, in seconds: its label token has signal.

Traces say one of four words; two of them agree when the words are the same.
"""

from __future__ import annotations

import functools
import json
import random
import tempfile
from pathlib import Path

from sglang_deepprune.judges.lm_prompt import Settings, save_settings
from sglang_deepprune.lm_recipe import Recipe
from sglang_deepprune.traces import Question, load
from sglang_deepprune.types import Pair, Trace
from tests.engine.tiny_model import make_tokenizer, random_qwen3

WORDS = ("north", "south", "east", "west")
RECIPE = Recipe(
    cut="tokens:500", learning_rate=3e-3, batch=32, epochs=3, pairs_a_question=28, gamma=2.0
)


def recording(num_questions: int, n: int, seed: int) -> list[Question]:
    rng = random.Random(seed)
    rows = []
    for question in range(num_questions):
        favourite = rng.choice(WORDS)
        for _ in range(n):
            answer = favourite if rng.random() < 0.6 else rng.choice(WORDS)
            filler = rng.choice(("hmm", "wait"))
            rows.append({
                "question_id": f"q{question}", "prompt": "Where?", "answer": answer,
                "text": f"{filler} it is {answer}", "num_tokens": 8,
            })  # fmt: skip
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
        file.flush()
        return load(file.name)


def make_base(
    path: Path, *, prompt: str = "{first} | {second}", num_layers: int = 2, head_dim: int = 16
) -> Path:
    """An untrained judge: a folder that `llm:` loads."""
    texts = [trace.text for one in recording(5, 8, 0) for trace in one.traces]
    tokenizer = make_tokenizer([*texts, *WORDS, "Yes", "No", "Where?"])
    model = random_qwen3(
        tokenizer, vocab_size=512, hidden_size=64, intermediate_size=128,
        num_hidden_layers=num_layers, num_attention_heads=4, num_key_value_heads=2,
        head_dim=head_dim, max_position_embeddings=512,
        initializer_range=0.1,  # at the usual 0.02 so small a model takes long to begin to learn
    )  # fmt: skip
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    save_settings(path, Settings(prompt))
    return path


@functools.cache
def trained() -> Path:
    """A trained judge, once a process; the folder lives as long as the process."""
    from sglang_deepprune.lm_training import train

    _KEEP.append(tempfile.TemporaryDirectory())
    folder = Path(_KEEP[-1].name)
    train(recording(80, 8, 1), str(make_base(folder / "base")), folder / "judge", RECIPE)
    return folder / "judge"


_KEEP: list[tempfile.TemporaryDirectory[str]] = []


def pairs(num_questions: int = 20, seed: int = 2) -> tuple[list[Pair], list[bool]]:
    """All pairs of unseen questions and their labels."""
    found, labels = [], []
    for question in recording(num_questions, 8, seed):
        traces = [Trace(i, t.text, 8, "tokens") for i, t in enumerate(question.traces)]
        for i, right in enumerate(traces):
            for j, left in enumerate(traces[:i]):
                found.append(Pair(left, right))
                labels.append(question.traces[i].answer == question.traces[j].answer)
    return found, labels
