"""A causal language model as judge, zero-shot or fine-tuned (the paper's, section 4.1).

It reads instruction, problem and both truncated traces, and says "the same answer" by the
probability of its label token: softmax over the two labels' logits after the last token. Loaded by
plain transformers from a folder, a GGUF file or a hub name, never with code of its own. All prompts
of a call are packed: what they share is computed once (`packed.py`), and only the labels' rows of
the LM head are multiplied with the last tokens.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from sglang_deepprune.judges import memory
from sglang_deepprune.judges.lm_prompt import Prompt, PromptWriter, load_settings, score_readable
from sglang_deepprune.judges.packed import Packed
from sglang_deepprune.judges.residual import widen_residual
from sglang_deepprune.types import Pair

_CHECK_TOLERANCE = {torch.float32: {"atol": 1e-3, "rtol": 1e-3}}
_OTHER_CHECK_TOLERANCE = {"atol": 5e-2, "rtol": 1e-2}  # half precision rounds the model's own


class LLMJudge:
    """See the module. NaN: a trace without text."""

    name = "llm"
    mixes_groups = True

    def __init__(self, path: str, dtype: torch.dtype | None = None) -> None:
        """`dtype`: None for what suits the device."""
        torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
        memory.take()
        self.model, tokenizer = load_model(path, dtype)
        if self.model.dtype != torch.float32:
            widen_residual(self.model)
        room = memory.take(self.model)
        self.pass_tokens = room.pass_tokens if room else memory.PASS_TOKENS  # bounds its memory
        limit = int(getattr(self.model.config, "max_position_embeddings", 1 << 30))
        if room:  # a pass holds one prompt at least, and no memory is planned for a longer one
            limit = min(limit, room.pass_tokens)
        folder = path if Path(path).is_dir() else None
        self.prompts = PromptWriter(tokenizer, load_settings(folder), limit)
        self.head = LabelHead(self.model, self.prompts.label_ids)
        self._padded_tokens = 0
        label_ids = self.prompts.label_ids
        self.packed = Packed.of(self.model, label_ids, self.pass_tokens, self.score_padded)
        if self.packed is not None and room is not None:
            self.packed.prefixes.max_bytes = room.cache

    def score(self, pairs: Sequence[Pair]) -> np.ndarray:
        """[num_pairs] float32; see `Judge.score`."""
        return score_readable(pairs, lambda own: self.score_prompts(self.prompts.write(own)))

    def forget(self, group_ids: Sequence[str]) -> None:
        """Texts, keys and values that were kept for groups that have ended."""
        self.prompts.forget(group_ids)
        if self.packed is not None:
            self.packed.prefixes.forget(group_ids)

    @property
    def tokens_read(self) -> int:
        """By the model so far; a shared prefix counts once a pass, padding does not."""
        return self._padded_tokens + (self.packed.tokens_read if self.packed else 0)

    def score_prompts(self, prompts: Sequence[Prompt]) -> np.ndarray:
        """[num_prompts] float32 P(same answer)."""
        if self.packed is None:
            return self.score_padded(prompts)
        found = np.empty(len(prompts), dtype=np.float32)
        fits = np.array([self.packed.fits(one) for one in prompts], dtype=bool)
        for is_fit, score in ((True, self.packed.probabilities), (False, self.score_padded)):
            places = np.flatnonzero(fits == is_fit)
            if len(places):
                found[places] = score([prompts[place] for place in places])
        return found

    @torch.inference_mode()
    def score_padded(self, prompts: Sequence[Prompt]) -> np.ndarray:
        """The same the ordinary way: padded batches, sorted by length, nothing shared."""
        rows = [torch.tensor((*one.prefix, *one.rest)) for one in prompts]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        found = np.zeros(len(rows), dtype=np.float32)
        for batch in _batches(order, [len(row) for row in rows], self.pass_tokens):
            found[batch] = self._forward([rows[i] for i in batch])
        return found

    def _forward(self, rows: Sequence[torch.Tensor]) -> np.ndarray:
        """[num_rows] P(same) of whole prompts, padded on the right."""
        device = self.model.device
        lengths = torch.tensor([len(row) for row in rows])
        ids = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True).to(device)
        mask = (torch.arange(ids.shape[1])[None, :] < lengths[:, None]).to(device)
        hidden = self.head.hidden(ids, mask)
        self._padded_tokens += int(lengths.sum())
        last = hidden[torch.arange(len(rows)), lengths - 1]
        return self.head.probability(last).cpu().numpy()


class LabelHead:
    """The labels' rows of the LM head. Checked against the model's own logits once, when it loads:
    a model that scales or caps its logits in some way of its own takes the whole head."""

    def __init__(self, model: Any, label_ids: tuple[int, int]):
        self.model = model
        self.label_ids = list(label_ids)
        head = model.get_output_embeddings()
        self.weight = head.weight[self.label_ids]  # [2, hidden]
        bias = getattr(head, "bias", None)
        self.bias = None if bias is None else bias[self.label_ids]
        self._is_plain = self._agrees()

    def hidden(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """[batch, length, hidden], after the final norm."""
        out = self.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
        return out.last_hidden_state

    def probability(self, last: torch.Tensor) -> torch.Tensor:
        """[batch] float32 P(same) from the last tokens' [batch, hidden]."""
        logits = self._own_rows(last) if self._is_plain else self._whole(last)
        return torch.softmax(logits.float(), dim=-1)[:, 0]

    def _own_rows(self, last: torch.Tensor) -> torch.Tensor:
        """[batch, 2] float32: in half precision a logit near 20 would be rounded by a tenth."""
        bias = None if self.bias is None else self.bias.float()
        return torch.nn.functional.linear(last.float(), self.weight.float(), bias)

    def _whole(self, last: torch.Tensor) -> torch.Tensor:
        """The labels' logits by way of all of them, with the cap that Gemma-like models have."""
        logits = self.model.get_output_embeddings()(last)[:, self.label_ids]
        cap = getattr(self.model.config, "final_logit_softcapping", None)
        scale = getattr(self.model.config, "logit_scale", None)
        scaling = getattr(self.model.config, "logits_scaling", None)
        logits = logits * scale if scale else logits / scaling if scaling else logits
        return cap * torch.tanh(logits / cap) if cap else logits

    @torch.inference_mode()
    def _agrees(self) -> bool:
        ids = torch.tensor([[*self.label_ids, self.label_ids[0]]], device=self.model.device)
        own = self.model(input_ids=ids).logits[0, -1, self.label_ids].float()
        last = self.hidden(ids, torch.ones_like(ids))[:, -1]
        tolerance = _CHECK_TOLERANCE.get(self.model.dtype, _OTHER_CHECK_TOLERANCE)
        if torch.allclose(own, self._own_rows(last)[0], **tolerance):
            return True
        if not torch.allclose(own, self._whole(last)[0].float(), **tolerance):
            name = type(self.model).__name__
            raise ValueError(f"{name} makes its logits in a way that this judge does not know")
        return False


