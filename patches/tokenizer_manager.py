"""Who is whose sibling: the tokenizer side of a group.

An n>1 request is known here, before `TokenizerManager._handle_batch_request` fans it out; after
that nothing on SGLang's wire links the siblings. The fan-out first sends one warm-up request a
prompt (max_new_tokens=0), then n siblings a prompt, all through `_send_one_request`: a counter in
a context variable tells which call is which. The warm-up is never a sibling.
"""

from __future__ import annotations

import contextvars
import copy
import hashlib
import inspect
import json
import time
import uuid
from array import array
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sglang.srt.managers import io_struct

from sglang_deepprune.config import ConfigError, DeepPruneConfig, shown
from sglang_deepprune.patches import output, wire
from sglang_deepprune.patches.ranks import RankBook, rank_of_name
from sglang_deepprune.patches.server_args import config_of, token_of
from sglang_deepprune.reply import is_later
from sglang_deepprune.types import ABSENT


@dataclass(slots=True)
class Fan:
    """One n>1 request while it is fanned out and answered."""

    num_prompts: int
    num_siblings: int  # a prompt
    asks: list[wire.Ask]  # [num_prompts]
    stems: list[str]  # [num_prompts] the rid that a client knows each prompt by
    token: str  # see server_args.Carrier
    group_ids: list[str] = field(default_factory=list)
    ranks: list[int | None] = field(default_factory=list)  # a prompt's data-parallel rank
    rids: list[tuple[int, str]] = field(default_factory=list)  # (prompt, rid) of sent siblings
    aborted: set[str] = field(default_factory=set)  # stems that a client has aborted
    num_calls: int = 0
    is_done: bool = False

    def stem_of(self, rid: str) -> str | None:
        """What a client calls the request of the sibling that was sent last; None for others."""
        if not self.rids or self.rids[-1][1] != rid:
            return None
        return self.stems[self.rids[-1][0]]

    def next_tag(self, rid: str) -> tuple[int | None, dict[str, Any] | None]:
        """Rank and tag of the request that is being sent now; warm-ups and opted-out ones have no
        tag."""
        call, self.num_calls = self.num_calls, self.num_calls + 1
        if call < self.num_prompts:
            return self.ranks[call], None
        prompt, index = divmod(call - self.num_prompts, self.num_siblings)
        self.is_done = call + 1 == self.num_prompts * (self.num_siblings + 1)
        self.rids.append((prompt, rid))
        ask = self.asks[prompt]
        if not ask.is_wanted:
            return None, None
        return self.ranks[prompt], wire.tag(
            self.group_ids[prompt], index, self.num_siblings, ask.settings,
            rid=self.stems[prompt], token=self.token,
        )  # fmt: skip


_FAN: contextvars.ContextVar[Fan | None] = contextvars.ContextVar("deepprune_fan", default=None)
_RANKS = RankBook()
_LOOK_S = 1.0  # between two looks whether a client is still there
_BY_STEM: dict[str, Fan] = {}  # the user's rid of an n>1 request -> its fan


def generate_request(
    original: Callable[..., Any], self: Any, obj: Any, request: Any = None, *rest: Any
) -> Any:
    """AROUND `generate_request`: SGLang makes n copies of every input before anybody looks at n
    (`GenerateReqInput._normalize_batch_inputs`): with n=2147483647 the server is out of memory."""
    config = config_of(self.server_args)
    params = getattr(obj, "sampling_params", None)
    first: Any = params[0] if isinstance(params, list) and params else params
    responses = original(self, obj, request, *rest)
    if config is None or not isinstance(first, dict):
        return responses
    size = first.get("n")
    if not isinstance(size, int) or size <= wire.MOST_SIBLINGS or _is_beam(first):
        return responses
    return _refused(responses, config, first, size)


async def _refused(
    responses: Any, config: DeepPruneConfig, params: dict[str, Any], size: int
) -> AsyncIterator[Any]:
    """A 400 for a request of which something is wanted; all others are SGLang's to answer."""
    try:
        if wire.read_ask(config, params.get("custom_params")).is_wanted:
            raise _too_many(size)
        async for response in responses:
            yield response
    finally:
        await responses.aclose()


def _too_many(size: int) -> ConfigError:
    return ConfigError("n", f"at most {wire.MOST_SIBLINGS} siblings a group, got {size}")


