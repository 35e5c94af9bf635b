"""What the benchmark counts, what its rivals compute, and what it says without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import bench_kernels, kernel_cases
from sglang_deepprune.kernels.prefix_tree import pack
from tests import fake_flashinfer
from tests.kernels.test_prefix_attention import full_mask

ROOT = Path(__file__).resolve().parents[2]


def test_without_a_gpu_nothing_is_timed():
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "benchmarks.bench_kernels"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "No GPU is here, so no kernel is timed; --interpret checks them.\n"


def test_flops_and_bytes_are_those_of_the_mask():
    tree = pack([11, 0, 5], [3, 8, 1], [0, 0, 2])
    flops, num_bytes = kernel_cases.attention_work(tree, 8, 2, 64, 2)
    assert flops == 2 * 2 * 64 * 8 * int(full_mask(tree).sum())  # two products, two a multiply-add
    assert num_bytes == 2 * 64 * tree.total_tokens * (8 + 8 + 2 + 2)


def test_the_small_cases_agree_and_a_wrong_kernel_would_not(device):
    cases = list(kernel_cases.small_cases(device, [torch.float32]))
    assert {case.kernel for case in cases} == {"prefix_attention", "label_head", "pair_score"}
    assert all(row["agrees"] for row in bench_kernels.check(cases))
    for case in cases:
        wrong = case.runs["ours"]() * 1.001
        case.runs["ours"] = partial(torch.clone, wrong)
    assert not any(row["agrees"] for row in bench_kernels.check(cases))


def test_a_pass_with_kept_prefixes_is_among_the_small_cases():
    trees = [case.shape for case in kernel_cases.small_cases("cpu", [torch.float32])]
    (cached,) = [shape for shape in trees if shape.get("cached")]
    assert cached["tokens"] >= 300
    tree = pack([150, 40], [70, 3, 45], [0, 0, 1])
    case = kernel_cases.attention_case(
        tree, torch.float32, 128, "cpu", heads=(8, 2), exact=torch.float64, is_cached=True
    )
    assert case.exact().shape == (tree.num_child_tokens, 8, 128)


def test_a_wrong_or_failing_kernel_at_a_real_shape_fails_the_run_after_it_is_written(monkeypatch):
    monkeypatch.setattr(bench_kernels, "median_ms", lambda run: 2.0)
    monkeypatch.setattr(kernel_cases, "is_flashinfer_installed", lambda: False)

    def refuse() -> torch.Tensor:
        raise RuntimeError("out of memory")

    def rows_of(**changes: Any) -> list[dict[str, Any]]:
        case = kernel_cases.attention_case(pack([6], [2], [0]), torch.float32, 64, "cpu")
        case.runs = {"ours": case.exact, "torch, shared": case.exact}
        for name, run in changes.items():
            if name == "exact":
                case.exact = run
            else:
                case.runs[name] = run
        kept: list[int] = []
        rows = bench_kernels.measure([case, case], lambda rows: kept.append(len(rows)))
        assert kept == [len(rows) // 2, len(rows)]
        return rows

    right = kernel_cases.attention_case(pack([6], [2], [0]), torch.float32, 64, "cpu").exact()
    assert bench_kernels.is_good(rows_of())
    assert bench_kernels.is_good(rows_of(rival=refuse))
    assert not bench_kernels.is_good(rows_of(ours=refuse))
    assert not bench_kernels.is_good(rows_of(ours=lambda: right + 1e-3))
    assert not bench_kernels.is_good(rows_of(ours=lambda: right * float("nan")))
    assert not bench_kernels.is_good(rows_of(exact=refuse))


def test_the_rivals_compute_the_same(monkeypatch):
    monkeypatch.setitem(sys.modules, "flashinfer", fake_flashinfer.module())
    tree = pack([30], [20, 1, 7], [0, 0, 0])
    case = kernel_cases.attention_case(tree, torch.float32, 64, "cpu", heads=(4, 2))
    exact = case.exact()
    assert set(case.runs) == {"ours", "torch, shared", "torch, unshared", "flashinfer"}
    for name in ("torch, shared", "torch, unshared", "flashinfer"):
        torch.testing.assert_close(case.runs[name](), exact, atol=1e-5, rtol=1e-5)


def test_a_rival_that_cannot_run_says_why(monkeypatch):
    tree = pack([6], [2], [0])
    monkeypatch.setattr(kernel_cases, "is_flashinfer_installed", lambda: False)
    monkeypatch.setattr(kernel_cases, "MAX_COPY_BYTES", 0.0)
    monkeypatch.setattr(bench_kernels, "median_ms", lambda run: 2.0)
    case = kernel_cases.attention_case(tree, torch.float32, 64, "cpu", heads=(2, 1))

    def refuse() -> torch.Tensor:
        raise RuntimeError("no such card\nat all")

    case.runs = {"ours": case.exact, "torch, shared": refuse}
    ours, *others = bench_kernels.measure([case])
    assert ours["max_difference"] == 0
    assert ours["tflop_per_s"] == pytest.approx(case.flops / 2e-3 / 1e12)
    assert ours["tb_per_s"] == pytest.approx(case.num_bytes / 2e-3 / 1e12)
    assert {row["by"]: row["note"] for row in others} == {
        "torch, shared": "RuntimeError: no such card",
        "torch, unshared": "its copies take 0 GB",
        "flashinfer": "not installed",
    }
