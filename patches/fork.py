"""A request that continues another one's row: what a probe is to SGLang.

Its row of `req_to_token` begins with the sibling's own slots, page-aligned
(`ProbeReq.init_next_round_input`), as `beam_search/fork.py::alias_members_prompt_kv` does it for
beams: nothing is copied, nothing goes into the radix tree, and the sibling's own KV is booked as
before, so that a pruned sibling frees all of it in its step. What the fork owns is the tail: the
rest of the page, the closing text, at most 16 tokens. SGLang's finish path frees that
(`cache_protected_len` ends the aliased part).
"""

from __future__ import annotations

import copy
import inspect
from array import array
from typing import Any

from packaging.version import Version
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool

from sglang_deepprune import probing
from sglang_deepprune.patches import seams

SINCE = "0.5.23"  # rows without a Req (`ReqToTokenPool.alloc_rows`), `Req.kv`, `tree_cache.lock`


def refusal(server_args: Any) -> str:
    """Why the judge `probe` cannot work on this server; "" where it can."""
    sglang = seams.sglang_version()
    if Version(sglang.base_version) < Version(SINCE):
        return f"it needs SGLang {SINCE}, this is {sglang}"
    for name, what in (
        ("speculative_algorithm", "speculative decoding"),
        ("enable_hierarchical_cache", "the hierarchical cache"),
        ("enable_lmcache", "LMCache"),
        ("enable_hisparse", "HiSparse"),
        ("enable_dp_attention", "DP attention"),
    ):
        if getattr(server_args, name, None):
            return f"{what} keeps KV where a fork does not find it"
    if (getattr(server_args, "attn_dp_size", 1) or 1) > 1:  # what `enable_dp_attention` has become
        return "DP attention keeps KV where a fork does not find it"
    for owner, name, needs in (
        (Req, "init_next_round_input", ("self", "tree_cache")),
        (ReqToTokenPool, "alloc_rows", ("self", "need_size")),
        (ReqToTokenPool, "write", ("self", "indices", "values")),
        (ReqToTokenPool, "free", ("self", "req")),
    ):
        known = getattr(owner, name, None)
        names = tuple(inspect.signature(known).parameters) if known else ()
        if tuple(one for one in names if one in needs) != needs:
            return f"{owner.__name__}.{name} is not as in SGLang {SINCE}"
    return ""


class ProbeReq(Req):
    """A request whose prefix lies in another request's row; never in the radix tree."""

    prefix_len: int  # Req's

    def __init__(self, sibling: Any, ids: array[int], rid: str, pool: Any, num_shared: int):
        super().__init__(
            rid, "", ids, _params(sibling.sampling_params), eos_token_ids=sibling.eos_token_ids,
            vocab_size=sibling.vocab_size, priority=sibling.priority,
        )  # fmt: skip
        self.sibling = sibling
        self.pool = pool  # sglang ReqToTokenPool
        self.num_shared = num_shared  # tokens, a multiple of the page size
        self.is_attached = True
        self.tokenizer = sibling.tokenizer
        self.lora_id, self.extra_key = sibling.lora_id, sibling.extra_key
        self.cache_salt = sibling.cache_salt
        self.logprob_start_len = -1
        self.skip_radix_cache_insert = True
        # Under overlap a finished row comes by once more: never to be sent.
        self.finished_output = True

    def init_next_round_input(self, tree_cache: Any = None, cow_mamba: Any = None) -> None:
        """Instead of a match in the tree: a row that begins with the sibling's slots.

        The prompt's node is locked once more by `PrefillAdder.add_one_req`, which is what keeps the
        tree's part of them; the rest lives as long as the sibling does.
        """
        kv, shared = self.kv, self.num_shared
        if not kv.holds_kv:
            rows = self.pool.alloc_rows(1) if self.sibling.kv.holds_kv else None
            if rows is None:
                # Its sibling was taken off its row within this pass. Dear, but not wrong.
                super().init_next_round_input(tree_cache, cow_mamba)
                self.num_shared, self.is_attached = self.prefix_len, False
                return
            theirs = self.pool.req_to_token[self.sibling.kv.req_pool_idx, :shared]
            self.pool.write((rows[0], slice(0, shared)), theirs)
            kv.req_pool_idx = rows[0]
            kv.cache_protected_len = kv.kv_committed_len = kv.kv_allocated_len = shared
        self.refresh_fill_ids()
        self.prefix_len = self.num_matched_prefix_tokens = shared
        self.last_node = self.last_host_node = self.best_match_node = self.sibling.last_node
        self.host_hit_length = self.swa_host_hit_length = self.mamba_host_hit_length = 0

    def detach(self) -> None:
        """The sibling's slots are about to be somebody else's: name one of our own instead."""
        if self.is_attached and self.kv.holds_kv and self.kv.kv_allocated_len > self.num_shared:
            self.is_attached = False
            row = self.pool.req_to_token[self.kv.req_pool_idx]
            row[: self.num_shared] = row[self.num_shared]

    def give_row_back(self) -> None:
        """It was not admitted: it owns a row and no slot."""
        if self.kv.holds_kv:
            self.pool.free(self)
            self.kv.mark_kv_released()
            self.kv.cache_protected_len = self.kv.kv_committed_len = 0


def _params(theirs: Any) -> Any:
    """Its sibling's temperature and filters, so that no batch-wide flag of the sampler changes by
    its presence (`SamplingBatchInfo.from_schedule_batch`): its tokens are greedy all the same
    (`patches/sampling.py`)."""
    params = copy.copy(theirs)
    params.max_new_tokens, params.min_new_tokens, params.n = probing.MAX_TOKENS, 0, 1
    params.frequency_penalty = params.presence_penalty = 0.0
    params.repetition_penalty = 1.0
    params.stop = params.stop_regex = params.stop_token_ids = None
    params.stop_strs, params.stop_regex_strs = [], []
    params.stop_str_max_len = params.stop_regex_max_len = 0
    params.json_schema = params.regex = params.ebnf = params.structural_tag = None
    params.logit_bias = params.custom_params = params.watermark = None
    params.ignore_eos = False
    return params
