"""The `sglang-deepprune` command: picks a subcommand and hands it the remaining arguments.

Owns the table of subcommands and nothing else. Each one lives in its own module as
`main(argv: list[str]) -> int`, parses its own arguments, and is imported only when it is asked
for, so that `--version` and `--help` stay instant.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

from sglang_deepprune import __version__


@dataclass(frozen=True, slots=True)
class Command:
    """Where a subcommand lives, and the line that `--help` prints for it."""

    module: str
    summary: str


COMMANDS = {
    "demo": Command(
        "sglang_deepprune.demo", "serve the embedded reasoner, prune live, print the table"
    ),
    "collect": Command(
        "sglang_deepprune.collect", "sample traces from an OpenAI-compatible server into a file"
    ),
    "pairs": Command(
        "sglang_deepprune.pairs", "labelled pairs of recorded traces, split by question"
    ),
    "train-judge": Command("sglang_deepprune.training", "fit a belief judge to recorded traces"),
    "eval-judge": Command(
        "sglang_deepprune.evaluation", "measure a judge on recorded traces, write its card"
    ),
    "calibrate": Command("sglang_deepprune.calibrate", "the tau for a wanted rate of false merges"),
    "doctor": Command(
        "sglang_deepprune.patches.doctor", "what is wrong with this set-up, or with a live server"
    ),
    "explain": Command("sglang_deepprune.explain", "what became of a group, from its reply"),
}


def build_parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    parser = argparse.ArgumentParser(
        prog="sglang-deepprune",
        description="DeepPrune inside SGLang: sample many, stop what is redundant, vote once.",
        epilog="\n".join(["commands:", *lines, "", "`COMMAND --help` lists its options."]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    # Cut by hand: argparse would drop a `--` that stands right behind the command.
    end = next((i + 1 for i, word in enumerate(argv) if not word.startswith("-")), len(argv))
    args = build_parser().parse_args(argv[:end])
    status = import_module(COMMANDS[args.command].module).main(argv[end:])
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
