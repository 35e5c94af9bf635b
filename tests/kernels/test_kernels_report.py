"""Every kernel compiles for three architectures without a card, and leaves room for two blocks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.kernels_report import TARGETS, Target, blocks_per_sm

ROOT = Path(__file__).resolve().parents[2]
NAMES = {"prefix_attention", "label_head", "pair_score, dot", "pair_score, head"}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: Any) -> list[dict[str, Any]]:
    """The report's rows, of a process of its own: interpreted kernels cannot be compiled."""
    pytest.importorskip("triton")
    folder = tmp_path_factory.mktemp("report")
    # An empty cache: what is asserted is this compiler's work.
    environment = {**os.environ, "TRITON_CACHE_DIR": str(folder / "cache")}
    environment.pop("TRITON_INTERPRET", None)
    arguments = ["--dtypes", "bf16", "fp32", "--json", str(folder / "report.json")]
    command = [sys.executable, "-m", "benchmarks.kernels_report", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Kernels compiled ahead of time" in done.stdout
    found: list[dict[str, Any]] = json.loads((folder / "report.json").read_text())["rows"]
    return found


def test_every_kernel_compiles_for_every_target(rows):
    targets = {"sm_80", "sm_90", "sm_100"}
    kinds = {(row["kernel"], row["dtype"], row["head_dim"], row["group"]) for row in rows}
    assert {kernel for kernel, *_ in kinds} == NAMES
    assert {kind[1:] for kind in kinds if kind[0] == "prefix_attention"} == {
        ("bf16", 64, 4), ("bf16", 128, 4), ("bf16", 128, 7), ("fp32", 64, 4), ("fp32", 128, 4),
    }  # fmt: skip
    for kind in kinds:
        own = [r for r in rows if (r["kernel"], r["dtype"], r["head_dim"], r["group"]) == kind]
        assert sorted(row["target"] for row in own) == sorted(targets), kind


def test_nothing_spills_and_two_blocks_fit_a_multiprocessor(rows):
    for row in rows:
        assert row["registers"] > 0, row
        assert row["spill_bytes"] == 0, row
        assert row["blocks_per_sm"] >= 2, row


def test_attention_in_bfloat16_uses_tensor_cores_and_loads_ahead(rows):
    instructions = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma"}
    attention = [row for row in rows if row["kernel"] == "prefix_attention"]
    for row in attention:
        is_bf16 = row["dtype"] == "bf16"
        assert row["matrix"] == (instructions[row["target"]] if is_bf16 else ""), row
        # Keys and values of 64 rows, copied ahead by 128 threads, 16 bytes each.
        at_least = 2 * 64 * row["head_dim"] * 2 // (128 * 16) if is_bf16 else 0
        assert row["async_copies"] >= at_least, row


@pytest.mark.parametrize(
    ("target", "taken", "blocks"),
    [
        (TARGETS[0], (4, 32, 0, 0), 16),  # threads: 2048 / 128
        (TARGETS[0], (1, 16, 0, 0), 32),  # blocks
        (TARGETS[0], (8, 129, 0, 0), 1),  # registers come by 8 a thread: 136 * 256 * 2 > 65536
        (TARGETS[0], (8, 128, 0, 0), 2),
        (TARGETS[0], (4, 32, 81 * 1024, 0), 2),  # 1 KiB a block is the driver's
        (TARGETS[0], (4, 32, 81 * 1024 + 1, 0), 1),
        (TARGETS[1], (4, 32, 81 * 1024 + 1, 0), 2),
        (TARGETS[2], (4, 32, 0, 256), 2),  # tensor memory
    ],
)
def test_blocks_follow_from_the_scarcest_resource(
    target: Target, taken: tuple[int, int, int, int], blocks: int
):
    assert blocks_per_sm(target, *taken) == blocks
