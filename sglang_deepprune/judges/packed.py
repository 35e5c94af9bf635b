"""One forward pass of a causal LM over many judge prompts, what they share read once.

The prompts of a call are a forest: a stem (instruction and problem, the same for a whole group),
prefixes that begin with it (one trace more), and the rests that follow a prefix. A new prefix is
read after its stem, together with one of its rests; the other rests are read after the prefix. So
each pass has two levels, which are packed without padding, prefixes first
(`kernels.prefix_tree`). The attention interface of transformers calls `kernels.prefix_attention`,
so any model that goes through it can judge. Of the last layer only the last token of each prompt is
used: final norm, the labels' rows and their log-softmax in one (`kernels.label_head`).

Not every model can be packed (attention sinks, caps on scores, norms of its own). So the first
thing done with a model is to compare packed and ordinary probabilities; `Packed.of` gives None
where they differ. A prompt beyond a sliding window is left to the ordinary way as well, and one so
long that the model would turn its positions in another way.

Keys and values of the latest stems and prefixes are kept, within a bound of bytes: comparisons one
by one (`sequential.py`) ask about the same trace again and again, and then read the other trace
alone.
"""

from __future__ import annotations

import logging
import os
import random
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface

from sglang_deepprune.batcher import raise_if_lost
from sglang_deepprune.judges.attention import ENV, FLASHINFER, Attend, choose_attention
from sglang_deepprune.judges.gpu import PLAIN
from sglang_deepprune.judges.lm_prompt import Prompt
from sglang_deepprune.judges.memory import CACHE_BYTES
from sglang_deepprune.kernels.label_head import label_head
from sglang_deepprune.kernels.launch import has_triton
from sglang_deepprune.kernels.prefix_attention import kernel_takes
from sglang_deepprune.kernels.prefix_tree import PrefixTree, pack

ATTENTION = "deepprune_prefix"
_LOG = logging.getLogger(__name__)
_TOLERANCE = {torch.float32: 1e-4}
_OTHER_TOLERANCE = 3e-2  # half precision
# On a CPU a pass costs its tokens; on a GPU a short one costs what reading the weights does, taken
# for so many tokens (not measured).
_PASS_COST_ON_GPU = 512

KeyValues = list[tuple[torch.Tensor, torch.Tensor]]  # a layer: [tokens, kv_heads, head_dim] each
Family = tuple[tuple[int, ...], list[int]]  # a prefix, and the places of its prompts


@dataclass(slots=True)
class _Pass:
    """What the attention of the pass that runs has to know, and what it leaves behind."""

    tree: PrefixTree
    attend: Attend
    cached: KeyValues | None  # of all prefixes, one after the other; None: they are in the pass
    kept: torch.Tensor | None = None  # [num] int64: rows of the pass whose keys and values stay
    layers: KeyValues = field(default_factory=list)  # of these rows, as the pass computes them
    num_layers: int = 0  # so far


_PASS: ContextVar[_Pass] = ContextVar("the packed pass that runs")


