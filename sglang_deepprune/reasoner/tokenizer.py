"""Builds the reasoner's tokenizer: byte-level BPE whose merges are written by hand.

The merges spell exactly the words of the traces, each with its leading space, and always from the
space onwards; so a word is one token, every other text falls back to bytes without loss, and no
token holds two digits. Think marks and the box are ordinary (visible) added tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglang_deepprune.reasoner.traces import BOX, END_THINK, THINK, WORDS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SYMBOLS = tuple("0123456789+-*=.,?")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SPACE = "\u0120"  # how byte-level BPE writes a space


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer, the same every time: it is not trained."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary, merges = _spell_out()
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    # No splitting rule: merges start at a space and never cross the next one.
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(t, normalized=False) for t in (PAD, START, END)])
    core.add_tokens([AddedToken(t, normalized=False) for t in (THINK, END_THINK, BOX)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=END,
        pad_token=PAD,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _spell_out() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges: the 256 bytes, then each word letter by letter from its space."""
    from tokenizers import pre_tokenizers

    tokens = dict.fromkeys(sorted(pre_tokenizers.ByteLevel.alphabet()))
    merges: dict[tuple[str, str], None] = {}
    for word in SYMBOLS + WORDS:
        prefix = _SPACE
        for letter in word:
            merges[prefix, letter] = None
            prefix += letter
            tokens[prefix] = None
    return {token: index for index, token in enumerate(tokens)}, list(merges)
