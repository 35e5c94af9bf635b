"""The text that a language model judges, as token ids in two parts: what pairs share, and the rest.

The text is `lm_prompt.txt` (or the judge's own, see `Settings`), inside the model's chat template
where it has one. Of a pair the trace with the higher sibling index comes first: so the score does
not depend on the order of the pair, and what a new trace is compared with shares a prefix, which
is instruction, problem and the new trace (it mostly has the highest index). Used by the judge in
this process (`llm.py`) and the one on a second server (`remote.py`), which must see the same ids.

What a trace says is data. A control token that stands in it ("<|im_end|>", "<think>") is written as
ordinary characters and never parsed as the token.
"""

from __future__ import annotations

import json
import re
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sglang_deepprune.types import Pair

SETTINGS_FILE = "deepprune_judge.json"  # beside a judge's weights; written by train-judge
PROBLEM_CHARS = 2000  # the end of it, where the question stands
_FIELDS = ("{problem}", "{first}", "{second}")
_MARK = "\ue000{}\ue001"  # private use: no template and no tokenizer gives them a meaning
_MAX_CACHED_TOKENS = 4_000_000  # 16 MB


class PromptError(ValueError):
    """A judge's prompt or labels that cannot be used; one sentence."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How a model wants to be asked.

    Attributes
    ----------
    prompt : str
        Holds {first} and {second}, in this order, and may hold {problem} before them.
    labels : tuple[str, str]
        What the reply starts with for "the same answer" and for "different answers".
    """

    prompt: str
    labels: tuple[str, str] = ("Yes", "No")

    def __post_init__(self) -> None:
        places = [self.prompt.find(name) for name in _FIELDS]
        if not (0 <= places[1] < places[2] and places[0] < places[1]):
            raise PromptError("a judge's prompt must hold {first} before {second}")
        if len(self.labels) != 2 or not all(isinstance(one, str) and one for one in self.labels):
            raise PromptError("a judge has two labels: for the same answer, and for different ones")