def _is_beam(params: dict[str, Any]) -> bool:
    """n is then the number of beams that come back; nobody is fanned out."""
    return (params.get("beam_width") or 1) > 1


def handle_batch_request(
    original: Callable[..., Any], self: Any, obj: Any, request: Any = None, *rest: Any
) -> Any:
    """AROUND `_handle_batch_request`: plain requests pass untouched."""
    fan = _fan_of(self, obj)
    if fan is None:
        responses = original(self, obj, request, *rest)
        return _collected(responses, obj) if _names_groups(self, obj) else responses
    return _serve(original, self, obj, request, rest, fan)


def _names_groups(self: Any, obj: Any) -> bool:
    """A batch of n=1 requests, some of which are members of client-side groups."""
    if config_of(self.server_args) is None or not isinstance(obj, io_struct.GenerateReqInput):
        return False
    params = obj.sampling_params
    each = params if isinstance(params, list) else [params]
    return any(wire.is_named((one or {}).get("custom_params")) for one in each)


async def _collected(responses: Any, obj: Any) -> AsyncIterator[Any]:
    """Each of the batch's prompts has a request object of its own; the OpenAI handlers look for
    the records on the batch's."""
    found: dict[str, dict[str, Any]] = {}
    try:
        async for response in responses:
            for one in response if isinstance(response, list) else [response]:
                record = ((one.get("meta_info") or {}).get(wire.KEY) or {}).get("group")
                if not record:
                    continue
                known = found.get(record["group_id"])
                if known is None or is_later(record, known):
                    found[record["group_id"]] = record
            yield response
        if found:
            setattr(obj, output.RECORDS, list(found.values()))
    finally:
        await responses.aclose()


async def _serve(
    original: Callable[..., Any], self: Any, obj: Any, request: Any, rest: Any, fan: Fan
) -> AsyncIterator[Any]:
    _FAN.set(fan)
    num_ranks = _num_ranks(self)
    if num_ranks > 1:
        fan.ranks = [
            _RANKS.take(num_ranks, fan.num_siblings) if ask.is_wanted else None for ask in fan.asks
        ]
    for stem in fan.stems:
        _BY_STEM[stem] = fan
    is_incremental = bool(getattr(self.server_args, "incremental_streaming_output", False))
    shape = output.Reply(fan.num_siblings, fan.asks, is_incremental=is_incremental)
    responses = original(self, obj, request, *rest)
    # SGLang lets a background request run on without its client.
    client = None if getattr(obj, "background", False) else request
    looked_s = time.monotonic()
    try:
        async for response in responses:
            if isinstance(response, list):
                yield shape.whole(response, obj)
                continue
            for piece in shape.piece(response, obj):
                yield piece
            # While choices are held back the OpenAI endpoints have not begun to answer: nobody
            # else would see that the client has left.
            if shape.buffers and client is not None and time.monotonic() - looked_s > _LOOK_S:
                looked_s = time.monotonic()
                if await client.is_disconnected():
                    raise ValueError("The client has left; its group is aborted.")
    finally:
        # A later n=1 call in the same task must not be taken for a sibling.
        fan.is_done = True
        for rank in fan.ranks:
            if rank is not None:
                _RANKS.give_back(rank, fan.num_siblings)
        for stem in fan.stems:
            if _BY_STEM.get(stem) is fan:
                del _BY_STEM[stem]
        # Before 0.5.20 SGLang does not abort the siblings of a client that has left.
        for _, rid in fan.rids:
            if rid in self.rid_to_state:
                self.abort_request(rid)
        await responses.aclose()


def _fan_of(self: Any, obj: Any) -> Fan | None:
    """The fan of an n>1 generation request of which something is wanted. May raise ConfigError."""
    config = config_of(self.server_args)
    size = getattr(obj, "parallel_sample_num", 1) or 1
    if config is None or size <= 1:
        return None
    params = obj.sampling_params
    # SGLang has made bs * n entries of them by now, and reads the first bs.
    each = params[: obj.batch_size] if isinstance(params, list) else [params] * obj.batch_size
    asks = _asks_of(config, each)
    for index, (ask, one) in enumerate(zip(asks, each, strict=True)):
        if ask.group:
            raise ConfigError("group", "an n>1 request is a group of its own; send n=1 requests")
        if not ask.is_explicit and _is_left_alone(self, obj, one or {}):
            asks[index] = wire.Ask(is_wanted=False, is_explicit=False)
    if not any(ask.is_wanted or ask.is_explicit for ask in asks):
        return None
    if size > wire.MOST_SIBLINGS:
        raise _too_many(size)
    fan = Fan(obj.batch_size, size, asks, _stems_of(obj), token_of(self.server_args))
    fan.group_ids = [uuid.uuid4().hex for _ in range(obj.batch_size)]
    fan.ranks = [None] * obj.batch_size
    return fan


