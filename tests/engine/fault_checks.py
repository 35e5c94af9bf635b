"""What a client may say about its answer: every check names what is wrong, in words.

Scripted tokens make it exact: sibling i of a prompt says text i, whole if it finished, the front of
it if it was stopped or aborted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import jsonschema

from tests.engine.fault_plan import BYSTANDERS, PROMPTS, Ask
from tests.engine.test_groups import SCHEMA

STOPPED = ("pruned", "decided", "not_started")
ENDS = {"stop": ("finished",), "length": ("finished", *STOPPED), "abort": ("aborted", "failed")}


def of_group(ask: Ask, outputs: Sequence[dict[str, Any]]) -> list[str]:
    """A native reply to an n>1 request, whole or put together from a stream."""
    wrong: list[str] = []
    texts = PROMPTS[ask.prompt]
    returns = ask.settings.get("return", "all")
    if returns == "all" and len(outputs) != ask.n:
        return [f"{len(outputs)} choices of {ask.n}"]
    for output in outputs:
        wrong += of_choice(output, texts)
    group = outputs[0]["meta_info"]["deepprune"].get("group")
    if group is None:
        return [*wrong, "no record of the group"]
    wrong += of_record(ask, group)
    if returns == "all":
        tokens = sum(output["meta_info"]["completion_tokens"] for output in outputs)
        is_aborted = any(one["meta_info"]["finish_reason"]["type"] == "abort" for one in outputs)
        lost = group["generated_tokens"] - tokens
        if group["active"] and lost and not (lost > 0 and is_aborted):
            wrong.append(f"{group['generated_tokens']} tokens told, {tokens} seen")
        indices = [output["meta_info"]["deepprune"]["choice"]["index"] for output in outputs]
        if indices != list(range(ask.n)):
            wrong.append(f"choices {indices}")
    return wrong


def of_choice(output: dict[str, Any], texts: Sequence[str]) -> list[str]:
    """State, finish reason, tokens and text of one choice tell the same."""
    wrong: list[str] = []
    meta = output["meta_info"]
    try:
        jsonschema.validate(meta["deepprune"], SCHEMA)
    except (KeyError, jsonschema.ValidationError) as error:
        return [f"record: {str(error).splitlines()[0]}"]
    choice = meta["deepprune"]["choice"]
    state, reason = choice["state"], (meta["finish_reason"] or {}).get("type", "")
    if state not in ENDS.get(reason, ()):
        wrong.append(f"{state}, and its finish reason is {reason}")
    # SGLang sends tokens in bundles, and drops the last ones of whoever is aborted in its queue.
    lost = choice["tokens"] - meta["completion_tokens"]
    if lost and not (lost > 0 and reason == "abort"):
        wrong.append(f"{state}: {choice['tokens']} tokens told, {meta['completion_tokens']} seen")
    script = texts[choice["index"] % len(texts)]
    if not script.startswith(output["text"]):
        wrong.append(f"{state}: another text: {output['text'][:60]!r}")
    if reason == "stop" and output["text"] != script:
        wrong.append(f"{state}: only {len(output['text'])} of {len(script)} letters")
    return wrong


def of_record(ask: Ask, group: dict[str, Any]) -> list[str]:
    """The group's counts add up, and agree with its choices."""
    choices = group["choices"]
    if not group["active"]:
        return [] if group["reason"].startswith("aborted") else [f"inactive: {group['reason']}"]
    wrong: list[str] = []
    if not group["settled"] or len(choices) != ask.n or group["size"] != ask.n:
        return [f"settled {group['settled']}, {len(choices)} choices, size {group['size']}"]
    states = Counter(choice["state"] for choice in choices)
    finished = [choice for choice in choices if choice["state"] == "finished"]
    votes = sum(vote["votes"] for vote in group["votes"])
    if votes + group["abstentions"] != len(finished):
        wrong.append(f"{votes} votes, {group['abstentions']} abstentions, {dict(states)}")
    if group["generated_tokens"] != sum(choice["tokens"] for choice in choices):
        wrong.append("tokens do not add up")
    saved = sum(ask.max_new_tokens - c["tokens"] for c in choices if c["state"] in STOPPED)
    if group["saved_tokens_at_most"] != saved:
        wrong.append(f"{group['saved_tokens_at_most']} tokens saved, {saved} by its choices")
    if "fence" not in ask.prompt:
        expected = Counter(choice["answer"] for choice in finished if choice["answer"])
        if Counter({v["answer"]: v["votes"] for v in group["votes"]}) != expected:
            wrong.append(f"votes {group['votes']} of {dict(expected)}")
    if states["pruned"] and ask.prompt.removeprefix("faults: ") in ("RAISE", "SHAPE", "HANG"):
        wrong.append("pruned by a judge that had no verdict")
    placed = [index for cluster in group["clusters"] for index in cluster]
    if len(placed) != len(set(placed)):
        wrong.append(f"clusters {group['clusters']}")
    return wrong


def of_member(ask: Ask, output: dict[str, Any]) -> list[str]:
    """A single request that named a group: its script goes by arrival, so any of them will do."""
    meta = output["meta_info"]
    if (meta["finish_reason"] or {}).get("type") == "abort" and "deepprune" not in meta:
        return []  # refused before it was anybody's member
    if "deepprune" not in meta:
        return ["a member without a record"]
    script = next((t for t in PROMPTS[ask.prompt] if t.startswith(output["text"])), None)
    if script is None:
        return [f"another text: {output['text'][:60]!r}"]
    state, reason = meta["deepprune"]["choice"]["state"], meta["finish_reason"]["type"]
    return [] if state in ENDS.get(reason, ()) else [f"{state}, finish reason {reason}"]


def of_bystander(ask: Ask, output: dict[str, Any]) -> list[str]:
    (script,) = BYSTANDERS[ask.prompt]
    is_aborted = output["meta_info"]["finish_reason"]["type"] == "abort"
    text = output["text"]
    if "deepprune" in output["meta_info"]:
        return ["a bystander has a record"]
    return [] if text == script or is_aborted and script.startswith(text) else [f"text {text!r}"]


def of_stranger(output: dict[str, Any], reference: tuple[list[int], int]) -> list[str]:
    """Equal to a run alone, up to the first near-tie: another batch rounds otherwise."""
    ids, sure = reference
    is_aborted = output["meta_info"]["finish_reason"]["type"] == "abort"
    got = output["output_ids"]
    if not is_aborted and len(got) != len(ids):
        return [f"{len(got)} tokens of {len(ids)}"]
    sure = min(sure, len(got))
    return [] if got[:sure] == ids[:sure] else [f"{got[:sure]} instead of {ids[:sure]}"]
