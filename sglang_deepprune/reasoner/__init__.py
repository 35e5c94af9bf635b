"""The embedded reasoner: a tiny causal language model that reasons visibly, and its questions.

Small enough to travel in the package and to be sampled on any CPU, real enough that siblings
disagree, err in various ways and gain from a vote. `model_path()` is an ordinary checkpoint folder.
"""

from __future__ import annotations

from pathlib import Path

from sglang_deepprune.reasoner.questions import Question, questions

__all__ = ["Question", "model_path", "questions"]


def model_path() -> str:
    """The folder of the packaged checkpoint, for `--model-path` or `from_pretrained`."""
    return str(Path(__file__).parent / "weights")