def _asks_of(config: DeepPruneConfig, each: list[Any]) -> list[wire.Ask]:
    """What is asked for each prompt; once for all of them where they share one object."""
    asks: list[wire.Ask] = []
    for place, one in enumerate(each):
        if place and one is each[place - 1]:
            asks.append(asks[-1])
        else:
            asks.append(wire.read_ask(config, (one or {}).get("custom_params")))
    return asks


def _num_ranks(self: Any) -> int:
    """Ranks with a queue of their own. Since 0.5.23 attention-DP groups (`--attn-dp-size`) are not
    counted by `dp_size`; SGLang's own number has both."""
    return int(getattr(self, "elastic_worker_count", 0) or self.server_args.dp_size)


def _is_left_alone(self: Any, obj: Any, params: dict[str, Any]) -> bool:
    """A benchmark that forces lengths, or a session, is pruned only when it asks for it."""
    if params.get("ignore_eos") or getattr(obj, "session_params", None) is not None:
        return True
    # A session that lives in the radix tree wants what its requests leave there.
    is_pinned = getattr(self.server_args, "enable_session_radix_cache", False)
    if is_pinned and getattr(obj, "session_id", None) is not None:
        return True
    fewest, most = params.get("min_new_tokens") or 0, params.get("max_new_tokens")
    return most is not None and 0 < most <= fewest


def _stems_of(obj: Any) -> list[str]:
    """What a client calls each prompt: SGLang has made `rid_0`, `rid_1`, ... of one string by
    now, and has left a list of rids as it was."""
    rids = [str(rid) for rid in obj.rid]
    stem = rids[0].removesuffix("_0")
    if len(rids) > 1 and stem != rids[0] and rids[1] == f"{stem}_1":
        return [stem] * obj.batch_size
    return rids[: obj.batch_size]


def send_one_request(original: Callable[..., Any], self: Any, tokenized_obj: Any) -> Any:
    """AROUND `_send_one_request` (sync before 0.5.20, a coroutine since): tag, then pass on."""
    _tag(self, tokenized_obj)
    sent = original(self, tokenized_obj)
    fan = _FAN.get()
    if fan is None or not fan.aborted or fan.stem_of(tokenized_obj.rid) not in fan.aborted:
        return sent
    if inspect.isawaitable(sent):
        return _abort_once_sent(self, sent, tokenized_obj.rid)
    self.abort_request(tokenized_obj.rid)
    return sent


async def _abort_once_sent(self: Any, sent: Awaitable[Any], rid: str) -> Any:
    """The group was aborted before this sibling was sent: it ends as its siblings do."""
    result = await sent
    self.abort_request(rid)
    return result


def send_batch_request(original: Callable[..., Any], self: Any, tokenized_objs: Any) -> Any:
    """AROUND `_send_batch_request`, the way of a batch of prompts that need no tokenizing, n=1."""
    for tokenized_obj in tokenized_objs:
        _tag(self, tokenized_obj)
    return original(self, tokenized_objs)


def _tag(self: Any, tokenized_obj: Any) -> None:
    """What is ours in a request on its way to the scheduler: a tag, or nothing. May raise
    ConfigError."""
    params = getattr(tokenized_obj, "sampling_params", None)
    if params is not None and config_of(self.server_args) is not None:
        _check_travels(params)
        fan = _FAN.get()
        if fan is not None and not fan.is_done:
            rank, tagged = fan.next_tag(tokenized_obj.rid)
        else:
            tagged = _client_side_tag(self, tokenized_obj)
            rank, num_ranks = None, _num_ranks(self)
            if tagged is not None and num_ranks > 1:
                rank = rank_of_name(num_ranks, tagged["gid"])
        # A rank that the user named stays.
        if rank is not None and tokenized_obj.routed_dp_rank is None:
            tokenized_obj.routed_dp_rank = rank
        custom = getattr(params, "custom_params", None)
        if tagged is not None or wire.is_named(custom):
            # The n siblings share one SamplingParams object in this process: tag a copy.
            tokenized_obj.sampling_params = params = copy.copy(params)
            params.custom_params = wire.with_tag(custom, tagged)


