"""Belief judge: from each trace a distribution over its final answers, P(same) = sum p_i q_i.

A softmax over the answers that a trace may still give (`candidates.py`: the lettered options of the
prompt, or the results stated so far and "none of these"), linear in what the trace says about
each; then a logistic head on the pair, so that a score is a probability. O(n) readings of n traces,
1 to 10 ms each on one core, no torch. `training.py` fits the weights (policies: docs/judges.md).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from sglang_deepprune.judges.candidates import (
    NUM_FEATURES,
    Candidates,
    option_candidates,
    options_of,
    result_candidates,
)
from sglang_deepprune.judges.vectors import VectorCache
from sglang_deepprune.types import Pair, Trace

FORMAT = "sglang-deepprune belief 1"
OTHER = ""  # "none of the results stated so far"
KINDS = ("options", "results")
EMBEDDED = Path(__file__).parent / "embedded" / "belief.json"
NUM_PAIR_FEATURES = 5
_MAX_TEXTS = 4096
_TYPICAL_LOG_CHARS, _SPREAD_LOG_CHARS = 9.0, 1.5
_EDGE = 1e-4

Belief = dict[str, float]


@dataclass(frozen=True, slots=True)
class Weights:
    """One kind of candidates: options or results.

    Attributes
    ----------
    candidate : list[float]
        [2 * NUM_FEATURES]: of the features, and of the features times the scaled log length.
    other : list[float]
        [2]: the logit of "none of these", and its slope over the scaled log length.
    pair : list[float]
        [NUM_PAIR_FEATURES + 1]: the pair head, its intercept last.
    """

    candidate: list[float]
    other: list[float]
    pair: list[float]

    def __post_init__(self) -> None:
        shapes = {"candidate": 2 * NUM_FEATURES, "other": 2, "pair": NUM_PAIR_FEATURES + 1}
        for name, size in shapes.items():
            values = getattr(self, name)
            if len(values) != size or not all(math.isfinite(value) for value in values):
                raise ValueError(f"{name} must be {size} finite numbers")


def read(trace: Trace) -> tuple[str, Candidates]:
    """(kind, the candidates of a truncated trace and what it says about them)."""
    options = options_of(trace.prompt)
    if options:
        return "options", option_candidates(trace.text, options)
    return "results", result_candidates(trace.text)


def scaled_length(text: str) -> float:
    """Log characters, about 0 in the middle and 1 a spread away."""
    return (math.log(max(1, len(text))) - _TYPICAL_LOG_CHARS) / _SPREAD_LOG_CHARS


def belief(candidates: Candidates, length: float, weights: Weights, *, has_other: bool) -> Belief:
    """Distribution over the names of `candidates`, and `OTHER` if `has_other`; sums to 1."""
    names = list(candidates.names)
    both = np.concatenate([candidates.features, candidates.features * length], axis=1)
    logits = both.astype(np.float64) @ np.asarray(weights.candidate)
    if has_other:
        names.append(OTHER)
        logits = np.append(logits, weights.other[0] + weights.other[1] * length)
    shares = np.exp(logits - logits.max())
    shares /= shares.sum()
    return dict(zip(names, shares.tolist(), strict=True))


def pair_features(left: Belief, right: Belief, lengths: tuple[float, float]) -> list[float]:
    """[NUM_PAIR_FEATURES], the same either way round."""
    same = sum(p * right.get(name, 0.0) for name, p in left.items() if name != OTHER)
    other = left.get(OTHER, 0.0) * right.get(OTHER, 0.0)
    peak = max(left.values()) * max(right.values())
    clipped = min(max(same, _EDGE), 1 - _EDGE)
    return [math.log(clipped / (1 - clipped)), same, other, peak, sum(lengths)]


def pair_score(features: Sequence[float], head: Sequence[float]) -> float:
    """P(same answer) of the logistic pair head."""
    logit = sum(w * x for w, x in zip(head, features, strict=False)) + head[-1]
    return 1 / (1 + math.exp(-max(-30.0, min(30.0, logit))))


class BeliefJudge:
    """NaN: an empty text, or a kind of question that the weights were not trained for.

    Parameters
    ----------
    path : str
        JSON written by `sglang-deepprune train-judge`; without it, what ships: trained on traces of
        the embedded reasoner, for open numeric answers alone. Raises ValueError on anything else.
    """

    name = "belief"
    mixes_groups = True

    def __init__(self, path: str | Path = EMBEDDED) -> None:
        self.weights = load_weights(path)
        self._beliefs: VectorCache[tuple[str, Belief, float] | None] = VectorCache(
            self._believe, _MAX_TEXTS
        )

    def score(self, pairs: Sequence[Pair]) -> np.ndarray:
        """[num_pairs] float32 in [0, 1]; see `Judge.score`."""
        scores = np.full(len(pairs), np.nan, dtype=np.float32)
        keys = {_key(trace) for pair in pairs for trace in (pair.left, pair.right)}
        known = self._beliefs.of(keys)
        for place, pair in enumerate(pairs):
            left, right = known[_key(pair.left)], known[_key(pair.right)]
            if left is None or right is None or left[0] != right[0]:
                continue
            features = pair_features(left[1], right[1], (left[2], right[2]))
            scores[place] = pair_score(features, self.weights[left[0]].pair)
        return scores

    def _believe(self, key: str) -> tuple[str, Belief, float] | None:
        prompt, _, text = key.partition("\0")
        if not text.strip():
            return None
        kind, candidates = read(Trace(0, text, 0, "tokens", prompt=prompt))
        if kind not in self.weights:
            return None
        length = scaled_length(text)
        has_other = kind == "results"
        own = belief(candidates, length, self.weights[kind], has_other=has_other)
        return kind, own, length


def _key(trace: Trace) -> str:
    return f"{trace.prompt.replace(chr(0), ' ')}\0{trace.text}"


def load_weights(path: str | Path) -> dict[str, Weights]:
    """Weights by kind of candidates. Raises ValueError with one sentence."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        if found.get("format") != FORMAT:
            raise ValueError(f"not a file of format {FORMAT!r}")
        weights = {kind: Weights(**found[kind]) for kind in KINDS if found.get(kind)}
    except (
        OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError
    ) as error:  # fmt: skip
        reason = str(error)[:200]  # it may quote the file
        raise ValueError(f"{Path(path).name} holds no belief judge: {reason}") from error
    if not weights:
        raise ValueError(f"{Path(path).name} holds no weights")
    return weights


def save_weights(
    path: str | Path, weights: dict[str, Weights], trained_on: dict[str, object]
) -> None:
    """Write what `load_weights` reads, with where it comes from."""
    kinds = {kind: asdict(one) for kind, one in weights.items()}
    report = {"format": FORMAT, "trained_on": trained_on, **kinds}
    Path(path).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
