"""How a causal LM is fine-tuned to judge: the settings and their options. Imports nothing heavy."""

from __future__ import annotations

import argparse
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Recipe:
    """One run's settings, as saved beside the weights."""

    cut: str = "words:25"
    is_focal: bool = True
    gamma: float = 2.0
    alpha: float = 0.5  # weight of "the same answer"; 1 - alpha of "different answers"
    oversample: int = 2  # times that the rarer label is shown; 1: once, as the other
    pairs_a_question: int = 200
    epochs: float = 1.0
    batch: int = 8
    learning_rate: float = 1e-4
    lora: int = 0  # rank; 0: all weights learn
    seed: int = 0


_DEFAULT = Recipe()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `--base`."""
    group = parser.add_argument_group("a causal LM (needs accelerate; peft for --lora)")
    group.add_argument("--base", help="folder, GGUF file or hub name to fine-tune")
    group.add_argument("--cut", default=_DEFAULT.cut, help="words:25, tokens:500, ...")
    group.add_argument("--no-focal", action="store_true", help="plain cross entropy")
    group.add_argument("--gamma", type=float, default=_DEFAULT.gamma)
    group.add_argument("--alpha", type=float, default=_DEFAULT.alpha)
    group.add_argument("--oversample", type=int, default=_DEFAULT.oversample, help="1: off")
    group.add_argument("--pairs", type=int, default=_DEFAULT.pairs_a_question, help="a question")
    group.add_argument("--epochs", type=float, default=_DEFAULT.epochs)
    group.add_argument("--batch", type=int, default=_DEFAULT.batch)
    group.add_argument("--lr", type=float, default=_DEFAULT.learning_rate)
    group.add_argument("--lora", type=int, default=_DEFAULT.lora, help="rank; 0: all weights")


def recipe_of(args: argparse.Namespace) -> Recipe:
    """Raises ValueError with one sentence."""
    if args.oversample < 1 or args.pairs < 1 or args.batch < 1 or args.lora < 0:
        raise ValueError("--oversample, --pairs and --batch are at least 1, --lora at least 0")
    if not (0 < args.alpha < 1 and args.gamma >= 0 and args.lr > 0 and args.epochs > 0):
        raise ValueError("--alpha is between 0 and 1, --gamma >= 0, --lr and --epochs above 0")
    return Recipe(
        args.cut, not args.no_focal, args.gamma, args.alpha, args.oversample, args.pairs,
        args.epochs, args.batch, args.lr, args.lora, args.seed,
    )  # fmt: skip
