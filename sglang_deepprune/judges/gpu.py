"""The GPU of a judge that runs on one: which it is, and where a server could not share it.

Imports no torch: the server's main process checks here, before any process is started.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass

from sglang_deepprune.config import ConfigError, DeepPruneConfig

VISIBLE = "CUDA_VISIBLE_DEVICES"
PLAIN = "DEEPPRUNE_JUDGE_PLAIN"  # set: no kernel of ours, one has cost this judge its GPU
BALANCE_CHECK = "SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK"
_SMALL_SHARE = 0.05  # of a GPU; SGLang's check begins at a tenth of what is free on another


@dataclass(frozen=True, slots=True)
class ServerGpus:
    """What a judge's neighbour is like."""

    tp_size: int = 1
    dp_size: int = 1
    indices: Collection[int] = ()  # of the server's GPUs on the judge's node, as `cuda:N` counts
    is_balance_checked: bool = True  # SGLang ends a start whose GPUs differ in free memory
    mib: float = 0.0  # of a GPU


def index_of(device: str) -> int:
    """N of `cuda:N`; `cuda` is the first."""
    return int(device.partition(":")[2] or 0)


def visible_gpu(device: str) -> str:
    """What `CUDA_VISIBLE_DEVICES` has to be for a process that is given `cuda:N` alone: N counts
    among the GPUs that this process sees. Raises ConfigError where there is no such one."""
    index = index_of(device)
    shown = os.environ.get(VISIBLE)
    if shown is None:
        return str(index)
    seen = []
    for one in map(str.strip, shown.split(",")):
        if one in ("", "-1"):  # CUDA reads no further
            break
        seen.append(one)
    if index >= len(seen):
        count = f"{len(seen)} GPU{'' if len(seen) == 1 else 's'}"
        raise ConfigError("judge_device", f"no {device!r} here: {VISIBLE} shows the server {count}")
    return seen[index]


def check_neighbours(config: DeepPruneConfig, server: ServerGpus) -> None:
    """Raises ConfigError, one sentence, where a judge on a GPU would break the server's start."""
    if server.dp_size > 1:
        raise ConfigError(
            "judge_device",
            f"with --dp-size {server.dp_size} each rank would start a judge on "
            f"{config.judge_device!r}; use cpu, or remote:URL as judge",
        )
    is_shared = server.tp_size > 1 and index_of(config.judge_device) in server.indices
    is_small = 0 < config.judge_mem <= _SMALL_SHARE * server.mib
    if is_shared and server.is_balance_checked and not is_small:
        raise ConfigError(
            "judge_device",
            f"with --tp-size {server.tp_size} SGLang does not start where a judge takes memory of "
            f"one of its GPUs alone; set {BALANCE_CHECK}=0, or give the judge another GPU",
        )
