"""What a client may say about its answer: every check names what is wrong, in words.

Scripted tokens make it exact: sibling i of a prompt says text i, whole if it finished, the front of
it if it was stopped or aborted. `may_abort`: the client or the operator may have aborted it; of
everybody else nobody may say so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jsonschema

from sglang_deepprune.policy import RENEWED
from tests.engine.fault_plan import BYSTANDERS, PROMPTS, Ask
from tests.engine.test_groups import SCHEMA
from tests.engine.test_metrics import HEADS as NAMES

if TYPE_CHECKING:
    from tests.engine.fault_clients import Seen

STOPPED = ("pruned", "decided", "not_started")
LOST = ("aborted", "failed")
ENDS = {"stop": ("finished",), "length": ("finished", *STOPPED), "abort": LOST}
# Nobody has a verdict on these, so nobody is redundant.
UNJUDGED = tuple(f"faults: {mark}" for mark in ("RAISE", "SHAPE", "NAN", "HANG", "DIE"))
# A sibling that is about to be stopped when the weights change ends a step or two later.
LATE_TOKENS = 2
HEADS = {**NAMES, "the weights changed": "weights_changed"}  # of reasons, as /metrics calls them


def of_group(ask: Ask, outputs: Sequence[dict[str, Any]], *, may_abort: bool = False) -> list[str]:
    """A native reply to an n>1 request, whole or put together from a stream."""
    wrong: list[str] = []
    texts = PROMPTS[ask.prompt]
    returns = ask.settings.get("return", "all")
    if returns == "all" and len(outputs) != ask.n:
        return [f"{len(outputs)} choices of {ask.n}"]
    for output in outputs:
        wrong += of_choice(output, texts, may_abort=may_abort)
    group = outputs[0]["meta_info"]["deepprune"].get("group")
    if group is None:
        return [*wrong, "no record of the group"]
    wrong += of_record(ask, group, may_abort=may_abort)
    wrong += of_versions(outputs, group["reason"])
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


def of_choice(
    output: dict[str, Any], texts: Sequence[str], *, may_abort: bool = False
) -> list[str]:
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
    if reason == "abort" and not may_abort:
        wrong.append(f"{state}, and nobody has aborted it")
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


def of_record(ask: Ask, group: dict[str, Any], *, may_abort: bool = False) -> list[str]:
    """The group's counts add up, and agree with its choices."""
    choices = group["choices"]
    if not group["active"]:
        is_lost = may_abort and group["reason"].startswith("aborted")
        return [] if is_lost else [f"inactive: {group['reason']}"]
    if not group["settled"] or len(choices) != ask.n or group["size"] != ask.n:
        return [f"settled {group['settled']}, {len(choices)} choices, size {group['size']}"]
    wrong = of_counts(ask, group)
    states = Counter(choice["state"] for choice in choices)
    if any(states[state] for state in LOST) and not may_abort:
        wrong.append(f"{dict(states)}, and nobody has aborted them")
    if ask.prompt in UNJUDGED:
        wrong += of_unjudged(group)
    return wrong


def of_unjudged(group: dict[str, Any]) -> list[str]:
    """Without a judge's verdict only answers are known to be equal: of siblings that have finished.
    Their cluster may outgrow what is left, which then stops; a sibling that still ran is in none
    but the one that it opened."""
    answers = {
        one["index"]: one["answer"] for one in group["choices"] if one["state"] == "finished"
    }
    shared = [cluster for cluster in group["clusters"] if len(cluster) > 1]
    if all(len({answers.get(index) for index in some} - {None}) == 1 and set(some) <= set(answers)
           for some in shared) and (shared or "pruned" not in _states(group)):  # fmt: skip
        return []
    placed = [(one["index"], one["state"], one["cluster"], one["similarity"], one["pruned_at"])
              for one in group["choices"]]  # fmt: skip
    return [f"pruned by a judge that had no verdict: {placed}, {group['clusters']}"]


def _states(group: dict[str, Any]) -> set[str]:
    return {choice["state"] for choice in group["choices"]}


def of_counts(ask: Ask, group: dict[str, Any]) -> list[str]:
    """Of a settled record, of an n>1 request or of a client-side group."""
    wrong: list[str] = []
    choices = group["choices"]
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
    placed = [index for cluster in group["clusters"] for index in cluster]
    if len(placed) != len(set(placed)):
        wrong.append(f"clusters {group['clusters']}")
    return wrong


def of_versions(outputs: Sequence[dict[str, Any]], reason: str) -> list[str]:
    """No group crosses a change of the weights: whoever has tokens of a later version than the
    group began with has run to its end, and the record says why."""
    spans = [output["meta_info"].get("weight_versions") or [] for output in outputs]
    first = min((age_of(span["version"]) for some in spans for span in some if span["end"]),
                default=0.0)  # fmt: skip
    wrong: list[str] = []
    for output, some in zip(outputs, spans, strict=True):
        state = output["meta_info"]["deepprune"]["choice"]["state"]
        late = sum(s["end"] - s["start"] for s in some if age_of(s["version"]) > first)
        if late <= LATE_TOKENS or state in LOST:
            continue
        if state in STOPPED:
            wrong.append(f"{state} after {late} tokens of other weights: {some}")
        elif reason != RENEWED:
            wrong.append(f"{state} with {late} tokens of other weights, and its group {reason!r}")
    return wrong


def age_of(version: str) -> float:
    """The harness' versions are `v` and a clock; the server starts with SGLang's own name."""
    return float(version[1:]) if version[1:].replace(".", "").isdigit() else 0.0


