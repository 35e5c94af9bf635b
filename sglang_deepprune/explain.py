"""`sglang-deepprune explain FILE|-`: what became of a group, in a few sentences, from its reply.

Takes what a client got: a reply of /generate, /v1/completions or /v1/chat/completions, a dump of a
stream, or the record alone. Exit codes: 0 explained, 1 no record in the input, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sglang_deepprune.findings import FAULT, NO_FAULT, WRONG_USAGE
from sglang_deepprune.policy import ABANDONED, OPEN_ENDED, POOL_FULL, RENEWED
from sglang_deepprune.reply import ReplyError, read

_MOST_ANSWERS = 4
_MOST_LETTERS = 60
_STOPPED = ("pruned", "decided", "not_started")
_DECIDED = re.compile(r"decided: (\d+):(\d+) of (\d+) votes, at most (\d+) to come")  # policy.py's

# state -> what is said of its siblings; the order is that of the sentence
_STATES = {
    "finished": "ran to the end",
    "pruned": "{was} stopped as redundant",
    "decided": "{was} stopped because the vote was decided",
    "not_started": "never started",
    "aborted": "{was} aborted",
    "failed": "failed",
    "running": "still {runs}",
    "queued": "{is_} queued",
    "held": "{is_} held back",
    "expected": "{has} not come yet",
}
_GIVEN_UP = "{was} stopped when the group gave up"  # in place of "decided"


def explain(group: dict[str, Any], texts: dict[int, str] | None = None) -> dict[str, Any]:
    """One group's record in words.

    Parameters
    ----------
    group : dict
        A group record of schema/record.schema.json.
    texts : dict[int, str] | None
        Choice -> its text, where the reply is at hand.

    Returns
    -------
    dict
        group_id; answer; settled; `sentences`, what happened; `odd`, what to look at: both lists of
        sentences, the latter empty for most groups.
    """
    if not group["active"]:
        odd = [f"These {group['size']} siblings were no group: {group['reason']}."]
        if group["reason"] == ABANDONED:
            odd.append("The server's log has the error; what came back is whole.")
        return _result(group, [], odd)
    sentences = [_vote(group), *_siblings(group), _reason(group), *_clusters(group), _tokens(group)]
    return _result(group, [one for one in sentences if one], _odd(group, texts or {}))


def _result(group: dict[str, Any], sentences: list[str], odd: list[str]) -> dict[str, Any]:
    return {
        "group_id": group["group_id"],
        "answer": group["answer"],
        "settled": group["settled"],
        "sentences": sentences,
        "odd": odd,
    }


def _vote(group: dict[str, Any]) -> str:
    votes = group["votes"]
    cast = sum(one["votes"] for one in votes)
    if not votes:
        return f"Nobody of {group['size']} siblings voted for an answer."
    lead, *others = votes
    who = f", as sibling {group['winner']} wrote it," if group["winner"] is not None else ""
    verb = "wins" if group["settled"] else "leads"
    one = f"{_short(lead['answer'])}{who} {verb} with {lead['votes']} of {_count(cast, 'vote')}"
    if others:
        named = ", ".join(
            f"{_short(other['answer'])} has {other['votes']}" for other in others[:_MOST_ANSWERS]
        )
        left = len(others) - _MOST_ANSWERS
        one += f"; {named}" + (f", and {_count(left, 'other answer')} the rest" if left > 0 else "")
    return f"{one}."


def _siblings(group: dict[str, Any]) -> list[str]:
    """How many ended how. The record of a group that still runs does not hold its choices."""
    states = Counter(choice["state"] for choice in group["choices"])
    if not states:
        return []
    known = [*_STATES, *sorted(set(states) - set(_STATES))]
    words = dict(_STATES)
    if group["reason"].startswith("gave up"):
        words["decided"] = _GIVEN_UP
    parts = [
        f"{states[state]} {_ended(words.get(state, state), states[state])}"
        for state in known
        if states[state]
    ]
    preset = f", preset {group['preset']}" if group["preset"] else ""
    return [f"Of {_count(group['size'], 'sibling')}{preset}, {_listed(parts)}."]


def _ended(said: str, number: int) -> str:
    words = {"was": "was", "runs": "runs", "is_": "is", "has": "has"}
    if number != 1:
        words = {"was": "were", "runs": "run", "is_": "are", "has": "have"}
    return said.format(**words)


def _reason(group: dict[str, Any]) -> str:
    """Why it settled. The record's own words are short; most need a few more."""
    reason = group["reason"]
    if not group["settled"]:
        return f"The group still runs ({reason}): its record is as of one member's end."
    counted = _DECIDED.fullmatch(reason)
    if counted:
        lead, next_one, cast, to_come = counted.groups()
        stopped = any(choice["state"] in _STOPPED for choice in group["choices"])
        return (
            f"The vote was decided early: the leader had {lead} of {cast}, the next answer "
            f"{next_one}, and with at most {to_come} to come another winner was too unlikely to "
            f"wait for" + ("." if stopped else "; by then nobody was left to stop.")
        )
    kind, _, rest = reason.partition(": ")
    if kind == "gave up":
        return f"It ended early, without hope of a majority: {rest}."
    if kind == "aborted":
        return f"It lost siblings to aborts or errors of their own: {rest}."
    if reason == POOL_FULL:
        return "Siblings that the judge found redundant were stopped when the KV pool was full."
    if kind == "pruned":
        return f"The judge's clusters settled who ran on: {rest}."
    if kind == "redundant":
        return f"The judge found siblings redundant: {rest}."
    if reason == OPEN_ENDED:
        return "Nobody was stopped any more: the first three finishers held no answer."
    if reason == RENEWED:
        return "Nobody was stopped any more once the weights had changed under it."
    if reason == "all siblings finished":
        return "Nothing ended it early: every sibling came to its end."
    return f"Why it settled: {reason}."