def _check_travels(params: Any) -> None:
    """SGLang takes anything for `custom_params`, and where its processes send each other typed
    messages (`SGLANG_USE_PICKLE_IPC=0`) its scheduler dies of what is no object."""
    custom = getattr(params, "custom_params", None)
    if custom is None or isinstance(custom, dict) or getattr(io_struct, "_USE_PICKLE_IPC", True):
        return
    raise ConfigError("custom_params", f"expected an object, got {shown(custom)}")


def _client_side_tag(self: Any, tokenized_obj: Any) -> dict[str, Any] | None:
    """The tag of a single request that names a group of its own, or None."""
    custom = getattr(tokenized_obj.sampling_params, "custom_params", None)
    if not isinstance(custom, Mapping) or wire.KEY not in custom:
        return None
    config = config_of(self.server_args)
    assert config is not None
    ask = wire.read_ask(config, custom)
    is_beam = (getattr(tokenized_obj.sampling_params, "beam_width", None) or 1) > 1
    if not ask.group or not ask.is_wanted or is_beam:
        return None
    if tokenized_obj.mm_inputs is not None or tokenized_obj.input_embeds is not None:
        raise ConfigError("group", "not for prompts with images, audio or embeddings")
    group_id, token = _scoped(ask, tokenized_obj), token_of(self.server_args)
    return wire.tag(group_id, ABSENT, ask.size, ask.settings, rid="", token=token)


def _scoped(ask: wire.Ask, tokenized_obj: Any) -> str:
    """A group id that only equal work can share: the client's string scoped by prompt, sampling
    settings and cache namespace, so that a guessed name alone joins nobody's group."""
    params = tokenized_obj.sampling_params
    custom = getattr(params, "custom_params", None) or {}
    fields = getattr(params, "__struct_fields__", ())
    names = [name for name in fields if name not in ("custom_params", "sampling_seed")]
    parts = [
        ask.group,
        ask.size,
        sorted(ask.settings.items()),
        _digest(tokenized_obj.input_ids),
        [repr(getattr(params, name, None)) for name in names],
        repr(getattr(tokenized_obj, "cache_salt", None)),
        repr(getattr(tokenized_obj, "extra_key", None)),
        repr(getattr(tokenized_obj, "lora_id", None)),
        # Of a session these ids are its last turn alone.
        repr(getattr(tokenized_obj, "session_params", None)),
        repr(getattr(tokenized_obj, "session_id", None)),
        repr(getattr(tokenized_obj, "custom_logit_processor", None)),
        repr(sorted((str(key), value) for key, value in custom.items() if key != wire.KEY)),
    ]
    return "c" + hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:31]


def _digest(input_ids: Any) -> str:
    """Of a prompt's token ids; a long prompt costs the event loop no longer than a copy of it."""
    ids = array("q", [] if input_ids is None else input_ids)
    return hashlib.sha256(ids.tobytes()).hexdigest()


def wait_one_response(
    original: Callable[..., Any], self: Any, obj: Any, request: Any = None
) -> Any:
    """AROUND `_wait_one_response`: our record leaves the finish reason for `meta_info`."""
    # Called at once: since 0.5.19 the original takes hold of the request's state here.
    return _unwrapped(original(self, obj, request), obj)


async def _unwrapped(responses: Any, obj: Any) -> AsyncIterator[Any]:
    try:
        async for response in responses:
            meta = response.get("meta_info") if isinstance(response, dict) else None
            reason = meta.get("finish_reason") if meta else None
            if meta and isinstance(reason, dict) and wire.KEY in reason:
                output.unpack(meta, reason, obj)
            yield response
    finally:
        await responses.aclose()


def abort_request(
    original: Callable[..., Any], self: Any, rid: str = "", abort_all: bool = False
) -> Any:
    """AROUND `abort_request`: the rid of an n>1 request aborts its siblings and nobody else's."""
    fan = _BY_STEM.get(rid) if rid and not abort_all else None
    if fan is None:
        return original(self, rid, abort_all)
    fan.aborted.add(rid)  # those that are not sent yet: SGLang prefills the prompt first
    for prompt, sibling in list(fan.rids):
        if fan.stems[prompt] == rid and sibling in self.rid_to_state:
            original(self, sibling, False)
    return None
