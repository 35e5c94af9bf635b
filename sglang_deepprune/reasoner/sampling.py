"""Samples traces from a reasoner checkpoint in one process, without a server.

Owns a batched decode loop with a key/value cache: prompts are padded on the left, rows that have
ended leave the batch. Plain temperature-1 sampling and nothing else; serving is SGLang's work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# Rows that have ended are dropped once they are this share of the batch: dropping copies the cache.
_DROP_SHARE = 0.15


@dataclass(frozen=True, slots=True)
class Sample:
    """One sampled trace: its text without the end mark, and how it ended."""

    text: str
    num_tokens: int
    is_ended: bool


def load(path: str, dtype: str = "float32") -> tuple[Any, Any]:
    """Model and tokenizer of a checkpoint folder, computing in `dtype`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
    return model.eval(), AutoTokenizer.from_pretrained(path)


def render(tokenizer: Any, prompt: str) -> str:
    """The question as the chat endpoint would send it."""
    message = [{"role": "user", "content": prompt}]
    return str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))


def sample(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    max_tokens: int = 1200,
    temperature: float = 1.0,
) -> list[Sample]:
    """One trace a prompt, in the order of the prompts; temperature 0 is greedy."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    batch = tokenizer(list(prompts), padding=True, padding_side="left", return_tensors="pt")
    with torch.inference_mode():
        tokens = _decode(model, batch, generator, max_tokens, temperature, tokenizer.eos_token_id)
    return [_finish(tokenizer, row) for row in tokens]


def _decode(
    model: Any, batch: Any, generator: Any, max_tokens: int, temperature: float, eos: int
) -> list[list[int]]:
    """The generated ids of each row, the end mark included where one came."""
    import torch

    ids, mask = batch["input_ids"], batch["attention_mask"]
    tokens: list[list[int]] = [[] for _ in range(len(ids))]
    rows = torch.arange(len(ids))
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = None
    for _ in range(max_tokens):
        output = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = output.past_key_values
        drawn = _draw(output.logits[:, -1], generator, temperature)
        for row, token in zip(rows.tolist(), drawn.tolist(), strict=True):
            if not tokens[row] or tokens[row][-1] != eos:
                tokens[row].append(token)
        live = torch.tensor([tokens[row][-1] != eos for row in rows.tolist()])
        if not live.any():
            break
        positions, ids = positions[:, -1:] + 1, drawn[:, None]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        if 1 - live.float().mean().item() > _DROP_SHARE:
            cache.batch_select_indices(live.nonzero()[:, 0])
            rows, ids, mask, positions = rows[live], ids[live], mask[live], positions[live]
    return tokens


def _draw(logits: torch.Tensor, generator: Any, temperature: float) -> torch.Tensor:
    """Next ids, [rows] int64, from logits [rows, vocabulary]."""
    import torch

    if temperature == 0:
        return logits.argmax(-1)
    probabilities = torch.softmax(logits.float() / temperature, dim=-1)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


def _finish(tokenizer: Any, row: list[int]) -> Sample:
    is_ended = bool(row) and row[-1] == tokenizer.eos_token_id
    text = tokenizer.decode(row[:-1] if is_ended else row)
    return Sample(str(text), len(row), is_ended)
