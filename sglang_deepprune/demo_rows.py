"""The demo's modes, and from their outcomes to the rows of its table. Pure.

Plain n>1 is the preset `collect`: for it `policy.plan` returns an empty plan and the config's
`is_judged` is false, so no sibling is stopped and no judge is asked. `"deepprune": false` would
not do as a baseline: outside a group all siblings share the request's seed, while members of a
group draw from (seed, i), which is what makes the modes comparable sibling by sibling.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from sglang_deepprune.config import DeepPruneConfig
from sglang_deepprune.equal_tokens import Sampled, cons_at_tokens, is_same
from sglang_deepprune.reasoner import Question
from sglang_deepprune.truncation import WordCut
from sglang_deepprune.words import REASONING_WORDS

PLAIN = "plain n>1 (collect)"
# Most of the reasoner's traces hold fewer reasoning words than the paper's 25: the judge would see
# all of them, and there would be nothing left to save.
SHORT_CUT: dict[str, Any] = {"cut_words": 4, "window": 8}


@dataclass(frozen=True, slots=True)
class Mode:
    """One row of the table: its name and what its requests ask for."""

    name: str
    settings: dict[str, Any]


MODES = {
    "balanced": Mode("balanced (lazy, decided vote)", {"preset": "balanced"}),
    "latency": Mode("latency (decided vote)", {"preset": "latency"}),
    "paper": Mode("paper, K2=20", {"preset": "paper", "k2": 20}),
    "paper-scaled": Mode("paper, K2=n/4", {"preset": "paper", "k2": 0, **SHORT_CUT}),
}


def modes(names: Sequence[str]) -> list[Mode]:
    """Plain first: it is everybody's baseline."""
    return [Mode(PLAIN, {"preset": "collect"}), *(MODES[name] for name in names)]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one question brought in one mode."""

    question: Question
    group: dict[str, Any]  # the record, schema/record.schema.json
    texts: tuple[str, ...]  # [n]

    @property
    def is_right(self) -> bool:
        return is_same(self.group["answer"], self.question.answer)

    @property
    def finished(self) -> list[str | None]:
        """Answers of the siblings that ran to their end."""
        return [c["answer"] for c in self.group["choices"] if c["state"] == "finished"]

    def unchanged(self, plain: Outcome) -> list[bool]:
        """Of each sibling that ran to its end: whether it wrote what it wrote under plain."""
        choices = self.group["choices"]
        triples = zip(choices, self.texts, plain.texts, strict=True)
        return [mine == other for choice, mine, other in triples if choice["state"] == "finished"]

    @property
    def sampled(self) -> Sampled:
        choices = self.group["choices"]
        answers = tuple(choice["answer"] for choice in choices)
        return Sampled(answers, tuple(choice["tokens"] for choice in choices), self.question.answer)


def row_of(
    mode: Mode, outcomes: Sequence[Outcome], seconds: float, plain: Sequence[Outcome]
) -> dict[str, Any]:
    """One mode's row; cons@k beside it is taken from the plain siblings at the mode's tokens."""
    states = Counter(choice["state"] for one in outcomes for choice in one.group["choices"])
    singles = [is_same(a, one.question.answer) for one in outcomes for a in one.finished]
    tokens = mean(one.group["generated_tokens"] for one in outcomes)
    rival = cons_at_tokens([one.sampled for one in plain], tokens)
    pairs = list(zip(outcomes, plain, strict=True))
    unchanged = [same for one, other in pairs for same in one.unchanged(other)]
    return {
        "mode": mode.name,
        "questions": len(outcomes),
        "vote_right": round(mean(one.is_right for one in outcomes), 4),
        "single_right": round(mean(singles), 4) if singles else None,
        "same_winner": round(mean(_is_same_winner(one, other) for one, other in pairs), 4),
        "same_texts": round(mean(unchanged), 4) if unchanged else None,
        "tokens": round(tokens, 1),
        "seconds": round(seconds, 2),
        "finished": states["finished"],
        "pruned": states["pruned"],
        "decided": states["decided"],
        "not_started": states["not_started"],
        "other_ends": sum(states.values())
        - sum(states[s] for s in ("finished", "pruned", "decided", "not_started")),
        "judge_calls": sum(one.group["judge_calls"] for one in outcomes),
        "judge_tokens": sum(one.group["judge_tokens"] for one in outcomes),
        "cons_k": round(rival.k, 2),
        "cons_k_right": round(rival.accuracy, 4),
        **_cut_of(mode, plain),
    }


def _is_same_winner(one: Outcome, other: Outcome) -> bool:
    a, b = one.group["answer"], other.group["answer"]
    return a == b or is_same(a, b)


def _cut_of(mode: Mode, plain: Sequence[Outcome]) -> dict[str, Any]:
    """The judge's cut, its window, and the share of an unpruned trace that the cut is."""
    config = DeepPruneConfig().override(mode.settings)
    if not config.prunes_by_judge:
        return {"cut_words": None, "window": None, "cut_share": None}
    texts = [text for one in plain for text in one.texts]
    share = mean(cut_share(text, config.cut_words) for text in texts)
    return {"cut_words": config.cut_words, "window": config.window, "cut_share": round(share, 3)}


def cut_share(text: str, words: int) -> float:
    """How much of a trace its first `words` reasoning words are, by characters; 1: all of it."""
    # The server's own rule with characters for tokens: a client sees no token borders.
    characters = [ord(character) for character in text]
    cut = WordCut(words, len(text) + 1, REASONING_WORDS, lambda ids: "".join(map(chr, ids)))
    return cut.end(characters).num_tokens / len(characters) if characters else 1.0
