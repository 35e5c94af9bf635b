"""One forward pass of a causal LM over many judge prompts, what they share read once.

The prompts of a call are a forest: a prefix (instruction, problem, one trace) and the rests that
follow it. They are packed without padding, prefixes first (`kernels.prefix_tree`). The attention
interface of transformers calls `kernels.prefix_attention`, so any model that goes through it can
judge. Of the last layer only the last token of each prompt is used: final norm, the labels' rows
and their log-softmax in one (`kernels.label_head`).

Not every model can be packed (attention sinks, caps on scores, norms of its own). So the first
thing done with a model is to compare packed and ordinary probabilities; `Packed.of` gives None
where they differ. A prompt beyond a sliding window is left to the ordinary way as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from transformers import AttentionInterface

from sglang_deepprune.judges.lm_prompt import Prompt
from sglang_deepprune.kernels.label_head import label_head
from sglang_deepprune.kernels.prefix_attention import prefix_attention
from sglang_deepprune.kernels.prefix_tree import PrefixTree, pack

ATTENTION = "deepprune_prefix"
_TREE: ContextVar[PrefixTree] = ContextVar("prefix tree of the pass that runs")
_TOLERANCE = {torch.float32: 1e-4}
_OTHER_TOLERANCE = 3e-2  # half precision


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
    q, k, v = (one[0].transpose(0, 1) for one in (query, key, value))
    return prefix_attention(q, k, v, _TREE.get(), scaling)[None], None


AttentionInterface.register(ATTENTION, attention)


class Packed:
    """Packed passes of one model."""

    def __init__(self, model: Any, label_ids: Sequence[int], pass_tokens: int):
        self.model = model
        self.pass_tokens = pass_tokens  # bounds the memory of a pass
        self.window = _window(model.config)
        self.tokens_read = 0
        self._norm = model.base_model.norm
        self._eps = float(self._norm.variance_epsilon)
        self._rows = model.get_output_embeddings().weight[list(label_ids)].contiguous()

    @classmethod
    def of(
        cls, model: Any, label_ids: Sequence[int], pass_tokens: int, ordinary: Any
    ) -> Packed | None:
        """None for a model whose probabilities it does not reproduce. `ordinary`: prompts -> [num]
        P(same) the ordinary way."""
        a, b = label_ids
        prompts = [
            Prompt((a, b, a), (b,)), Prompt((a, b, a), (b, b, a)), Prompt((b,), (a,)),
            Prompt((b,) * 9, (a, b, a, a, b)),
        ]  # fmt: skip
        try:
            packed = cls(model, label_ids, pass_tokens)
            found, wanted = packed.probabilities(prompts), torch.as_tensor(ordinary(prompts))
        except (AttributeError, TypeError, ValueError, RuntimeError, LookupError):
            return None
        tolerance = _TOLERANCE.get(model.dtype, _OTHER_TOLERANCE)
        return packed if bool((found.cpu() - wanted).abs().max() <= tolerance) else None

    def fits(self, prompts: Sequence[Prompt]) -> bool:
        """No prompt is longer than the model's sliding window."""
        return max(len(one.prefix) + len(one.rest) for one in prompts) <= self.window

    @torch.inference_mode()
    def probabilities(self, prompts: Sequence[Prompt]) -> torch.Tensor:
        """[num_prompts] float32 P(same answer), in the order given."""
        found = torch.empty(len(prompts))
        for families in passes(prompts, self.pass_tokens):
            order = [place for _, places in families for place in places]
            found[order] = self._pass(prompts, families).cpu()
        return found

    def _pass(
        self, prompts: Sequence[Prompt], families: Sequence[tuple[tuple[int, ...], list[int]]]
    ) -> torch.Tensor:
        rests = [prompts[place].rest for _, places in families for place in places]
        parents = [i for i, (_, places) in enumerate(families) for _ in places]
        device = self.model.device
        prefixes = [prefix for prefix, _ in families]
        tree = pack(list(map(len, prefixes)), list(map(len, rests)), parents, device=device)
        ids = torch.tensor([[t for part in (*prefixes, *rests) for t in part]], device=device)
        self.tokens_read += tree.total_tokens
        hidden = self._hidden(ids, tree)
        logs = label_head(hidden, self._norm.weight, self._rows, tree.last_indices, self._eps)
        return logs[:, 0].exp().float()

    def _hidden(self, ids: torch.Tensor, tree: PrefixTree) -> torch.Tensor:
        """[total, hidden], before the final norm."""
        base = self.model.base_model
        usual = self.model.config._attn_implementation
        token = _TREE.set(tree)
        self.model.set_attn_implementation(ATTENTION)
        base.norm = torch.nn.Identity()
        try:
            out = base(
                input_ids=ids, position_ids=tree.positions[None].long(), use_cache=False,
                attention_mask=None,
            )  # fmt: skip
        finally:
            base.norm = self._norm
            self.model.set_attn_implementation(usual)
            _TREE.reset(token)
        return out.last_hidden_state[0]


def passes(
    prompts: Sequence[Prompt], pass_tokens: int
) -> Iterator[list[tuple[tuple[int, ...], list[int]]]]:
    """Families (a prefix and the places of its prompts) cut into passes of at most `pass_tokens`,
    or of one prompt that is longer. A family that is cut is read after its prefix again."""
    by_prefix: dict[tuple[int, ...], list[int]] = {}
    for place, prompt in enumerate(prompts):
        by_prefix.setdefault(prompt.prefix, []).append(place)
    now: list[tuple[tuple[int, ...], list[int]]] = []
    used = 0
    for prefix, places in by_prefix.items():
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


def _window(config: Any) -> int:
    window = getattr(config, "sliding_window", None)
    if not window or not getattr(config, "use_sliding_window", True):
        return 1 << 30
    return int(window)
