"""The clients of one round: each sends what the plan says, and keeps what it was answered."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import requests

from tests.engine import fault_checks as checks
from tests.engine.fault_plan import Ask
from tests.engine.server import Server

LIMIT_S = 90.0  # a client that waits longer hangs


@dataclass(frozen=True)
class Reference:
    """What a stranger gets with nobody beside it."""

    prompt: str  # what is sent for it
    output_ids: list[int]
    num_sure: int  # of them no rounding can change so many


@dataclass
class Seen:
    """What became of one client."""

    ask: Ask
    may_abort: bool = False  # it, or the operator for it
    is_answered: bool = False
    wrong: list[str] = field(default_factory=list)
    states: Counter[str] = field(default_factory=Counter)  # of the choices that it was told of
    num_unknown: int = 0  # siblings whose end it did not see
    records: list[dict[str, Any]] = field(default_factory=list)  # of groups that have ended
    # Of its members: (group, index in it).
    places: Counter[tuple[str, int]] = field(default_factory=Counter)
    num_lost: int = 0  # groups aborted before there was a record


def run(
    server: Server, ask: Ask, references: dict[str, Reference], *, is_abort_due: bool = False
) -> Seen:
    """One client, from its first byte to its last. `is_abort_due`: the operator will abort all."""
    seen = Seen(ask, may_abort=is_abort_due or ask.fate == "aborts")
    try:
        _FATES[ask.kind if ask.kind != "group" else ask.fate](server, ask, seen, references)
        seen.is_answered = True
    except requests.RequestException as error:
        seen.wrong.append(f"{type(error).__name__}: {str(error)[:120]}")
    except Exception as error:  # a bug of the harness must not pass for an answer
        seen.is_answered = True
        seen.wrong.append(f"{type(error).__name__}: {str(error)[:200]}")
    return seen


def body_of(ask: Ask, rid: str | None = None) -> dict[str, Any]:
    params: dict[str, Any] = {"max_new_tokens": ask.max_new_tokens, "temperature": 1.0}
    if ask.kind == "group":
        params["n"] = ask.n
    if ask.settings:
        params["custom_params"] = {"deepprune": ask.settings}
    if ask.kind == "stranger":
        params |= {"temperature": 0.0, "ignore_eos": True}
    return {"text": ask.prompt, "rid": rid or ask.rid, "sampling_params": params}


def post(server: Server, path: str, body: dict[str, Any]) -> requests.Response:
    return server.post(path, body, timeout_s=LIMIT_S)


def abort(server: Server, rid: str) -> None:
    post(server, "/abort_request", {"rid": rid})


def _whole(seen: Seen, reply: requests.Response, size: int) -> None:
    """The reply to an n>1 request."""
    if reply.status_code != 200:
        seen.wrong.append(f"status {reply.status_code}: {reply.text[:120]}")
        return
    outputs = reply.json()
    seen.wrong += checks.of_group(seen.ask, outputs, may_abort=seen.may_abort)
    group = outputs[0]["meta_info"].get("deepprune", {}).get("group", {})
    _note(seen, group)
    choices = group.get("choices")
    _count(seen, choices or [one["meta_info"]["deepprune"]["choice"] for one in outputs], size)


def _note(seen: Seen, group: dict[str, Any]) -> None:
    """The record of an n>1 request: of a group that the server has counted, or of none."""
    if group.get("active") and group["settled"]:
        seen.records.append(group)
    else:
        seen.num_lost += 1


def _count(seen: Seen, choices: list[dict[str, Any]], size: int) -> None:
    seen.states.update(choice["state"] for choice in choices)
    seen.num_unknown += max(0, size - len(choices))


def _waits(server: Server, ask: Ask, seen: Seen, _: Any) -> None:
    _whole(seen, post(server, "/generate", body_of(ask)), ask.n)


def _aborts(server: Server, ask: Ask, seen: Seen, _: Any) -> None:
    timer = threading.Timer(ask.pause_s, abort, (server, ask.rid))
    timer.start()
    try:
        _whole(seen, post(server, "/generate", body_of(ask)), ask.n)
    finally:
        timer.join()


def _reuses(server: Server, ask: Ask, seen: Seen, _: Any) -> None:
    """Aborts, and sends the same rid again while the judge is still at the first one."""
    first = Seen(ask, may_abort=True)  # no abort of a rid may reach who bears it next
    thread = threading.Thread(target=_insists, args=(server, ask, first))
    thread.start()
    time.sleep(ask.pause_s)
    abort(server, ask.rid)
    _insists(server, ask, seen)
    thread.join(LIMIT_S)
    assert not thread.is_alive(), "the first of two hangs"
    seen.wrong += first.wrong
    seen.states += first.states
    seen.num_unknown += first.num_unknown
    seen.records += first.records
    seen.num_lost += first.num_lost


def _insists(server: Server, ask: Ask, seen: Seen) -> None:
    """SGLang refuses a rid whose last output has not left yet: until it takes it."""
    deadline = time.monotonic() + LIMIT_S
    reply = post(server, "/generate", body_of(ask))
    while reply.status_code == 400 and "Duplicate" in reply.text and time.monotonic() < deadline:
        time.sleep(0.02)
        reply = post(server, "/generate", body_of(ask))
    _whole(seen, reply, ask.n)


def events(server: Server, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any] | None]:
    """The JSON of each event of a stream; None for [DONE]."""
    with requests.post(
        f"{server.url}{path}", json={**body, "stream": True}, stream=True, timeout=LIMIT_S
    ) as reply:
        assert reply.status_code == 200, reply.text[:200]
        for line in reply.iter_lines():
            if line == b"data: [DONE]":
                yield None
            elif line.startswith(b"data: "):
                yield json.loads(line[6:])


def _streams(server: Server, ask: Ask, seen: Seen, _: Any) -> None:
    last: dict[int, dict[str, Any]] = {}
    ended: Counter[int] = Counter()
    group: dict[str, Any] | None = None
    is_done = False
    for event in events(server, "/generate", body_of(ask)):
        if event is None:
            is_done = True
            continue
        assert "error" not in event, str(event)[:200]
        if is_done:
            seen.wrong.append("a chunk after [DONE]")
        last[event["index"]] = event
        ended[event["index"]] += event["meta_info"]["finish_reason"] is not None
        group = event["meta_info"].get("deepprune", {}).pop("group", group)
    if not is_done or ended != Counter(range(ask.n)):
        seen.wrong.append(f"done {is_done}, terminal chunks {dict(ended)}")
    outputs = [last[index] for index in sorted(last)]
    if group is not None:
        outputs[0]["meta_info"].setdefault("deepprune", {})["group"] = group
    seen.wrong += checks.of_group(ask, outputs, may_abort=seen.may_abort)
    _note(seen, group or {})
    _count(seen, [one["meta_info"]["deepprune"]["choice"] for one in outputs], ask.n)


def _completes(server: Server, ask: Ask, seen: Seen, _: Any) -> None:
    """The OpenAI reply: choices in order, the record beside them, usage of all."""
    body = {
        "model": "m", "prompt": ask.prompt, "n": ask.n, "max_tokens": ask.max_new_tokens,
        "temperature": 1.0, "custom_params": {"deepprune": ask.settings},
    }  # fmt: skip
    reply = post(server, "/v1/completions", body)
    if reply.status_code != 200:
        seen.wrong.append(f"status {reply.status_code}: {reply.text[:120]}")
        return
    said = reply.json()
    if [choice["index"] for choice in said["choices"]] != list(range(ask.n)):
        seen.wrong.append("choices out of order")
    group = said["metadata"]["deepprune"]
    seen.wrong += checks.of_record(ask, group, may_abort=seen.may_abort)
    _note(seen, group)
    _count(seen, group["choices"], ask.n)
    lost = group["generated_tokens"] - said["usage"]["completion_tokens"]
    is_aborted = any(choice["state"] in ("aborted", "failed") for choice in group["choices"])
    if group["active"] and lost and not (lost > 0 and is_aborted):
        seen.wrong.append(f"usage {said['usage']}, {group['generated_tokens']} generated")


def _leaves(server: Server, ask: Ask, seen: Seen, _: Any) -> None:
    stream = events(server, "/generate", body_of(ask))
    deadline = time.monotonic() + ask.pause_s
    for _event in stream:
        if time.monotonic() > deadline:
            break
    stream.close()  # type: ignore[attr-defined]
    seen.num_unknown += ask.n


def _members(server: Server, ask: Ask, seen: Seen, _: Any) -> None:
    """Single requests that name one group; their rids share a prefix, which may be aborted."""
    replies: list[requests.Response] = []
    rids = [ask.rid + "-" + "x" * count for count in range(ask.n)]

    def send(rid: str) -> None:
        replies.append(post(server, "/generate", body_of(ask, rid)))

    threads = [threading.Thread(target=send, args=(rid,)) for rid in rids]
    for thread in threads:
        thread.start()
    if ask.fate == "aborts":
        time.sleep(ask.pause_s)
        abort(server, rids[0])  # the shortest: SGLang aborts whatever begins with it
    for thread in threads:
        thread.join(LIMIT_S + 5)
    if len(replies) < len(rids):
        raise requests.Timeout(f"{len(replies)} of {len(rids)} members were answered")
    for reply in replies:
        if reply.status_code != 200:
            seen.wrong.append(f"status {reply.status_code}: {reply.text[:120]}")
            continue
        output = reply.json()
        seen.wrong += checks.of_member(ask, output, may_abort=seen.may_abort)
        ours = output["meta_info"].get("deepprune")
        group = (ours or {}).get("group")
        if group:
            seen.places[group["group_id"], ours["choice"]["index"]] += 1
        _count(seen, [ours["choice"]] if ours else [], 1)


def _bystander(server: Server, ask: Ask, seen: Seen, _: Any) -> None:
    reply = post(server, "/generate", body_of(ask))
    assert reply.status_code == 200, reply.text[:200]
    seen.wrong += checks.of_bystander(ask, reply.json(), may_abort=seen.may_abort)


def _stranger(server: Server, ask: Ask, seen: Seen, references: dict[str, Reference]) -> None:
    known = references[ask.prompt]
    reply = post(server, "/generate", {**body_of(ask), "text": known.prompt})
    assert reply.status_code == 200, reply.text[:200]
    seen.wrong += checks.of_stranger(
        reply.json(), known.output_ids, known.num_sure, may_abort=seen.may_abort
    )


_FATES = {
    "waits": _waits, "streams": _streams, "completes": _completes, "leaves": _leaves,
    "aborts": _aborts, "reuses": _reuses, "members": _members, "bystander": _bystander,
    "stranger": _stranger,
}  # fmt: skip
