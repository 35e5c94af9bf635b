"""Trains the embedded reasoner from scratch: `python -m sglang_deepprune.reasoner.train --out DIR`.

Owns the model's shape, the training mixture and the schedule; writes an ordinary checkpoint folder.
Traces are made on the fly, so there is no data set. Runs end by the clock (`--minutes`), or with
`--steps` after a fixed number of steps, which is what makes a run repeatable to the bit on one
machine. Loss is taken on the trace only, never on the question.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_deepprune.reasoner.questions import DIFFICULTIES, draw
from sglang_deepprune.reasoner.tokenizer import END, PAD, build_tokenizer
from sglang_deepprune.reasoner.traces import write_trace

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

# Muon for the matrices: at equal time it reached half the loss that AdamW alone did.
MUON_RATE, ADAM_RATE = 0.02, 4e-3
BATCH_TOKENS = 2560  # padded tokens in a batch
POOL = 512  # traces sorted by length before they are cut into batches
MAX_POSITIONS = 2048
SLIP, MISSED = 0.03, 0.2  # wrong steps in the training traces, and how many of them go unseen
RAW_SHARE = 0.25  # traces that follow the bare question, without the chat template
# Share of each level in training, at the start and at the end: short traces teach arithmetic first.
FIRST_MIX = (0.96, 0.04, 0.0, 0.0)
LAST_MIX = (0.25, 0.3, 0.3, 0.15)
CURRICULUM = 0.4  # the mixture moves during this first part of the run


def build_model(vocabulary: int, pad_id: int, eos_id: int) -> Qwen3ForCausalLM:
    """A Qwen3 with random weights, its vocabulary padded to a multiple of 64 for SGLang."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=-(-vocabulary // 64) * 64,
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=eos_id,
        pad_token_id=pad_id,
    )
    return Qwen3ForCausalLM(config)


class TraceStream:
    """An endless, seeded supply of training batches, bucketed by length."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        self.tokenizer = tokenizer
        self.rng = random.Random(seed)
        self.progress = 0.0  # of the run, set by the loop; moves the mixture

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        while True:
            examples = sorted(self._examples(), key=lambda example: len(example[0]))
            batches = list(_cut(examples))
            self.rng.shuffle(batches)
            for batch in batches:
                yield self._tensors(batch)

    def _examples(self) -> list[tuple[list[int], int]]:
        """POOL pairs of token ids and how many of them belong to the question."""
        share = min(self.progress / CURRICULUM, 1.0)
        mix = [a + (b - a) * share for a, b in zip(FIRST_MIX, LAST_MIX, strict=True)]
        prompts, traces = [], []
        for level in self.rng.choices(DIFFICULTIES, mix, k=POOL):
            question = draw(self.rng, level)
            prompts.append(self._render(question.prompt))
            traces.append(write_trace(question, self.rng, slip=SLIP, missed=MISSED) + END)
        heads = self.tokenizer(prompts)["input_ids"]
        tails = self.tokenizer(traces)["input_ids"]
        return [(head + tail, len(head)) for head, tail in zip(heads, tails, strict=True)]

    def _render(self, prompt: str) -> str:
        if self.rng.random() < RAW_SHARE:
            return prompt
        return f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"

    def _tensors(self, batch: list[tuple[list[int], int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and targets, both [batch, length] int64; targets are -100 where no loss is taken."""
        import torch

        width = max(len(ids) for ids, _ in batch)
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([row + [pad] * (width - len(row)) for row, _ in batch])
        targets = torch.tensor(
            [[-100] * head + row[head:] + [-100] * (width - len(row)) for row, head in batch]
        )
        return ids[:, :-1], targets[:, 1:]


def _cut(examples: list[tuple[list[int], int]]) -> Iterator[list[tuple[list[int], int]]]:
    """Batches of neighbours in length, each within BATCH_TOKENS once padded."""
    batch: list[tuple[list[int], int]] = []
    for example in examples:
        if batch and (len(batch) + 1) * len(example[0]) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(example)
    yield batch


def schedule(progress: float) -> float:
    """Share of the peak rate: warm-up over 3 % of the run, then a cosine down to 2 %."""
    warm = min(progress / 0.03, 1.0)
    return warm * (0.02 + 0.98 * (1 + math.cos(math.pi * min(progress, 1.0))) / 2)


def build_optimizers(model: Any) -> list[Any]:
    """Muon for the layers' matrices, AdamW for the embedding and the norms."""
    import torch

    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in named if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=MUON_RATE, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(others, lr=ADAM_RATE, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def train(minutes: float, seed: int, steps: int | None = None) -> tuple[Any, Any, dict[str, Any]]:
    """Train a reasoner; the model, its tokenizer, and what the card says about the run."""
    import torch
    from torch.optim.lr_scheduler import LambdaLR
    from tqdm import tqdm

    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    model = build_model(len(tokenizer), tokenizer.pad_token_id, tokenizer.eos_token_id)
    stream = TraceStream(tokenizer, seed)
    optimizers = build_optimizers(model)
    rates = [LambdaLR(one, lambda _: schedule(stream.progress)) for one in optimizers]
    started, done, average = time.monotonic(), 0, 0.0
    with tqdm(total=steps or round(minutes * 60), unit="step" if steps else "s") as bar:
        for ids, targets in stream:
            elapsed = time.monotonic() - started
            stream.progress = done / steps if steps else elapsed / (minutes * 60)
            if stream.progress >= 1:
                break
            loss = _step(model, optimizers, ids, targets)
            for rate in rates:
                rate.step()
            done += 1
            average += (loss - average) * max(0.02, 1 / done)
            bar.update((done if steps else round(elapsed)) - bar.n)
            bar.set_postfix(step=done, loss=f"{average:.4f}", refresh=False)
    run = {
        "date": date.today().isoformat(),
        "seed": seed,
        "steps": done,
        "training_minutes": round((time.monotonic() - started) / 60, 1),
        "threads": torch.get_num_threads(),
        "loss": round(average, 4),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    return model, tokenizer, run


def _step(model: Any, optimizers: list[Any], ids: Any, targets: Any) -> float:
    import torch
    from torch.nn.functional import cross_entropy

    # Rows are padded on the right, so the causal mask alone keeps padding out.
    logits = model(input_ids=ids, use_cache=False).logits
    loss = cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
    model.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
    return float(loss.detach())


def save(out: Path, model: Any, tokenizer: Any, run: dict[str, Any]) -> None:
    """Write the checkpoint folder, with the settings a server samples by and the run's card."""
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        eos_token_id=tokenizer.convert_tokens_to_ids(END),
        pad_token_id=tokenizer.convert_tokens_to_ids(PAD),
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "training.json").write_text(json.dumps(run, indent=2) + "\n")


def main() -> None:
    """Command line of the training run."""
    parser = argparse.ArgumentParser(description="Train the embedded reasoner.")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint folder to write")
    parser.add_argument("--minutes", type=float, default=24.0, help="length of the run")
    parser.add_argument("--steps", type=int, help="length of the run in steps instead")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    save(args.out, *train(args.minutes, args.seed, args.steps))


if __name__ == "__main__":
    main()