def load_settings(folder: str | Path | None) -> Settings:
    """A judge's own settings if its folder holds any, else the prompt of this project."""
    path = Path(folder) / SETTINGS_FILE if folder is not None else None
    if path is None or not path.is_file():
        return Settings(Path(__file__).with_name("lm_prompt.txt").read_text(encoding="utf-8"))
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return Settings(found["prompt"], tuple(found["labels"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise PromptError(f"{path.name} cannot be used: {str(error)[:200]}") from error


def save_settings(folder: str | Path, settings: Settings) -> None:
    body = {"prompt": settings.prompt, "labels": list(settings.labels)}
    (Path(folder) / SETTINGS_FILE).write_text(json.dumps(body, indent=2) + "\n")


@dataclass(frozen=True, slots=True)
class Prompt:
    """One pair as token ids: `prefix + rest`."""

    prefix: tuple[int, ...]  # instruction, problem, first trace
    rest: tuple[int, ...]  # second trace, closing words; never empty
    group_id: str = ""
    stem_tokens: int = 0  # of the prefix: instruction and problem, as in all prompts of the group

    @property
    def stem(self) -> tuple[int, ...]:
        return self.prefix[: self.stem_tokens]

    def after_stem(self) -> Prompt:
        """The same tokens with no more than the stem for a prefix."""
        return Prompt(self.stem, self.prefix[self.stem_tokens :] + self.rest, self.group_id)


class PromptWriter:
    """Writes pairs for one tokenizer.

    Parameters
    ----------
    tokenizer
        A transformers tokenizer.
    settings : Settings
    max_tokens : int
        Of a whole prompt. Longer traces keep their end, where the latest results stand.
    """

    def __init__(self, tokenizer: Any, settings: Settings, max_tokens: int = 1 << 30):
        self.tokenizer = tokenizer
        self.label_ids = _label_ids(tokenizer, settings.labels)
        names = {str(token) for token in tokenizer.get_added_vocab()}
        names = {name for name in names if len(name) > 1 and name.strip()}
        longest_first = sorted(names, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, longest_first))) if names else None
        self._fixed = self._template(settings.prompt)
        self._room = max_tokens - sum(len(part) for part in self._fixed)
        self._cache: OrderedDict[tuple[str, str], array[int]] = OrderedDict()  # by group and text
        self._num_cached = 0  # tokens

    def write(self, pairs: Sequence[Pair]) -> list[Prompt]:
        """One prompt a pair, in order."""
        return [self._write(pair) for pair in pairs]

    def _write(self, pair: Pair) -> Prompt:
        second, first = sorted((pair.left, pair.right), key=lambda trace: trace.sibling)
        opening, between, middle, closing = self._fixed
        owner = pair.group_id
        problem = self.encode(first.prompt[-PROBLEM_CHARS:].strip() or "(not shown)", owner)
        problem = problem[-max(16, self._room // 4) :]
        most = max(16, (self._room - len(problem)) // 2)
        head, tail = (self.encode(one.text.strip(), owner)[-most:] for one in (first, second))
        stem = (*opening, *problem, *between)
        return Prompt((*stem, *head, *middle), (*tail, *closing), pair.group_id, len(stem))

    def encode(self, text: str, owner: str = "") -> array[int]:
        """Ids of a text that is data. Each is read once for the group `owner` while it is among the
        latest."""
        ids = self._cache.get((owner, text))
        if ids is None:
            ids = self._cache[owner, text] = array("i", self._encode(text))
            self._num_cached += len(ids)
            while self._num_cached > _MAX_CACHED_TOKENS and len(self._cache) > 1:
                self._num_cached -= len(self._cache.popitem(last=False)[1])
        else:
            self._cache.move_to_end((owner, text))
        return ids

    def forget(self, owners: Iterable[str]) -> None:
        """Drop the texts of groups that have ended."""
        ended = set(owners)
        for key in [key for key in self._cache if key[0] in ended]:
            self._num_cached -= len(self._cache.pop(key))

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = []
        start = 0
        for found in self._control.finditer(text) if self._control else ():
            # Cut inside the token's name: neither half is a name, so both are plain characters.
            ids += self._plain(text[start : found.start() + 1])
            start = found.start() + 1
        return ids + self._plain(text[start:])

    def _plain(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

    def _template(self, prompt: str) -> tuple[list[int], list[int], list[int], list[int]]:
        """Ids around problem, first and second trace; the model's own control tokens are parsed."""
        if "{problem}" not in prompt:
            prompt = prompt.replace("{first}", "{problem}\n\n{first}", 1)
        marked = prompt.strip()
        for name in _FIELDS:
            marked = marked.replace(name, _MARK.format(name))
        if getattr(self.tokenizer, "chat_template", None):
            text = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": marked}],
                tokenize=False, add_generation_prompt=True, enable_thinking=False,
            )  # fmt: skip
        else:
            text = (self.tokenizer.bos_token or "") + marked + "\n"
        parts = re.split("|".join(map(re.escape, map(_MARK.format, _FIELDS))), text)
        if len(parts) != len(_FIELDS) + 1:
            raise PromptError("the model's chat template does not keep the prompt as it is")
        opening, between, middle, closing = map(self._plain, parts)
        return opening, between, middle, closing


def score_readable(
    pairs: Sequence[Pair], score: Callable[[Sequence[Pair]], np.ndarray]
) -> np.ndarray:
    """[num_pairs] float32: `score` of the pairs that can be read; NaN for a trace without text."""
    scores = np.full(len(pairs), np.nan, dtype=np.float32)
    readable = [
        place for place, pair in enumerate(pairs)
        if pair.left.text.strip() and pair.right.text.strip()
    ]  # fmt: skip
    if readable:
        scores[readable] = score([pairs[place] for place in readable])
    return scores


def _label_ids(tokenizer: Any, labels: Sequence[str]) -> tuple[int, int]:
    """The first token of each label. Raises `PromptError` where they are the same."""
    same, different = (
        (tokenizer(label, add_special_tokens=False)["input_ids"] or [None])[0] for label in labels
    )
    if same is None or different is None or same == different:
        raise PromptError(f"the labels {labels[0]!r} and {labels[1]!r} start with the same token")
    return same, different