def of_member(ask: Ask, output: dict[str, Any], *, may_abort: bool = False) -> list[str]:
    """A single request that named a group: its script goes by arrival, so any of them will do."""
    meta = output["meta_info"]
    is_aborted = (meta["finish_reason"] or {}).get("type") == "abort"
    wrong = ["a member, and nobody has aborted it"] if is_aborted and not may_abort else []
    if is_aborted and "deepprune" not in meta:
        return wrong  # refused before it was anybody's member
    if "deepprune" not in meta:
        return ["a member without a record"]
    if not any(text.startswith(output["text"]) for text in PROMPTS[ask.prompt]):
        wrong.append(f"another text: {output['text'][:60]!r}")
    state, reason = meta["deepprune"]["choice"]["state"], meta["finish_reason"]["type"]
    if state not in ENDS.get(reason, ()):
        wrong.append(f"{state}, finish reason {reason}")
    group = meta["deepprune"].get("group")
    if group is None:
        wrong.append("a member without its group's record")
    elif group["active"] and group["settled"]:
        wrong += of_counts(ask, group)
    return wrong


def of_names(groups: Sequence[tuple[Ask, set[str]]]) -> list[str]:
    """Client-side asks and the groups that their members were in: a name alone joins nobody's."""
    prompt_of: dict[str, str] = {}
    wrong: list[str] = []
    for ask, group_ids in groups:
        for group_id in group_ids:
            if prompt_of.setdefault(group_id, ask.prompt) != ask.prompt:
                wrong.append(f"one group of two prompts: {ask.prompt}, {prompt_of[group_id]}")
    return wrong


def of_counters(
    groups: Mapping[str, float], siblings: Mapping[str, float], seen: Sequence[Seen]
) -> list[str]:
    """What /metrics counted in a round (by reason, by state) against all that clients were told.

    Equal, but for what nobody can know: how clients' groups ended that left, and whether an n>1
    request that was aborted before it had a record had been a group by then.
    """
    reasons: Counter[str] = Counter()
    states: Counter[str] = Counter()
    num_lost = num_left = groups_lost = groups_left = 0
    for one in seen:
        heads = [record["reason"].partition(":")[0] for record in one.records]
        reasons.update(HEADS.get(head, "other") for head in heads)
        states.update(choice["state"] for record in one.records for choice in record["choices"])
        groups_lost += one.num_lost
        num_lost += one.num_lost * one.ask.n
        if one.ask.kind == "members":
            states += one.states
        elif one.ask.fate == "leaves":
            groups_left += 1
            num_left += one.ask.n
    num_named, num_vain = of_places(seen)
    said = (
        f"/metrics: groups {dict(groups)}, siblings {dict(siblings)}; told: {dict(reasons)} and "
        f"{num_named} of members, {dict(states)} and {num_vain} that never came; {num_left} left, "
        f"{num_lost} lost"
    )
    fewer = [name for name, number in reasons.items() if groups.get(name, 0) < number]
    fewer += [name for name, number in states.items() if siblings.get(name, 0) < number]
    more_groups = sum(groups.values()) - reasons.total()
    more = {state: int(number) - states[state] for state, number in siblings.items()}
    stopped = {state: more.get(state, 0) for state in ("aborted", "not_started")}
    others = sum(more.values()) - sum(stopped.values())
    is_right = (
        not fewer
        and num_named <= more_groups <= num_named + groups_lost + groups_left
        and num_vain <= sum(stopped.values())
        and sum(more.values()) <= num_vain + num_lost + num_left
        and others <= num_left
    )
    return [] if is_right else [said]


def of_places(seen: Sequence[Seen]) -> tuple[int, int]:
    """Client-side groups that there were, and siblings that these waited for in vain.

    A name may have had several groups, one after the other. Each gives out its places from 0 on: as
    many groups as places 0, and as many of them had a sibling j as there were places j.
    """
    places: Counter[tuple[str, int]] = Counter()
    sizes: dict[str, int] = {}
    for one in seen:
        places += one.places
        sizes |= {name: one.ask.settings["size"] for name, _ in one.places}
    num_vain = sum(
        places[name, 0] - places[name, place] for name in sizes for place in range(sizes[name])
    )
    return sum(places[name, 0] for name in sizes), num_vain


def of_bystander(ask: Ask, output: dict[str, Any], *, may_abort: bool = False) -> list[str]:
    (script,) = BYSTANDERS[ask.prompt]
    if "deepprune" in output["meta_info"]:
        return ["a bystander has a record"]
    text, is_aborted, wrong = _plain_end(output, may_abort)
    return (
        wrong
        if text == script or is_aborted and script.startswith(text)
        else [*wrong, f"text {text!r}"]
    )


def of_stranger(
    output: dict[str, Any], ids: Sequence[int], sure: int, *, may_abort: bool = False
) -> list[str]:
    """Equal to a run alone, up to the first near-tie: another batch rounds otherwise."""
    _, is_aborted, wrong = _plain_end(output, may_abort)
    got = output["output_ids"]
    if not is_aborted and len(got) != len(ids):
        return [f"{len(got)} tokens of {len(ids)}"]
    sure = min(sure, len(got))
    if list(got[:sure]) != list(ids[:sure]):
        wrong.append(f"{got[:sure]} instead of {ids[:sure]}")
    return wrong


def _plain_end(output: dict[str, Any], may_abort: bool) -> tuple[str, bool, list[str]]:
    """Text of a request of nobody's group, whether it was aborted, and whether that is wrong."""
    is_aborted = output["meta_info"]["finish_reason"]["type"] == "abort"
    wrong = ["aborted, and nobody has asked for it"] if is_aborted and not may_abort else []
    return output["text"], is_aborted, wrong