def attention(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' interface: [1, heads, total, head_dim] in, [1, total, heads, head_dim] out."""
    now = _PASS.get()
    q, k, v = (one[0].transpose(0, 1) for one in (query, key, value))
    if now.kept is not None:
        # Copies: a slice would keep all rows in memory until the pass ends, and where a model makes
        # queries, keys and values in one product, these too.
        now.layers.append((k[now.kept], v[now.kept]))
    if now.cached is not None:
        before = now.cached[now.num_layers]
        k, v = torch.cat([before[0], k]), torch.cat([before[1], v])
    now.num_layers += 1
    return now.attend(q, k, v, now.tree, scaling)[None], None


AttentionInterface.register(ATTENTION, attention)


def _is_off(model: Any, why: str) -> None:
    """Logged once, when a judge loads; no trace is at hand that could be quoted."""
    _LOG.warning("deepprune: %s judges without packing: %s", type(model).__name__, why)


class Packed:
    """Packed passes of one model."""

    def __init__(self, model: Any, label_ids: Sequence[int], pass_tokens: int):
        self.model = model
        self.pass_tokens = pass_tokens  # bounds the memory of a pass
        self.window = _window(model.config)
        self.tokens_read = 0
        self.prefixes = PrefixCache(CACHE_BYTES)
        self._attend = choose_attention(model.device)
        self._norm = model.base_model.norm
        self._eps = float(self._norm.variance_epsilon)
        self._rows = model.get_output_embeddings().weight[list(label_ids)].contiguous()

    @classmethod
    def of(
        cls, model: Any, label_ids: Sequence[int], pass_tokens: int, ordinary: Any
    ) -> Packed | None:
        """None for a model whose probabilities it does not reproduce. `ordinary`: prompts -> [num]
        P(same) the ordinary way. Raises `DeviceLost` where it has broken the CUDA context."""
        if os.environ.get(PLAIN):
            _is_off(model, "its kernels have failed on this GPU")
            return None
        if model.device.type == "cuda" and not _has_kernel(model):
            # Its reference on a GPU takes memory that nobody has planned for.
            _is_off(model, "no kernel is made for its heads")
            return None
        try:
            packed = cls(model, label_ids, pass_tokens)
            most = min(pass_tokens, int(getattr(model.config, "max_position_embeddings", 1 << 30)))
            prompts = [
                one for one in specimens(model, label_ids)
                if packed.fits(one) and len(one.prefix) + len(one.rest) <= most
            ]  # fmt: skip
            wanted = torch.as_tensor(ordinary(prompts))
            # The second time after prefixes that are kept.
            found = torch.stack([packed.probabilities(prompts).cpu() for _ in range(2)])
            packed.prefixes.clear()
        except Exception as error:  # a model's fault, or what Triton raises where it cannot compile
            raise_if_lost(error)  # no ordinary pass works either: it takes a process of its own
            _is_off(model, f"{type(error).__name__}: {error}".split("\n")[0])
            return None
        largest = float((found - wanted).abs().max())
        if not largest <= _TOLERANCE.get(model.dtype, _OTHER_TOLERANCE):
            _is_off(model, f"packed scores are off by {largest:.2g}")
            return None
        return packed

    def fits(self, prompt: Prompt) -> bool:
        """It is no longer than what may be packed (`_window`)."""
        return len(prompt.prefix) + len(prompt.rest) <= self.window

    @torch.inference_mode()
    def probabilities(self, prompts: Sequence[Prompt]) -> torch.Tensor:
        """[num_prompts] float32 P(same answer), in the order given."""
        found = torch.empty(len(prompts))
        for families in _holdable(prompts, self.pass_tokens):
            bodies = self._bodies(prompts, families)
            asked = list(prompts)
            for place in bodies:
                asked[place] = prompts[place].after_stem()
            others = [place for _, own in families for place in own if place not in bodies]
            for chosen in (list(bodies), others):
                known = {place for place in chosen if asked[place].prefix in self.prefixes}
                for is_known in (True, False):
                    own = [place for place in chosen if (place in known) == is_known]
                    for part in passes(asked, self.pass_tokens, own):
                        order = [place for _, places in part for place in places]
                        found[order] = self._pass(asked, part, bodies).cpu()
            self.prefixes.trim()
        return found

    def _bodies(self, prompts: Sequence[Prompt], families: Sequence[Family]) -> dict[int, int]:
        """Prompts to read after their stem, the first of each new prefix -> tokens of that prefix
        behind the stem. The prefix's other prompts then need one pass more: where it has some, the
        stems must save more than a pass costs."""
        new = [(prefix, own) for prefix, own in families if prefix not in self.prefixes]
        several = [prompts[own[0]] for _, own in new if len(own) > 1]
        alone = {prompts[own[0]].stem for _, own in new if len(own) == 1}
        unread = {one.stem for one in several if one.stem not in self.prefixes} - alone
        saved = sum(one.stem_tokens for one in several) - sum(map(len, unread))
        takes_several = saved > (_PASS_COST_ON_GPU if self.model.device.type == "cuda" else 0)
        return {
            own[0]: len(prefix) - prompts[own[0]].stem_tokens
            for prefix, own in new
            if len(own) == 1 or takes_several
        }

    def _pass(
        self, prompts: Sequence[Prompt], families: Sequence[Family], bodies: Mapping[int, int]
    ) -> torch.Tensor:
        """P(same) of the families' prompts, one family after the other. Keys and values of prefixes
        that are new stay, and those of a prompt in `bodies` to the end of its body."""
        rests = [prompts[place].rest for _, own in families for place in own]
        parents = [i for i, (_, own) in enumerate(families) for _ in own]
        device = self.model.device
        prefixes = [prefix for prefix, _ in families]
        is_known = all(prefix in self.prefixes for prefix in prefixes)
        tree = pack(list(map(len, prefixes)), list(map(len, rests)), parents, device=device)
        read = rests if is_known else [*prefixes, *rests]
        ids = torch.tensor([[token for part in read for token in part]], device=device)
        spans = _spans(prompts, families, bodies, is_known=is_known)
        rows = [row for span in spans for row in span.rows]
        kept = torch.tensor(rows, device=device) if rows else None
        cached = self.prefixes.together(prefixes) if is_known else None
        now = _Pass(tree, self._attend, cached, kept)
        skipped = tree.total_tokens - ids.shape[1]
        self.tokens_read += ids.shape[1]
        hidden = self._hidden(ids, tree.positions[None, skipped:].long(), now)
        self.prefixes.keep(spans, now.layers)
        last = tree.last_indices - skipped
        logs = label_head(hidden, self._norm.weight, self._rows, last, self._eps)
        return logs[:, 0].exp().float()

    def _hidden(self, ids: torch.Tensor, positions: torch.Tensor, now: _Pass) -> torch.Tensor:
        """[tokens, hidden], before the final norm."""
        base = self.model.base_model
        usual = self.model.config._attn_implementation
        token = _PASS.set(now)
        self.model.set_attn_implementation(ATTENTION)
        base.norm = torch.nn.Identity()
        try:
            out = base(input_ids=ids, position_ids=positions, use_cache=False, attention_mask=None)
        finally:
            base.norm = self._norm
            self.model.set_attn_implementation(usual)
            _PASS.reset(token)
        return out.last_hidden_state[0]


@dataclass(frozen=True, slots=True)
class Span:
    """Rows of a pass whose keys and values are kept: the end of a prefix, behind `before`."""

    prefix: tuple[int, ...]
    before: tuple[int, ...]
    owner: str  # the group that it is of
    rows: range


def _spans(
    prompts: Sequence[Prompt],
    families: Sequence[Family],
    bodies: Mapping[int, int],
    *,
    is_known: bool,
) -> list[Span]:
    """What a pass leaves behind, in the order of its rows: prefixes unless they are known, then
    bodies."""
    spans, row = [], 0
    for prefix, own in () if is_known else families:
        owner = prompts[own[0]].group_id
        spans.append(Span(prefix, (), owner, range(row, row := row + len(prefix))))
    for place in (place for _, own in families for place in own):
        one = prompts[place]
        if place in bodies:
            whole = (*one.prefix, *one.rest[: bodies[place]])
            spans.append(Span(whole, one.prefix, one.group_id, range(row, row + bodies[place])))
        row += len(one.rest)
    return spans


class PrefixCache:
    """Keys and values of stems and prefixes, the least recently used first out. It may hold more
    than its bound until `trim`: what the passes of a call need."""

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._items: OrderedDict[tuple[int, ...], tuple[str, KeyValues]] = OrderedDict()

    def __contains__(self, prefix: tuple[int, ...]) -> bool:
        return prefix in self._items

    def clear(self) -> None:
        self._items.clear()
        self.num_bytes = 0

    def forget(self, owners: Iterable[str]) -> None:
        """Drop what was kept for groups that have ended."""
        ended = set(owners)
        for prefix in [prefix for prefix, (owner, _) in self._items.items() if owner in ended]:
            self._drop(prefix)

    def _drop(self, prefix: tuple[int, ...]) -> None:
        _, gone = self._items.pop(prefix)
        self.num_bytes -= _num_bytes(gone)

    def together(self, prefixes: Sequence[tuple[int, ...]]) -> KeyValues:
        """Those of several prefixes, one after the other."""
        found = []
        for prefix in prefixes:
            self._items.move_to_end(prefix)
            found.append(self._items[prefix][1])
        return [
            (torch.cat([k for k, _ in layer]), torch.cat([v for _, v in layer]))
            for layer in zip(*found, strict=True)
        ]

    def keep(self, spans: Sequence[Span], layers: KeyValues) -> None:
        """`layers`: of the rows of all spans, one after the other."""
        start = 0
        for span in spans:
            rows = slice(start, start := start + len(span.rows))
            if span.prefix in self._items or not span.prefix:
                continue
            own = [(k[rows], v[rows]) for k, v in layers]
            if span.before:
                before = self._items[span.before][1]
                kept = [(torch.cat([a, k]), torch.cat([b, v]))
                        for (a, b), (k, v) in zip(before, own, strict=True)]  # fmt: skip
            else:
                # Copies again: a slice would keep the other prefixes with it.
                kept = [(k.clone(), v.clone()) for k, v in own]
            self._items[span.prefix] = span.owner, kept
            self.num_bytes += _num_bytes(kept)

    def trim(self) -> None:
        while self.num_bytes > self.max_bytes:
            self._drop(next(iter(self._items)))


def _num_bytes(layers: KeyValues) -> int:
    return sum(k.nbytes + v.nbytes for k, v in layers)


def _families(prompts: Sequence[Prompt], chosen: Iterable[int]) -> list[Family]:
    by_prefix: dict[tuple[int, ...], list[int]] = {}
    for place in chosen:
        by_prefix.setdefault(prompts[place].prefix, []).append(place)
    return list(by_prefix.items())


def _holdable(prompts: Sequence[Prompt], pass_tokens: int) -> Iterator[list[Family]]:
    """All families, as many at a time as one pass could hold the prefixes of: no more memory is
    planned for what is kept (`memory.token_bytes_of`)."""
    now: list[Family] = []
    used = 0
    for prefix, places in _families(prompts, range(len(prompts))):
        if now and used + len(prefix) > pass_tokens:
            yield now
            now, used = [], 0
        now.append((prefix, places))
        used += len(prefix)
    yield now


def passes(
    prompts: Sequence[Prompt],
    pass_tokens: int,
    chosen: Iterable[int],
) -> Iterator[list[Family]]:
    """The families of the chosen prompts, in passes of at most `pass_tokens`, or of one prompt that
    is longer. A kept prefix counts as much as one that is read: its keys and values are copied for
    the pass."""
    now: list[Family] = []
    used = 0
    for prefix, places in _families(prompts, chosen):
        is_open = False  # the prefix is in `now`
        for place in places:
            rest = len(prompts[place].rest)
            cost = rest + (0 if is_open else len(prefix))
            if now and used + cost > pass_tokens:
                yield now
                now, used, is_open = [], 0, False
                cost = rest + len(prefix)
            if not is_open:
                now.append((prefix, []))
                is_open = True
            now[-1][1].append(place)
            used += cost
    if now:
        yield now


def specimens(model: Any, label_ids: Sequence[int]) -> list[Prompt]:
    """Prompts of all shapes that a pass can have: beside the shortest, stems, prefixes and rests,
    shared and alone, on a GPU each of more keys than a kernel takes at a time."""
    a, b = label_ids
    rng = random.Random(0)
    num_ids = int(model.get_input_embeddings().weight.shape[0])
    many = 70 if model.device.type == "cuda" else 7  # a large model on a CPU reads slowly

    def ids(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(num_ids) for _ in range(count))

    stem = ids(many)
    shared, alone = stem + ids(many + 10), stem + ids(many + 5)
    return [
        Prompt((a, b, a), (b,), stem_tokens=1), Prompt((a, b, a), (b, b, a), stem_tokens=1),
        Prompt((b,), (a,)), Prompt((b,) * 9, (a, b, a, a, b), stem_tokens=4),
        Prompt(shared, ids(2 * many), stem_tokens=many), Prompt(shared, ids(3), stem_tokens=many),
        Prompt(alone, ids(2 * many + 3), stem_tokens=many),
    ]  # fmt: skip


def _has_kernel(model: Any) -> bool:
    """Whether this project's kernel, or FlashInfer's, attends over a pass, not the reference."""
    if os.environ.get(ENV) == FLASHINFER:
        return True  # or it refuses by itself
    config = model.config
    num_heads = int(config.num_attention_heads)
    group = num_heads // int(getattr(config, "num_key_value_heads", None) or num_heads)
    head_dim = getattr(config, "head_dim", None) or int(config.hidden_size) // num_heads
    return has_triton() and kernel_takes(model.dtype, int(head_dim), group)


def _window(config: Any) -> int:
    """Tokens of a prompt that may be packed: a token sees all before it, and its rotary embedding
    does not depend on the longest prompt of its pass, which a kept prefix outlives."""
    windows = [1 << 30]
    if getattr(config, "use_sliding_window", True):
        windows.append(int(getattr(config, "sliding_window", None) or 1 << 30))
    usual = getattr(config, "original_max_position_embeddings", None)
    for rope in _ropes(config):
        kind = str(rope.get("rope_type") or rope.get("type") or "")
        # As `transformers.modeling_rope_utils.dynamic_rope_update` asks.
        if "dynamic" in kind or kind == "longrope":
            length = rope.get("original_max_position_embeddings") or usual
            windows.append(int(length or config.max_position_embeddings))
    return min(windows)


def _ropes(config: Any) -> list[dict[str, Any]]:
    """A model's settings of rotary embeddings: one for all layers, or one a type of layer."""
    # Its name before transformers 5 is the second.
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return [found, *(one for one in found.values() if isinstance(one, dict))]
