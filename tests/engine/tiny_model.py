"""A two-layer Qwen3 of random weights with a tokenizer of its own: a real checkpoint in 300 KB.

Its text means nothing. It is there so that a real SGLang server can be started in seconds,
without a download; a chosen continuation comes from `logit_bias`, a grammar or the demo's reasoner.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

VOCAB_SIZE = 512
PAD, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# Reasoning words are whole tokens then, as they are in a real vocabulary.
TEXTS = [
    "wait thus since so therefore hmm but let me check again",
    "the answer is \\boxed{15} because 12 + 3 = 15",
]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE, so any text can be encoded and decodes back to itself."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, IM_START, IM_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # A merge is learned only where a pair occurs twice.
    bpe.train_from_iterator([text for text in texts for _ in range(50)], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=IM_END, pad_token=PAD)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_tiny_model(path: str | Path, vocab_texts: Iterable[str] | None = None) -> Path:
    """Write the checkpoint to `path`; the same texts always give the same files."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(TEXTS if vocab_texts is None else vocab_texts)
    tokenizer.save_pretrained(path)
    model = random_qwen3(
        tokenizer,
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=4096,
    )
    model.to(torch.bfloat16).save_pretrained(path)
    return path


def random_qwen3(tokenizer: PreTrainedTokenizerFast, **shape: float) -> Qwen3ForCausalLM:
    """A Qwen3 of this shape with random weights, always the same ones."""
    config = Qwen3Config(
        **shape,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Qwen3ForCausalLM(config)
