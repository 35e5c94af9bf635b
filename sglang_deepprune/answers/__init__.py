"""Answers of sibling traces: take them out of a text, and decide whether two are the same.

`extract`, `canonical` and `compare` are pure and fast enough for a decode step. `Fence` runs
the slow path (`equivalence`, with sympy) in a child process that can be killed.
"""

from sglang_deepprune.answers.canonical import canonical
from sglang_deepprune.answers.compare import Allowance, compare
from sglang_deepprune.answers.extract import Extraction, extract
from sglang_deepprune.answers.fence import Fence

__all__ = ["Allowance", "Extraction", "Fence", "canonical", "compare", "extract"]
