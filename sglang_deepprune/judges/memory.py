"""What a language model judge may take of a device, `--deepprune-judge-mem` MiB in all.

Its weights come first; of the rest a share keeps prefixes, and what is left bounds the tokens of a
packed pass, and so those of a prompt. `check_memory` runs in the server's main process and reads
files alone: their headers tell the size of the weights. In the judge's process `Room` holds the
device to the number and, on a GPU, takes it all at once, before SGLang measures what is free for
its KV pool (`patches/build.py::start_judge_early`): a judge never takes memory that the pool was
given.
"""

from __future__ import annotations

import json
import os
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from sglang_deepprune.config import ConfigError, DeepPruneConfig
from sglang_deepprune.judges import attention

ENV = "DEEPPRUNE_JUDGE_MEM_MIB"
PASS_TOKENS = 8192
MIN_PASS_TOKENS = 512
CACHE_BYTES = 512 << 20
_CONTEXT_BYTES = 512 << 20  # of CUDA itself, which torch does not count
_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Room:
    """How a judge's memory is used, in bytes."""

    weights: int
    cache: int
    pass_tokens: int

    @classmethod
    def of(
        cls, total: int, weights: int, token_bytes: int, *, on_gpu: bool, workspace: int = 0
    ) -> Room:
        """`workspace`: bytes that its attention holds. Raises ValueError, one sentence, where a
        pass of `MIN_PASS_TOKENS` does not fit."""
        left = total - weights - workspace - (_CONTEXT_BYTES if on_gpu else 0)
        cache = max(0, min(CACHE_BYTES, left // 3))
        pass_tokens = min(PASS_TOKENS, (left - cache) // token_bytes)
        if pass_tokens < MIN_PASS_TOKENS:
            least = workspace + needed(weights, token_bytes, MIN_PASS_TOKENS, on_gpu=on_gpu)
            raise ValueError(
                f"this judge needs {-(-least // _MIB)} MiB at least "
                f"({-(-weights // _MIB)} of them weights), not {total // _MIB}"
            )
        return cls(weights, cache, pass_tokens)


def needed(weights: int, token_bytes: int, pass_tokens: int, *, on_gpu: bool) -> int:
    """Bytes for these weights, such passes and a cache of half their size, up to its usual one."""
    working = pass_tokens * token_bytes
    context = _CONTEXT_BYTES if on_gpu else 0
    return weights + working + min(CACHE_BYTES, working // 2 + 3) + context


def token_bytes_of(config: dict[str, Any], item_bytes: int) -> int:
    """Bytes a token of a packed pass takes: keys and values of all layers, twice (as computed and
    as kept), and the widest layer's activations. `config`: a model's config.json."""
    hidden = int(config["hidden_size"])
    heads = int(config["num_attention_heads"])
    kv_heads = int(config.get("num_key_value_heads") or heads)
    head_dim = int(config.get("head_dim") or hidden // heads)
    keys_and_values = int(config["num_hidden_layers"]) * 2 * kv_heads * head_dim
    activations = 3 * int(config.get("intermediate_size") or 4 * hidden) + 8 * hidden
    residual = 8 * hidden if item_bytes < 4 else 0  # float32 beside half precision: `residual.py`
    return item_bytes * (2 * keys_and_values + activations) + residual


def weight_files(path: str | Path) -> list[Path]:
    """What transformers loads of a model's folder, or a GGUF file itself: beside these may lie an
    adapter, or the same weights in another form. Empty where it has no such files. Raises
    where an index cannot be read."""
    place = Path(path)
    if place.is_file():
        return [place]
    whole, index = place / "model.safetensors", place / "model.safetensors.index.json"
    if whole.is_file() or not index.is_file():
        return [whole] if whole.is_file() else []
    names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    return [place / name for name in sorted(set(names))]


def file_bytes(path: str) -> int:
    """Of a model's files; 0 where they are not known, as of what is no path at all."""
    try:
        return sum(file.stat().st_size for file in weight_files(path)) if path else 0
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return 0


def num_weights(path: str | Path) -> int | None:
    """Numbers in a model's files, from their headers; None where they do not say."""
    place = Path(path)
    try:
        if place.is_file():
            from gguf import GGUFReader  # its files hold the sizes in their own form

            return sum(int(tensor.n_elements) for tensor in GGUFReader(place).tensors)
        return sum(map(_in_safetensors, weight_files(place))) or None
    except (ImportError, OSError, ValueError, LookupError, TypeError, AttributeError, struct.error):
        return None


def _in_safetensors(path: Path) -> int:
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(min(size, 100 << 20)))
    return sum(prod(one["shape"]) for name, one in header.items() if name != "__metadata__")


def check_memory(config: DeepPruneConfig, gpu_mib: float | None = None) -> int:
    """MiB that the judge will take of its device; 0: it is not bounded by number. `gpu_mib`: what
    that GPU has, if it is known. Raises ConfigError."""
    name, _, path = config.judge.partition(":")
    on_gpu = config.judge_device != "cpu"
    if name != "llm":
        if config.judge_mem:
            raise ConfigError("judge_mem", f"{name!r} runs no language model here; leave it out")
        return 0
    mib = config.judge_mem
    item_bytes = 2 if on_gpu else 4  # as `llm.load_model` does
    workspace = attention.workspace_bytes(config.judge_attention)
    count = num_weights(path)
    if count is not None:
        try:
            known = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
            token_bytes = token_bytes_of(known, item_bytes)
        except (OSError, ValueError, KeyError, TypeError):
            token_bytes = 1  # a GGUF file's own: the judge's process will know
        if mib:
            try:
                Room.of(
                    mib * _MIB, count * item_bytes, token_bytes, on_gpu=on_gpu, workspace=workspace
                )
            except ValueError as error:
                raise ConfigError("judge_mem", f"{error}; raise it") from error
        elif on_gpu and token_bytes > 1:
            whole = workspace + needed(count * item_bytes, token_bytes, PASS_TOKENS, on_gpu=True)
            mib = -(-whole // _MIB)
    if on_gpu and not mib:
        raise ConfigError(
            "judge_mem", "the size of this judge is not known here; say how many MiB it may take"
        )
    if on_gpu and gpu_mib is not None and mib > 0.9 * gpu_mib:
        raise ConfigError(
            "judge_mem", f"{mib} MiB leave no room for the server on a GPU of {gpu_mib:.0f} MiB"
        )
    return mib


def take(model: Any = None) -> Room | None:
    """In the judge's process: what it may use, None for as much as it likes.

    Without `model`, before one is loaded: on a GPU torch is held to the number. With it: on a GPU
    the rest is allocated and handed back to torch's own cache, so that it is taken from now on.
    Raises ValueError where the model does not fit.
    """
    import torch

    total = int(os.environ.get(ENV) or 0) * _MIB
    if not total:
        return None
    on_gpu = torch.cuda.is_available()
    if model is None:
        if on_gpu:
            whole = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, (total - _CONTEXT_BYTES) / whole))
        return None
    weights = sum(one.numel() * one.element_size() for one in model.parameters())
    item_bytes = next(model.parameters()).element_size()
    token_bytes = token_bytes_of(model.config.to_dict(), item_bytes)
    workspace = attention.workspace_bytes(os.environ.get(attention.ENV, ""))
    room = Room.of(total, weights, token_bytes, on_gpu=on_gpu, workspace=workspace)
    if on_gpu:
        rest = total - _CONTEXT_BYTES - torch.cuda.memory_reserved()
        torch.empty(max(0, rest - 64 * _MIB), dtype=torch.uint8, device="cuda")
    return room
