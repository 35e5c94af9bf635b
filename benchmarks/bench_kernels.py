"""Time of the kernels on a GPU: correctness first, then the median beside PyTorch and FlashInfer.

Small shapes are checked in float64 and end the run where one does not agree; real shapes against
PyTorch in their own precision, and one that does not agree, or a kernel of ours that fails, is told
by the exit status once all are measured. Each time is the median over CUDA events, with L2 filled
with something else before each run. TB/s and TFLOP/s count the least work there is
(`kernel_cases`), so that a rival that does more of it is not flattered. Without a GPU nothing is
timed; `--interpret` then runs the correctness pass alone.

    python -m benchmarks.bench_kernels --json benchmarks/results/bench_kernels.json
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import Row, print_table, write_json

TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 1e-2}
WARM_UPS, RUNS = 3, 20
L2_BYTES = 256 << 20  # more than any card's
COMPARED_ROWS = 1 << 14  # at a time: the largest result has a million, 16.8 GB in float32


def check(cases: Any) -> list[Row]:
    """One row a case: the largest error over the tolerance, absolute and relative together."""
    rows = []
    for case in cases:
        exact = case.exact().double()
        error = (case.runs["ours"]().double() - exact).abs()
        tolerance = TOLERANCE[case.shape["dtype"]]
        ratio = float((error / (tolerance * (1 + exact.abs()))).max())
        rows.append({
            "kernel": case.kernel, **case.shape, "max_error": float(error.max()),
            "tolerance": tolerance, "agrees": ratio <= 1,
        })  # fmt: skip
    return rows


def median_ms(run: Callable[[], torch.Tensor]) -> float:
    """Median time on the card, cold L2."""
    flush = torch.empty(L2_BYTES, dtype=torch.uint8, device="cuda")
    for _ in range(WARM_UPS):
        run()
    spans = []
    for _ in range(RUNS):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        spans.append((begin, end))
    torch.cuda.synchronize()
    return float(statistics.median(begin.elapsed_time(end) for begin, end in spans))


def measure(cases: Any, keep: Callable[[list[Row]], object] = lambda rows: None) -> list[Row]:
    """One row a case and implementation; one that cannot run says why in `note`. `keep` gets the
    rows so far after each case: what is measured outlives a case that ends the process."""
    rows: list[Row] = []
    for case in cases:
        rows += measure_case(case)
        keep(rows)
        del case  # its tensors: the next one's are made now
    return rows


def measure_case(case: Any) -> list[Row]:
    """Of what was computed, only `exact` is held while another is measured."""
    rows: list[Row] = []
    exact: torch.Tensor | None = None
    for name, run in case.runs.items():
        row = {"kernel": case.kernel, **case.shape, "by": name}
        try:
            exact = case.exact() if exact is None else exact
            difference, agrees = compare(run(), exact, TOLERANCE[case.shape["dtype"]])
            time = median_ms(run)
        except Exception as failure:  # a rival's refusal, or blocks that a card cannot hold
            rows.append({**row, "note": f"{type(failure).__name__}: {failure}".split("\n")[0]})
            continue
        finally:
            torch.cuda.empty_cache()  # blocks of one's sizes may not fit another's
        rows.append({
            **row, "ms": time, "tb_per_s": case.num_bytes / time / 1e9,
            "tflop_per_s": case.flops / time / 1e9, "max_difference": difference,
            "agrees": agrees,
        })  # fmt: skip
    absent = case.notes.items()
    return rows + [{"kernel": case.kernel, **case.shape, "by": n, "note": w} for n, w in absent]


def compare(found: torch.Tensor, exact: torch.Tensor, tolerance: float) -> tuple[float, bool]:
    """(largest difference, whether each is within the tolerance), both NaN and no where one is."""
    largest, is_near = [], True
    for own, wanted in zip(found.split(COMPARED_ROWS), exact.split(COMPARED_ROWS), strict=True):
        wanted = wanted.float()
        error = (own.float() - wanted).abs()
        largest.append(error.max())
        is_near &= bool((error <= tolerance * (1 + wanted.abs())).all())
    return float(torch.stack(largest).max()), is_near


def is_good(rows: list[Row]) -> bool:
    """Whether all that ran agree, and ours ran everywhere."""
    return all(row["agrees"] if "agrees" in row else row["by"] != "ours" for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--interpret", action="store_true", help="correctness alone, on a CPU")
    parser.add_argument("--sweep", action="store_true", help="attention at other sizes of block")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    has_gpu = torch.cuda.is_available() and not args.interpret
    if not has_gpu and not args.interpret:
        print("No GPU is here, so no kernel is timed; --interpret checks them.", file=sys.stderr)
        return 2
    if args.interpret:
        # Before triton is first imported: its own functions are interpreted or not from then on.
        os.environ["TRITON_INTERPRET"] = "1"
    from benchmarks import kernel_cases

    device = "cuda" if has_gpu else "cpu"
    # The interpreter multiplies bfloat16 by its bit patterns (Triton 3.6).
    dtypes = [torch.float32, torch.float16, *([torch.bfloat16] if has_gpu else [])]
    rows = check(kernel_cases.small_cases(device, dtypes))
    print_table(rows, "Against float64")
    if not all(row["agrees"] for row in rows):
        print("A kernel does not agree with its reference.", file=sys.stderr)
        return 1
    card = torch.cuda.get_device_name() if has_gpu else "none: Triton's interpreter"

    def keep(rows: list[Row]) -> None:
        if args.json:
            write_json(args.json, "bench_kernels", rows, gpu=card)

    if has_gpu:
        rows = measure(kernel_cases.timed_cases(device, sweep=args.sweep), keep)
        print_table(rows, f"Median of {RUNS} runs on one {card}, cold L2")
        if not is_good(rows):
            print("A kernel failed or does not agree at a real shape.", file=sys.stderr)
            return 1
    else:
        keep(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