def _clusters(group: dict[str, Any]) -> list[str]:
    if not group["judge_calls"] and not group["windows"]:
        return []
    sizes = sorted((len(cluster) for cluster in group["clusters"]), reverse=True)
    made = "no cluster"
    if sizes:
        made = f"{_count(len(sizes), 'cluster')} of {_listed([str(size) for size in sizes])}"
        left_out = group["size"] - sum(sizes)
        if left_out:
            made += f"; {_count(left_out, 'sibling')} {'is' if left_out == 1 else 'are'} in none"
    return [
        f"The judge compared {_count(group['judge_calls'], 'pair')} of traces in "
        f"{_count(group['windows'], 'window')} ({group['judge_tokens']:,} tokens read, "
        f"{group['judge_ms']:,.0f} ms) and made {made}."
    ]


def _tokens(group: dict[str, Any]) -> str:
    made, saved = group["generated_tokens"], group["saved_tokens_at_most"]
    one = f"{made:,} tokens were generated"
    if saved:
        one += f"; at most {saved:,} more were saved, had each stopped sibling run to its limit"
    return f"{one}."


def _odd(group: dict[str, Any], texts: dict[int, str]) -> list[str]:
    votes, choices = group["votes"], group["choices"]
    odd = []
    if group["tie"]:
        tied = [one for one in votes if one["votes"] == votes[0]["votes"]]
        odd.append(
            f"A tie of {len(tied)} answers with {_count(votes[0]['votes'], 'vote')} each: the one "
            f"with the lowest sibling index won."
        )
    silent = group["abstentions"]
    if silent and not votes:
        odd.append(
            f"All {silent} that finished abstained: no final answer was found in their texts "
            f"(a cut box, or a prompt without one right answer)."
        )
    elif silent:
        odd.append(f"{silent} finished without an answer that could be read, and abstained.")
    # Where answers and texts are known to be equal, clusters form without asking the judge.
    if group["windows"] and not group["judge_calls"] and not group["clusters"]:
        odd.append(
            f"The judge was handed {_count(group['windows'], 'window')} and had no verdict: the "
            f"group ended first, or it is loading, too slow, broken or not sure; see the server's "
            f"log, or doctor --url."
        )
    if group["reason"] == RENEWED:
        odd.append("The weights changed while it ran: votes of two models are counted together.")
    failed = sum(choice["state"] == "failed" for choice in choices)
    if failed:
        odd.append(
            f"{failed} failed: the server refused or lost {'it' if failed == 1 else 'them'}."
        )
    aborted = sum(choice["state"] == "aborted" for choice in choices)
    if aborted:
        odd.append(f"{aborted} of the siblings {'was' if aborted == 1 else 'were'} aborted.")
    finished = [one["index"] for one in choices if one["state"] == "finished"]
    said = [texts[index] for index in finished if index in texts]
    if len(said) > 1 and len(set(said)) == 1:
        odd.append(
            f"All {len(said)} finished texts are the same: siblings that sample alike (temperature "
            f"0?) are one sample, and their votes one vote."
        )
    return odd


def _short(answer: str) -> str:
    line = " ".join(answer.split())
    return f"'{line}'" if len(line) <= _MOST_LETTERS else f"'{line[: _MOST_LETTERS - 1]}…'"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _listed(parts: Sequence[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def as_text(explained: Sequence[dict[str, Any]]) -> str:
    blocks = []
    for number, one in enumerate(explained, start=1):
        title = [f"Group {number} of {len(explained)}:"] if len(explained) > 1 else []
        odd = [f"Mind: {line}" for line in one["odd"]]
        blocks.append("\n".join([*title, *one["sentences"], *odd]))
    return "\n\n".join(blocks)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sglang-deepprune explain",
        description="What became of a group, in a few sentences, from the reply of its request.",
        epilog="exit codes: 0 explained, 1 no record in the input, 2 wrong usage.",
    )
    parser.add_argument(
        "file", metavar="FILE",
        help="a reply of /generate or /v1/..., a dumped stream, or the record; -: standard input",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    return parser


def main(argv: list[str]) -> int:
    args = build_parser().parse_args(argv)
    try:
        text = sys.stdin.read() if args.file == "-" else Path(args.file).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        print(f"error: {args.file} cannot be read: {error}", file=sys.stderr)
        return WRONG_USAGE
    try:
        reply = read(text)
    except ReplyError as error:
        print(f"error: {error}", file=sys.stderr)
        return FAULT
    explained = [explain(group, reply.texts) for group in reply.groups]
    if args.json:
        print(json.dumps({"groups": explained}, indent=2, ensure_ascii=False))
    else:
        print(as_text(explained))
    return NO_FAULT