def load_model(path: str, dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """(model in eval mode, tokenizer) from a folder, a GGUF file or a hub name; on a GPU if this
    process may see one. `dtype`: None for what suits that device."""
    logging.disable_progress_bar()  # this process shares the server's terminal
    place = Path(path)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # On a CPU half precision is slower and rounds more than the pairs differ.
    dtype = dtype or (torch.float32 if device == "cpu" else torch.bfloat16)
    source, options = path, {}
    if place.is_file():
        source, options = str(place.parent), {"gguf_file": place.name}
    local = place.exists()
    tokenizer = AutoTokenizer.from_pretrained(
        source, local_files_only=local, trust_remote_code=False, **options
    )
    model = AutoModelForCausalLM.from_pretrained(
        source, local_files_only=local, trust_remote_code=False, dtype=dtype, **options
    )
    if "gguf_file" in options:
        # The weights are plain by now; the note that they were not would forbid to save them.
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
    return model.to(device).eval(), tokenizer


def _batches(order: Sequence[int], lengths: Sequence[int], most: int) -> list[list[int]]:
    """Cuts `order` (ascending lengths) so that no padded batch exceeds `most` tokens."""
    batches: list[list[int]] = []
    for place in order:
        if batches and (len(batches[-1]) + 1) * lengths[place] <= most:
            batches[-1].append(place)
        else:
            batches.append([place])
    return batches
