"""Records out of what a client got: any reply of SGLang's that carries one, whole or streamed.

Knows the places that schema/record.schema.json names, and nothing of how a reply came about.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

KEY = "deepprune"
_EVENT_FIELDS = ("data:", ":", "event:", "id:", "retry:")
_HEADERS = re.compile(r"\s*HTTP/[\d.]+ \d{3}.*?\r?\n\r?\n", re.DOTALL)  # of `curl -i`
SCHEMA = Path(__file__).parent / "schema" / "record.schema.json"


class ReplyError(ValueError):
    """No record to be had from this; one sentence."""


# What is read of a record, and its kinds; the schema has all of it.
_KINDS: dict[str, type] = {
    "active": bool, "settled": bool, "size": int, "group_id": str, "reason": str, "votes": list,
    "choices": list, "clusters": list, "generated_tokens": int, "judge_calls": int, "windows": int,
}  # fmt: skip
_INNER: dict[str, dict[str, type]] = {
    "votes": {"answer": str, "votes": int},
    "choices": {"index": int, "state": str, "tokens": int},
}


@dataclass(slots=True)
class Reply:
    """The groups of one reply.

    Attributes
    ----------
    groups : list[dict]
        Group records, one a group, in the order in which they came.
    texts : dict[int, str]
        Choice -> its text, where the reply has texts and they are of one group.
    """

    groups: list[dict[str, Any]]
    texts: dict[int, str] = field(default_factory=dict)


def read(text: str) -> Reply:
    """The records in `text`: JSON, JSON lines or server-sent events. Raises `ReplyError`."""
    documents = list(_documents(text))
    groups: dict[str, dict[str, Any]] = {}
    texts: dict[int, str] = {}
    num_choices = 0
    is_stream = text.lstrip().startswith(_EVENT_FIELDS)
    for number, document in enumerate(documents):
        for record in _groups(document):
            _check(record)
            name = record["group_id"] or f"#{number}"
            # Members of a client-side group each carry it, as of their own end.
            if name not in groups or is_later(record, groups[name]):
                groups[name] = record
        for index, said, is_delta in _texts(document, is_stream):
            texts[index] = texts.get(index, "") + said if is_delta else said
        num_choices += _num_choice_records(document)
    if not groups:
        raise ReplyError(_why_none(documents, num_choices))
    return Reply(list(groups.values()), texts if len(groups) == 1 else {})


def _documents(text: str) -> Iterator[Any]:
    """Each JSON value; a list of outputs is given out one by one."""
    text = _HEADERS.sub("", text.removeprefix("\ufeff"), count=1)
    if not text.strip():
        raise ReplyError("the input is empty")
    try:
        whole = json.loads(text)
    except RecursionError:
        raise ReplyError("this is nested too deeply to be a reply of SGLang's") from None
    except json.JSONDecodeError:
        whole = [_line(line, number) for number, line in _lines(text)]
    for one in whole if isinstance(whole, list) else [whole]:
        yield from map(_body, one if isinstance(one, list) else [one])


def _body(document: Any) -> Any:
    """What a line of a batch's output holds, else the document itself."""
    response = document.get("response") if isinstance(document, dict) else None
    body = response.get("body") if isinstance(response, dict) else None
    return body if isinstance(body, dict) else document


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """What lines of a dump can hold JSON: `data: {...}`, or JSON lines."""
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.strip()
        if line.startswith(_EVENT_FIELDS) and not line.startswith("data:"):
            continue
        line = line.removeprefix("data:").strip()
        if line and line != "[DONE]":
            yield number, line


def _line(line: str, number: int) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ReplyError(
            f"line {number} is no JSON ({error.msg}); give a reply of SGLang's: JSON, JSON lines "
            f"or the `data:` lines of a stream"
        ) from error


