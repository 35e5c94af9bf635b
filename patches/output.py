"""The reply: choices in order, one group record, the same APIs.

Only shapes; the vote was taken in the scheduler's coordinator. Native replies carry the record in
`meta_info.deepprune` (`choice` on every choice, `group` on the first one, or on a stream's last
finishing chunk). OpenAI replies carry it in `metadata.deepprune`, a stream in one choices-free
chunk before `[DONE]`. JSON names: `sglang_deepprune/schema/record.schema.json`.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable, Iterator
from itertools import chain
from typing import Any

from sglang_deepprune.patches import wire
from sglang_deepprune.policy import ABANDONED
from sglang_deepprune.types import ChoiceRecord, GroupRecord

# What a chunk of an incremental stream holds of its own tokens alone
# (`tokenizer_manager._INCREMENTAL_STREAMING_META_INFO_KEYS`).
_DELTAS = frozenset({
    "output_token_logprobs", "output_top_logprobs", "output_token_ids_logprobs",
    "output_token_sampling_mask", "output_token_sampling_logprobs",
})  # fmt: skip
_TEXTS = ("text", "output_ids")  # what a streamed choice holds of its output
# Attributes of the request object that OpenAI handlers share: the groups' records, whether choices
# that were held back come in their own chunks, and whether usage is added up from the chunks.
RECORDS = "_deepprune_records"
REPLAYS = "_deepprune_replays"
ADDS_UP = "_deepprune_adds_up"


def unpack(meta: dict[str, Any], reason: dict[str, Any], obj: Any) -> None:
    """Move the JSON of one finish reason into `meta_info`, and onto the request object."""
    record = json.loads(reason.pop(wire.KEY))
    meta[wire.KEY] = record
    if "group" in record:
        setattr(obj, RECORDS, [record["group"]])


def inactive(reason: str, group_id: str = "", size: int = 0) -> dict[str, Any]:
    """The record of a request that was not, or no longer, a group."""
    return GroupRecord(group_id=group_id, active=False, reason=reason, size=size).to_json()


class Reply:
    """Shapes one n>1 request's replies; one instance a request."""

    def __init__(self, num_siblings: int, asks: list[wire.Ask], *, is_incremental: bool = False):
        self.num_siblings = num_siblings
        self.is_incremental = is_incremental  # chunks are deltas, not the text so far
        self.asks = asks
        self.records: dict[int, dict[str, Any]] = {}  # prompt -> group record
        self.ended: dict[int, int] = {}  # prompt -> finished choices
        self.buffers: dict[int, dict[str, Any]] = {}  # choice -> latest output, when filtering
        self.pieces: dict[tuple[int, str], list[Any]] = {}  # (choice, name) -> its deltas
        self.chunks: dict[int, list[Any]] = {}  # choice -> its chunks, where they are replayed

    def whole(self, responses: list[dict[str, Any]], obj: Any) -> list[dict[str, Any]]:
        """A non-streaming reply: choices of all prompts, in order."""
        shaped: list[dict[str, Any]] = []
        for prompt, ask in enumerate(self.asks):
            first = prompt * self.num_siblings
            block = responses[first : first + self.num_siblings]
            for response in block:
                self._note(prompt, response)
            shaped += self._finished_block(prompt, ask, block)
        self._publish(obj)
        return shaped

    def piece(self, response: dict[str, Any], obj: Any) -> Iterator[dict[str, Any]]:
        """One chunk of a streaming reply; yields what goes to the client now."""
        prompt = response["index"] // self.num_siblings
        ask = self.asks[prompt]
        self._note(prompt, response)
        is_end = response["meta_info"].get("finish_reason") is not None
        if is_end:
            self.ended[prompt] = self.ended.get(prompt, 0) + 1
        is_last = self.ended.get(prompt) == self.num_siblings and is_end
        if ask.returns == "all" or not ask.is_wanted:
            if is_last:
                self._describe(prompt, ask, [response])
                self._publish(obj)
            yield response
            return
        self._buffer(response, is_replayed=bool(getattr(obj, REPLAYS, False)))
        if is_last:
            first = prompt * self.num_siblings
            block = [self._joined(first + index) for index in range(self.num_siblings)]
            kept = self._finished_block(prompt, ask, block)
            if getattr(obj, ADDS_UP, False):
                # The dropped choices were generated too: usage counts them with the first kept one.
                # A native reply's own number stays what it is, as in a whole reply.
                spent = sum(_tokens(one) for one in block) - sum(_tokens(one) for one in kept)
                kept[0]["meta_info"]["completion_tokens"] = _tokens(kept[0]) + spent
            self._publish(obj)
            chunks = [self.chunks.pop(first + index, []) for index in range(self.num_siblings)]
            for place, one in enumerate(kept):
                own = chunks[one["index"] - first]
                # Numbered as in a whole reply; SGLang also counts the prompt with the first index.
                one["index"] = first + place
                yield from self._replayed(one, own)
                yield _with_own(one, own[-1]) if own and self.is_incremental else one

    def _note(self, prompt: int, response: dict[str, Any]) -> None:
        ours = response["meta_info"].get(wire.KEY)
        if ours and "group" in ours:
            self.records[prompt] = ours.pop("group")

    def _finished_block(
        self, prompt: int, ask: wire.Ask, block: list[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        record = self._describe(prompt, ask, block)
        if record is None:
            return block
        kept = _kept(ask.returns, record, block)
        if kept[0] is not block[0]:
            kept[0]["meta_info"][wire.KEY]["group"] = record
            block[0]["meta_info"][wire.KEY].pop("group", None)
        return kept

    def _describe(
        self, prompt: int, ask: wire.Ask, block: list[dict[str, Any]]
    ) -> dict[str, Any] | None:
        """Give every choice of the block its record, and the first one the group's."""
        record = self.records.get(prompt)
        if record is None:
            if not ask.is_explicit and not ask.is_wanted:
                return None
            why = "switched off by request"
            if ask.is_wanted:
                # Whoever is left of a group brings its record, unless the scheduler gave it up.
                is_lost = all(_is_aborted(response) for response in block)
                why = "aborted before it was settled" if is_lost else ABANDONED
            record = self.records[prompt] = inactive(why, size=self.num_siblings)
        choices = {choice["index"]: choice for choice in record["choices"]}
        first = prompt * self.num_siblings
        for place, response in enumerate(block):
            index = response.get("index", first + place) - first
            meta = response["meta_info"]
            state = "aborted" if _is_aborted(response) else "finished"
            default = ChoiceRecord(index, state, _tokens(response))
            ours = meta.setdefault(wire.KEY, {"choice": default.to_json()})
            ours["choice"] = choices.get(index, ours["choice"])
        block[0]["meta_info"][wire.KEY]["group"] = record
        return record

    def _publish(self, obj: Any) -> None:
        setattr(obj, RECORDS, [self.records[prompt] for prompt in sorted(self.records)])

    def _replayed(self, one: dict[str, Any], chunks: list[Any]) -> Iterator[dict[str, Any]]:
        """A choice's chunks before its last one. SGLang's tool-call parsers take one step a chunk:
        of a call that comes in one piece they would tell the name alone."""
        for chunk in chunks[:-1]:
            if self.is_incremental:
                yield {**chunk, "index": one["index"]}
                continue
            length, tokens = chunk
            meta = {**one["meta_info"], "finish_reason": None, "completion_tokens": tokens}
            meta.pop(wire.KEY, None)
            meta |= {name: meta[name][:tokens] for name in _DELTAS if meta.get(name)}
            if "output_token_logprobs_length" in meta:
                meta["output_token_logprobs_length"] = tokens
            yield {**one, "text": one["text"][:length], "meta_info": meta}

    def _buffer(self, response: dict[str, Any], is_replayed: bool) -> None:
        """Keep a choice's newest output, and each of its deltas (incremental streaming)."""
        self.buffers[response["index"]] = response
        if is_replayed:
            # The text so far comes with each chunk: where it ended is enough.
            chunk: Any = (len(response.get("text") or ""), _tokens(response))
            if self.is_incremental:
                chunk = {**response, "meta_info": dict(response["meta_info"])}
            self.chunks.setdefault(response["index"], []).append(chunk)
        for holder, name in _held(response) if self.is_incremental else ():
            if holder.get(name) is not None:
                self.pieces.setdefault((response["index"], name), []).append(holder[name])

    def _joined(self, index: int) -> dict[str, Any]:
        """A choice's whole output; joined once, as n chunks joined one by one cost n^2."""
        response = self.buffers.pop(index)
        for holder, name in _held(response):
            parts = self.pieces.pop((index, name), None)
            if parts is not None and holder.get(name) is not None:
                is_text = isinstance(parts[0], str)
                holder[name] = "".join(parts) if is_text else list(chain.from_iterable(parts))
        return response


def _with_own(one: dict[str, Any], chunk: dict[str, Any]) -> dict[str, Any]:
    """A choice's end with no more of its output than its last chunk brought."""
    ours, last = one["meta_info"], chunk["meta_info"]
    meta = {**ours, **{name: last[name] for name in _DELTAS if name in last}}
    return {**one, **{name: chunk[name] for name in _TEXTS if name in chunk}, "meta_info": meta}


def _held(response: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
    """(where, name) of all that a chunk holds of its own tokens alone."""
    meta = response["meta_info"]
    return [(response, name) for name in _TEXTS] + [(meta, name) for name in _DELTAS]


def _is_aborted(response: dict[str, Any]) -> bool:
    return (response["meta_info"].get("finish_reason") or {}).get("type") == "abort"


def _tokens(response: dict[str, Any]) -> int:
    return int(response["meta_info"].get("completion_tokens", 0))


def _kept(returns: str, record: dict[str, Any], block: list[dict[str, Any]]) -> list[Any]:
    """The choices that `return` asks for; never none.

    Where nothing finished, `survivors` are all, but `vote` is one choice all the same: whoever asks
    for it reads one (lm-eval miscounts its samples otherwise).
    """
    states = {choice["index"]: choice["state"] for choice in record["choices"]}
    finished = [out for index, out in enumerate(block) if states.get(index) == "finished"]
    if returns == "all" or not record["active"]:
        return block
    if returns == "survivors":
        return finished or block
    winner = record["winner"]
    return [block[winner]] if winner is not None else (finished or block)[:1]


def metadata_of(records: list[dict[str, Any]]) -> dict[str, Any]:
    """`metadata.deepprune`: the record, or the records of a list of prompts under `groups`."""
    return records[0] if len(records) == 1 else {"groups": records}


def build_response(
    original: Callable[..., Any], self: Any, request: Any, ret: Any, created: int
) -> Any:
    """AROUND `_build_completion_response` and `_build_chat_response`."""
    response = original(self, request, ret, created)
    outputs = ret if isinstance(ret, list) else [ret]
    records = [
        one["meta_info"][wire.KEY]["group"]
        for one in outputs
        if "group" in (one["meta_info"].get(wire.KEY) or {})
    ]
    if not records or not hasattr(response, "choices"):
        return response
    response.metadata = {**(response.metadata or {}), wire.KEY: metadata_of(records)}
    usage = getattr(response, "usage", None)
    is_filtered = len(outputs) < sum(record["size"] for record in records)
    if is_filtered and len(records) > 1 and getattr(request, "echo", False):
        _echo_again(self, request, response, outputs)
    if usage is not None and (request.n or 1) > 1 and is_filtered:
        # Fewer choices than siblings came back; all of them were generated.
        active = [record for record in records if record["active"]]
        if len(active) == len(records) and all(record["settled"] for record in records):
            firsts = [one for one in outputs if "group" in (one["meta_info"].get(wire.KEY) or {})]
            usage.prompt_tokens = sum(one["meta_info"].get("prompt_tokens", 0) for one in firsts)
            usage.completion_tokens = sum(record["generated_tokens"] for record in records)
            usage.total_tokens = usage.prompt_tokens + usage.completion_tokens
            details = getattr(usage, "prompt_tokens_details", None)
            if details is not None:
                details.cached_tokens = sum(
                    one["meta_info"].get("cached_tokens", 0) for one in firsts
                )
    return response


def _echo_again(self: Any, request: Any, response: Any, outputs: list[dict[str, Any]]) -> None:
    """SGLang takes choice i for one of prompt i // n, which no longer holds when choices are left
    out: each kept choice begins with its own prompt. The first of each prompt has its record."""
    prompts, prompt = self._prepare_echo_prompts(request), -1
    for place, (choice, output) in enumerate(zip(response.choices, outputs, strict=True)):
        prompt += "group" in (output["meta_info"].get(wire.KEY) or {})
        echoed = prompts[place // request.n]
        choice.text = prompts[prompt] + choice.text[len(echoed) :]


def completion_stream(
    original: Callable[..., Any], self: Any, adapted_request: Any, request: Any, raw_request: Any
) -> Any:
    """AROUND `_generate_completion_stream`."""
    setattr(adapted_request, ADDS_UP, True)
    lines = original(self, adapted_request, request, raw_request)
    return _with_record(lines, adapted_request, request, "text_completion")


def chat_stream(
    original: Callable[..., Any], self: Any, adapted_request: Any, request: Any, raw_request: Any
) -> Any:
    """AROUND `_generate_chat_stream`."""
    setattr(adapted_request, ADDS_UP, True)
    if getattr(request, "tools", None):
        setattr(adapted_request, REPLAYS, True)
    lines = original(self, adapted_request, request, raw_request)
    return _with_record(lines, adapted_request, request, "chat.completion.chunk")


async def _with_record(
    lines: Any, adapted_request: Any, request: Any, kind: str
) -> AsyncIterator[Any]:
    first_id = ""
    try:
        async for line in lines:
            if not first_id and line.startswith("data: {"):
                first_id = str(json.loads(line[6:]).get("id", ""))
            records = getattr(adapted_request, RECORDS, None)
            if records and line.startswith("data: [DONE]"):
                chunk = {
                    "id": first_id,
                    "object": kind,
                    "created": int(time.time()),
                    "model": request.model,
                    "choices": [],
                    "metadata": {wire.KEY: metadata_of(records)},
                }
                yield f"data: {json.dumps(chunk)}\n\n"
            yield line
    finally:
        await lines.aclose()
