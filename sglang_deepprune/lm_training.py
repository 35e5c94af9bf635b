"""`sglang-deepprune train-judge --base MODEL`: fine-tunes a causal LM to judge pairs (section 4.1).

The model reads what `llm` reads at run time (`judges/lm_prompt.py`) and is trained on the label
token alone: binary focal loss on the difference of the two labels' logits, the rarer label shown
`oversample` times. transformers' Trainer runs it; with `--lora R` only low-rank adapters learn, and
they are merged into the weights that are saved. Seeded; a run that was stopped goes on from its
last checkpoint.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from sglang_deepprune.judges.llm import load_model
from sglang_deepprune.judges.lm_prompt import PromptWriter, Settings, load_settings, save_settings
from sglang_deepprune.lm_recipe import Recipe, recipe_of
from sglang_deepprune.pairs import Labelled, labelled
from sglang_deepprune.traces import Question, truncate
from sglang_deepprune.types import Pair

_BYTES = {torch.float32: 4, torch.bfloat16: 2, torch.float16: 2}


def focal_loss(
    logits: torch.Tensor, labels: torch.Tensor, gamma: float = 2.0, alpha: float = 0.5
) -> torch.Tensor:
    """Mean of alpha_t (1 - p_t)^gamma (-log p_t) (Lin et al., 2017).

    Parameters
    ----------
    logits : torch.Tensor
        [batch] float, log-odds of "the same answer".
    labels : torch.Tensor
        [batch] float or bool, 1 = the same answer.
    """
    labels = labels.to(logits.dtype)
    bce = functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    p_true = torch.exp(-bce)
    weight = alpha * labels + (1 - alpha) * (1 - labels)
    return (weight * (1 - p_true) ** gamma * bce).mean()


def examples(
    questions: Sequence[Question], prompts: PromptWriter, recipe: Recipe
) -> list[dict[str, Any]]:
    """Token ids and label of every pair that is shown, the rarer label `oversample` times."""
    rng = np.random.default_rng(recipe.seed)
    chosen: list[Labelled] = []
    for place in range(len(questions)):
        own = list(labelled(questions, place))
        if len(own) > recipe.pairs_a_question:
            kept = rng.choice(len(own), recipe.pairs_a_question, replace=False)
            own = [own[i] for i in sorted(kept)]
        chosen += own
    num_same = sum(pair.is_same for pair in chosen)
    if not 0 < num_same < len(chosen):
        raise ValueError("all pairs have the same label; training needs answers that differ")
    is_same_rare = num_same * 2 < len(chosen)
    rows = []
    for pair in chosen:
        traces = questions[pair.question].traces
        left, right = (truncate(traces[i], recipe.cut, i) for i in (pair.left, pair.right))
        (prompt,) = prompts.write([Pair(left, right)])
        row = {"input_ids": [*prompt.prefix, *prompt.rest], "labels": float(pair.is_same)}
        rows += [row] * (recipe.oversample if pair.is_same == is_same_rare else 1)
    return rows


class JudgeTrainer(Trainer):
    """The loss of the label token; everything else is transformers'."""

    def __init__(self, recipe: Recipe, label_ids: tuple[int, int], **kwargs: Any):
        super().__init__(**kwargs)
        self.recipe = recipe
        self.label_ids = list(label_ids)

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        labels = inputs["labels"]
        logits = model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
        ).logits  # [batch, length, vocab]
        last = inputs["attention_mask"].sum(dim=1) - 1
        rows = logits[torch.arange(len(last), device=logits.device), last][:, self.label_ids]
        odds = (rows[:, 0] - rows[:, 1]).float()
        gamma, alpha = (self.recipe.gamma, self.recipe.alpha) if self.recipe.is_focal else (0, 0.5)
        loss = focal_loss(odds, labels, gamma, alpha)
        return (loss, {"odds": odds}) if return_outputs else loss


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Padded on the right; the pad token is masked, so its value does not matter."""
    ids = [torch.tensor(row["input_ids"]) for row in rows]
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(ids, batch_first=True),
        "attention_mask": pad([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }


def memory_estimate(model: Any, recipe: Recipe, longest: int) -> int:
    """Bytes: weights, gradients and AdamW's two moments of what learns, and one layer's activations
    a checkpointed layer plus the logits of one batch."""
    own = sum(p.numel() * p.element_size() for p in model.parameters())
    learns = sum(p.numel() for p in model.parameters() if p.requires_grad)
    config = model.config
    width = int(config.hidden_size)
    tokens = recipe.batch * longest
    size = _BYTES.get(model.dtype, 4)
    activations = tokens * width * size * (int(config.num_hidden_layers) + 34)
    logits = tokens * int(config.vocab_size) * (size + 4)
    return int(own + learns * 12 + activations + logits)


def train(
    questions: Sequence[Question], base: str, output: str | Path, recipe: Recipe
) -> dict[str, Any]:
    """Fine-tune `base`, save a folder that `llm:OUTPUT` loads. Returns what was done."""
    torch.manual_seed(recipe.seed)
    model, tokenizer = load_model(base)
    settings = load_settings(base if Path(base).is_dir() else None)
    limit = int(getattr(model.config, "max_position_embeddings", 1 << 30))
    prompts = PromptWriter(tokenizer, settings, limit)
    rows = examples(questions, prompts, recipe)
    if recipe.lora:
        model = _with_lora(model, recipe)
    longest = max(len(row["input_ids"]) for row in rows)
    estimate = memory_estimate(model, recipe, longest)
    print(f"{len(rows)} examples, longest {longest} tokens, about {estimate / 2**30:.1f} GiB")
    output = Path(output)
    trainer = JudgeTrainer(
        recipe, prompts.label_ids, model=model, args=_arguments(output, recipe),
        train_dataset=rows, data_collator=collate,
    )  # fmt: skip
    work, run_file = output / "checkpoints", output / "checkpoints" / "run.json"
    told = _fingerprint(rows, base, recipe)
    is_same = run_file.is_file() and run_file.read_text() == told
    if not is_same:
        shutil.rmtree(work, ignore_errors=True)  # of other data or another recipe
    work.mkdir(parents=True, exist_ok=True)
    run_file.write_text(told)
    last = get_last_checkpoint(str(work))
    result = trainer.train(resume_from_checkpoint=last)
    model = model.merge_and_unload() if recipe.lora else model
    _save(output, model, tokenizer, settings, recipe)
    shutil.rmtree(work)  # a finished run is not resumed, it is run again
    return {"examples": len(rows), "loss": result.training_loss, "steps": result.global_step}


def _fingerprint(rows: Sequence[Mapping[str, Any]], base: str, recipe: Recipe) -> str:
    """What a checkpoint must have in common with a run that goes on from it."""
    data = hashlib.sha256()
    for row in rows:
        data.update(repr(row).encode())
    body = {name: getattr(recipe, name) for name in Recipe.__slots__}
    return json.dumps({"base": base, "examples": data.hexdigest(), **body})


def _with_lora(model: Any, recipe: Recipe) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(
        model,
        LoraConfig(
            r=recipe.lora, lora_alpha=2 * recipe.lora, lora_dropout=0.05,
            target_modules="all-linear", task_type="CAUSAL_LM",
        ),
    )  # fmt: skip


def _arguments(output: Path, recipe: Recipe) -> TrainingArguments:
    has_gpu = torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(output / "checkpoints"), num_train_epochs=recipe.epochs,
        per_device_train_batch_size=recipe.batch, learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine", warmup_steps=10, weight_decay=0.01, seed=recipe.seed,
        data_seed=recipe.seed, bf16=has_gpu, gradient_checkpointing=has_gpu, use_cpu=not has_gpu,
        save_strategy="steps", save_steps=200, save_total_limit=1, logging_steps=20,
        report_to=[], remove_unused_columns=False, dataloader_num_workers=0,
    )  # fmt: skip


def _save(output: Path, model: Any, tokenizer: Any, settings: Settings, recipe: Recipe) -> None:
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    save_settings(output, settings)
    body = {name: getattr(recipe, name) for name in Recipe.__slots__}
    (output / "training.json").write_text(json.dumps(body, indent=2) + "\n")


def run(args: argparse.Namespace, questions: Sequence[Question]) -> int:
    """The command, once the recording is read."""
    try:
        recipe = recipe_of(args)
        done = train(questions, args.base, args.output, recipe)
    except (ValueError, OSError, ImportError) as error:
        print(f"sglang-deepprune train-judge: {error}", file=sys.stderr)
        return 2
    print(f"{done['examples']} examples, {done['steps']} steps, loss {done['loss']:.3f}")
    return 0
