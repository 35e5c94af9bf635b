"""Where kernels run, and that none is needed: without triton the references answer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sglang_deepprune.kernels.launch import next_power_of_2, runs_triton

ROOT = Path(__file__).resolve().parents[2]

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # import triton raises ImportError
import torch
from sglang_deepprune.kernels.label_head import label_head
from sglang_deepprune.kernels.pair_score import pair_score
from sglang_deepprune.kernels.prefix_attention import prefix_attention
from sglang_deepprune.kernels.prefix_tree import pack
x = torch.ones(3, 2, 64)
pairs, ends = torch.tensor([[0, 1]]).int(), torch.tensor([0, 1]).int()
print(prefix_attention(x, x, x, pack([2], [1], [0])).sum().item())
print(label_head(x[:, 0], x[0, 0], x[0], ends)[0, 0].exp().item())
print(pair_score(x[:, 0], pairs, ends).means.item())
"""


def run(code: str, **variables: str) -> list[str]:
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=ROOT, env={**clean, **variables}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_without_triton_the_references_answer():
    sums, half, product = map(float, run(WITHOUT_TRITON, TRITON_INTERPRET="1"))
    assert sums == pytest.approx(3 * 2 * 64)
    assert half == pytest.approx(0.5)
    assert product == pytest.approx(64)


@pytest.mark.parametrize("interpret", ["1", "0"])
def test_on_a_cpu_kernels_run_only_in_the_interpreter(interpret: str):
    pytest.importorskip("triton")
    code = (
        "import torch; from sglang_deepprune.kernels.launch import runs_triton;"
        "print(runs_triton(torch.ones(1)))"
    )
    assert run(code, TRITON_INTERPRET=interpret) == [str(interpret == "1")]


def test_the_interpreter_is_on_for_these_tests_and_off_where_there_is_a_gpu():
    pytest.importorskip("triton")
    assert runs_triton(torch.ones(1)) != torch.cuda.is_available()


def test_blocks_are_powers_of_two():
    assert [next_power_of_2(n) for n in (1, 2, 3, 8, 9)] == [1, 2, 4, 8, 16]
