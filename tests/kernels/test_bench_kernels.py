"""What the benchmark counts, what its rivals compute, and what it says without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

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


@pytest.mark.parametrize("spoilt", [0.0, 2e-3, float("nan")])
def test_large_results_are_compared_some_rows_at_a_time(monkeypatch, spoilt: float):
    monkeypatch.setattr(bench_kernels, "COMPARED_ROWS", 4)
    exact = torch.randn(11, 3, 5)
    found = exact.clone()
    found[9, 1, 2] += spoilt
    difference, agrees = bench_kernels.compare(found, exact, 1e-4)
    assert difference == pytest.approx(spoilt, abs=1e-5, nan_ok=True)
    assert agrees == (spoilt == 0)


def test_a_comparison_that_finds_no_memory_is_a_note_and_the_next_one_has_its_number(monkeypatch):
    monkeypatch.setattr(bench_kernels, "median_ms", lambda run: 2.0)
    usual = bench_kernels.compare

    def refuse(found: torch.Tensor, *_: Any) -> None:
        monkeypatch.setattr(bench_kernels, "compare", usual)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(bench_kernels, "compare", refuse)
    case = kernel_cases.label_case(2, torch.float32, "cpu")
    case.runs = {"a rival": case.exact, "ours": case.exact}
    rival, ours = bench_kernels.measure([case])
    assert rival["note"] == "OutOfMemoryError: CUDA out of memory" and ours["agrees"]


def test_nothing_but_the_exact_result_is_held_from_run_to_run_and_nothing_from_case_to_case(
    monkeypatch,
):
    monkeypatch.setattr(bench_kernels, "median_ms", lambda run: float(run().sum()) or 1.0)
    made: list[weakref.ref[torch.Tensor]] = []

    def result() -> torch.Tensor:
        assert [one() for one in made[1:]] == [None] * len(made[1:])
        tensor = torch.ones(3)
        made.append(weakref.ref(tensor))
        return tensor

    def cases() -> Iterator[kernel_cases.Case]:
        for _ in range(2):
            assert all(one() is None for one in made)
            made.clear()
            yield kernel_cases.Case(
                "label_head", {"dtype": "float32"}, 1.0, 1.0, {"a": result, "b": result}, result
            )

    rows = bench_kernels.measure(cases())
    assert [row["agrees"] for row in rows] == [True] * 4


def test_small_cases_are_timed_before_large_ones(monkeypatch):
    def size_of(tree: Any, *_: Any, **__: Any) -> int:
        return tree.total_tokens

    monkeypatch.setattr(kernel_cases, "attention_case", size_of)
    monkeypatch.setattr(kernel_cases, "label_case", lambda *_: 0)
    monkeypatch.setattr(kernel_cases, "pair_case", lambda *_: 0)
    sizes: list[Any] = list(kernel_cases.timed_cases("cpu"))
    assert sizes == sorted(sizes) and sizes.count(0) == 6 and len(sizes) == 15
    assert list(kernel_cases.timed_cases("cpu", sweep=True)) == sizes[6:]


def test_no_rival_is_left_to_a_backend_that_writes_all_scores(monkeypatch):
    """On CUDA the fast ones refuse a mask together with `enable_gqa`."""
    usual, seen = F.scaled_dot_product_attention, []

    def attend(*args: Any, attn_mask: Any = None, enable_gqa: bool = False, **more: Any) -> Any:
        seen.append((attn_mask is not None, enable_gqa))
        return usual(*args, attn_mask=attn_mask, enable_gqa=enable_gqa, **more)

    tree = pack([30], [20, 1, 7], [0, 0, 0])
    case = kernel_cases.attention_case(tree, torch.float32, 64, "cpu", heads=(4, 2))
    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    for name in ("torch, shared", "torch, unshared"):
        case.runs[name]()
    assert {(True, False), (False, True)} == set(seen)


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