def _groups(document: Any) -> Iterator[dict[str, Any]]:
    """The group records of one output, response, chunk, or bare record."""
    if not isinstance(document, dict):
        return
    if "votes" in document and "group_id" in document:  # bare
        yield document
        return
    ours = [document]  # {choice, group}, or {groups}, as a record alone
    for place in ("meta_info", "metadata"):
        holder = document.get(place)
        if isinstance(holder, dict) and isinstance(holder.get(KEY), dict):
            ours.append(holder[KEY])
    if isinstance(document.get(KEY), dict):  # meta_info or metadata alone
        ours.append(document[KEY])
    for one in ours:
        if "votes" in one and "group_id" in one:
            yield one
        if isinstance(one.get("group"), dict):
            yield one["group"]
        many_of_them = one.get("groups")
        for many in many_of_them if isinstance(many_of_them, list) else ():
            if isinstance(many, dict):
                yield many


def _texts(document: Any, is_stream: bool) -> Iterator[tuple[int, str, bool]]:
    """(choice, text, whether it is what came on top of the last chunk's)."""
    if not isinstance(document, dict):
        return
    index = document.get("index", _choice(document))
    if isinstance(document.get("text"), str) and isinstance(index, int):
        yield index, document["text"], False
    kind = str(document.get("object", ""))
    is_chunk = kind.endswith("chunk") or (kind == "text_completion" and is_stream)
    choices = document.get("choices")
    for one in choices if isinstance(choices, list) else ():
        if not isinstance(one, dict) or not isinstance(one.get("index"), int):
            continue
        said = one.get("delta") or one.get("message") or {"content": one.get("text")}
        if not isinstance(said, dict):
            continue
        parts = [said.get("reasoning_content"), said.get("content")]
        texts = [part for part in parts if isinstance(part, str)]
        if texts:
            yield one["index"], "".join(texts), is_chunk


def _choice(document: dict[str, Any]) -> int | None:
    found: Any = document
    for name in ("meta_info", KEY, "choice", "index"):
        found = found.get(name) if isinstance(found, dict) else None
    return found if isinstance(found, int) else None


def _num_choice_records(document: Any) -> int:
    return int(isinstance(document, dict) and _choice(document) is not None)


def is_later(record: dict[str, Any], known: dict[str, Any]) -> bool:
    """Of one group's records the settled one, else that with the most tokens."""
    later = (record["settled"], record["generated_tokens"])
    return later >= (known["settled"], known["generated_tokens"])


@cache
def _required() -> tuple[str, ...]:
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    return tuple(schema["$defs"]["group"]["required"])


def _check(record: dict[str, Any]) -> None:
    wrong = [
        name for name, kind in _KINDS.items() if not isinstance(record.get(name, kind()), kind)
    ]
    wrong += [
        f"{name}[].{inner}"
        for name, fields in _INNER.items()
        if name not in wrong
        for inner, kind in fields.items()
        for one in record.get(name, ())
        if not isinstance(one, dict) or not isinstance(one.get(inner), kind)
    ]
    if wrong:
        raise ReplyError(
            f"this is no group record: {', '.join(dict.fromkeys(wrong))} of another kind "
            f"(schema/record.schema.json)"
        )
    missing = [name for name in _required() if name not in record]
    if missing:
        raise ReplyError(
            f"this is no group record of this version: {', '.join(missing)} missing "
            f"(schema/record.schema.json)"
        )


def _is_error(document: dict[str, Any]) -> bool:
    return document.get("object") == "error" or isinstance(document.get("error"), dict)


def _why_none(documents: list[Any], num_choices: int) -> str:
    if num_choices:
        return (
            f"{num_choices} choices here have a record of their own but none has the group's; give "
            f"the whole reply, or a stream to its end"
        )
    if any(isinstance(one, dict) and _is_error(one) for one in documents):
        return "this is an error that the server answered with, not a reply; its message says why"
    is_reply = any(
        isinstance(one, dict) and ("meta_info" in one or "choices" in one) for one in documents
    )
    if is_reply:
        return (
            "this reply has no record: the plugin is off, n is 1, the request opted out, or "
            "something between dropped `metadata`; see sglang-deepprune doctor --url"
        )
    return "there is no reply of SGLang's in this, and no record"
