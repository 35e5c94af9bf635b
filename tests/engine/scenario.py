"""Prompts and scripted traces that the engine tests share: what is said, and what must follow.

A trace's marker (`<A>`) tells the marker judge what to think of it, its boxed number is its vote.
All traces of a prompt start with the same words, so only the marker tells them apart early on.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.scripted import write_scripts

WORDS = "wait thus since so therefore hmm but let me check again".split()
ORDER = " ".join(["order:", *WORDS * 5, "="])
CUT = {"cut": "tokens", "cut_tokens": 16, "window": 8}


def trace(marker: str, length: int, answer: str | None, turn: int = 0) -> str:
    """About `length` words after the marker, then the answer. Equal texts need no judge, so
    siblings that should be judged differ by `turn`."""
    body = " ".join(WORDS[(i * (turn + 1) + turn) % len(WORDS)] for i in range(length))
    end = "" if answer is None else f" the answer is \\boxed{{{answer}}}"
    return f"<{marker}> {body}{end}"


# prompt -> one text a sibling
PROMPTS: dict[str, list[str]] = {
    # Two clusters: A is the larger one.
    "prune: what is 12 + 3 =": [
        trace("A", 90, "15"), trace("A", 100, "15"), trace("B", 110, "9"), trace("A", 120, "15"),
        trace("B", 120, "9"), trace("A", 120, "15"), trace("A", 120, "15"), trace("B", 120, "9"),
    ],
    # Three short traces agree before the long ones get anywhere.
    "decide: what is 4 + 3 =": [
        trace("A", 30, "7"), trace("A", 34, "7"), trace("A", 40, "7"), *[trace("B", 200, "8")] * 9,
    ],
    # Nobody agrees: a lazy group has to run them all.
    "lazy: what is 6 + 6 =": [trace("A", 24 + 3 * i, str(i)) for i in range(12)],
    # A prompt long enough for SGLang's cache-aware orders to see it.
    ORDER: [
        trace("A", 100 + 6 * i, answer) for i, answer in enumerate(["5", "6", "5", "6", "5", "7"])
    ],
    # For one test only: single requests get their scripts in order of arrival.
    "client: what is 5 + 2 =": [
        trace("A", 30, "7"), trace("A", 34, "7"), trace("A", 40, "7"), *[trace("B", 200, "8")] * 5,
    ],
    # One cluster of three, and one sibling that the judge has no verdict on.
    "D1: what is 1 + 1 =": [
        trace("A", 60, "2"), trace("A", 80, "2"), trace("NAN", 80, "3"), trace("A", 80, "2"),
    ],
    "D2: what is 2 + 2 =": [trace("A", 30, "4"), trace("A", 30, "4"), trace("A", 30, "4")],
    "D3: count": [trace("A", 330, "1")] * 12,
    "D4: slow": [trace("SLOW", 600, "1", turn) for turn in range(8)],
    "D8: think": [
        "<A> Short.</think>Four. \\boxed{4}", trace("A", 200, "4"),
    ],
    "D9: stop": [
        "wait\n\nso \\boxed{1", "thus\n\nso \\boxed{1", trace("A", 60, "5"), trace("A", 90, "5"),
    ],
    "D10: 用中文思考：7乘8等于几？": [
        "<A> 首先，我们把7乘以8……等等，重新检查一下。" * 6 + "所以最终答案为 \\boxed{56}。",
        "<A> 首先，七八五十六🙂，等等，因此再检查。" * 8 + "所以最终答案为 \\boxed{56}。",
        "<B> Moment mal, zuerst rechnen wir 7 mal 8. Also weiter. " * 5 + "Antwort: \\boxed{54}",
        "<A> 7*8=56 7*8=56 56/8=7 56/7=8 " * 8 + "\\boxed{56}",
    ],
    "D12: four ways": [
        "<think>so \\boxed{5}</think>", "so \\boxed{12", "I cannot say.", "\\boxed{5}",
    ],
    "D12: none": ["I cannot say.", "Hard to tell.", "No idea.", "Who knows."],
    "fault: RAISE": [trace("RAISE", 60, "3", turn) for turn in range(4)],
    "fault: SHAPE": [trace("SHAPE", 60, "3", turn) for turn in range(4)],
    "fault: NAN": [trace("NAN", 60, "3", turn) for turn in range(4)],
    "fault: HANG": [trace("HANG", 60, "3", turn) for turn in range(4)],
    "fault: DIE": [trace("DIE", 60, "3", turn) for turn in range(4)],
    # Short ones, for many requests at once: agreement, two camps, none, and no answers at all.
    "mixed: agree": [trace("A", 20 + 2 * i, "7", i % 3) for i in range(8)],
    "mixed: camps": [
        trace("B" if i % 3 else "A", 24 + 3 * i, "6" if i % 3 else "5", i % 4) for i in range(9)
    ],
    "mixed: differ": [trace("ABC"[i % 3], 18 + 2 * i, str(i), i % 4) for i in range(12)],
    "mixed: silent": [trace("A", 20 + 2 * i, None, i % 3) for i in range(6)],
    # Prompts without one right answer, or with one in the prompt alone.
    "poem: write of the moon": [
        f"The moon has set, and {bird} reply to what the wind is singing by."
        for bird in ("owls", "crows", "swans", "rooks", "larks", "wrens")
    ],
    "code: write a function that adds": [
        f"Sure:\n```python\ndef add({a}, {b}):\n    return {a} + {b}\n```\n"
        for a, b in ("ab", "xy", "pq", "uv", "mn", "st")
    ],
    "proof: show that the square of an even number is even": [
        f"Let {k} be half of n. Then n^2 = 4{k}^2, which is even. This completes the proof."
        for k in "kmprst"
    ],
    "all: show all pairs of numbers whose sum is 5": [
        trace("A", 24 + 6 * turn, pair, turn)
        for turn, pair in enumerate(["(1, 4)", "(1, 4)", "(1, 4)", "(2, 3)", "(0, 5)", "(2, 3)"])
    ],
    "box: my answer is \\boxed{42}, put yours into \\boxed{}": [
        trace("A", 20 + turn, None, turn) for turn in range(4)
    ],
    # The template has opened the thinking: what is boxed there is no answer of a cut trace.
    "open: what is 2 * 2 = <think>\n": [
        f"so \\boxed{{9}}, {trace('A', 40 + turn, None)}</think> \\boxed{{4}}" for turn in range(4)
    ],
    "marks: kimi": ["◁think▷so \\boxed{9}◁/think▷ \\boxed{4}"] * 4,
    "marks: channels": [
        "<|channel|>analysis<|message|>so \\boxed{9}<|channel|>final<|message|>\\boxed{4}"
    ] * 4,
    "marks: none": ["plainly \\boxed{4}"] * 4,
    # Equal after sympy only: the fence decides, and the last output waits for it.
    "fence: expand": [
        "<A> so \\boxed{(x+1)^2}", "<A> so \\boxed{x^2+2x+1}", "<A> so \\boxed{x^2+x+1}",
    ],
}  # fmt: skip


def chat_ids(tokenizer: object, prompt: str) -> list[int]:
    """Prompt ids of a one-message chat, as the server renders it."""
    return list(
        tokenizer.apply_chat_template(  # type: ignore[attr-defined]
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
        )
    )


def token_lists(tokenizer: object, texts: list[str]) -> list[list[int]]:
    """Output ids of each text, the end token included."""
    end = tokenizer.eos_token_id  # type: ignore[attr-defined]
    return [[*tokenizer.encode(text), end] for text in texts]  # type: ignore[attr-defined]


def write(tokenizer: object, path: Path) -> None:
    """The script file for all prompts, both as plain text and as a chat."""
    scripts: dict[tuple[int, ...], Sequence[Sequence[int]]] = {}
    for prompt, texts in PROMPTS.items():
        tokens = token_lists(tokenizer, texts)
        scripts[tuple(tokenizer.encode(prompt))] = tokens  # type: ignore[attr-defined]
        scripts[tuple(chat_ids(tokenizer, prompt))] = tokens
    write_scripts(path, scripts)
