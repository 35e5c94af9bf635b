"""What each kernel takes of a multiprocessor, compiled ahead of time; no GPU is needed.

Triton compiles for a target that is not there, and its wheel brings ptxas. Registers and spills are
what ptxas says of the kernel's PTX, shared and tensor memory what Triton will ask for at launch;
blocks a multiprocessor follow from each target's limits. Whether a kernel is fast is not said here.

    python -m benchmarks.kernels_report --json benchmarks/results/kernels_report.json
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import Row, print_table, write_json
from sglang_deepprune.kernels import label_head, pair_score, prefix_attention
from sglang_deepprune.kernels.launch import next_power_of_2
from sglang_deepprune.kernels.prefix_tree import TILE_FIELDS

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
NUM_LABELS = 2
EMBEDDING = 384


@dataclass(frozen=True, slots=True)
class Target:
    """Limits of one multiprocessor, from NVIDIA's table of compute capabilities."""

    capability: int
    shared_bytes: int  # of all blocks together
    threads: int = 2048
    blocks: int = 32
    registers: int = 65536
    tensor_columns: int = 0  # of tensor memory


TARGETS = (
    Target(80, 164 * 1024),
    Target(90, 228 * 1024),
    Target(100, 228 * 1024, tensor_columns=512),
)
# The driver keeps this much of each block's shared memory for itself.
RESERVED_SHARED = 1024
REGISTER_UNIT = 256  # registers are given to a warp in multiples of this


@dataclass(frozen=True, slots=True)
class Build:
    """One kernel with the constants of one launch."""

    kernel: str
    function: Any
    dtype: str
    signature: dict[str, str]
    constants: dict[str, Any]
    warps: int
    stages: int
    head_dim: int | None = None
    group: int | None = None  # query heads that share a KV head


def builds(dtypes: list[str], groups: list[int]) -> Iterator[Build]:
    """Every kernel as its launcher calls it; `groups`: the first in full, of the others what a
    judge on a GPU runs."""
    for dtype in dtypes:
        for head_dim in prefix_attention.HEAD_DIMS:
            is_usual = (dtype, head_dim) == ("bf16", 128)
            for group in groups if is_usual else groups[:1]:
                yield _attention(dtype, head_dim, group)
        yield _labels(dtype)
        for has_head in (False, True):
            yield _pairs(dtype, has_head)


def _attention(dtype: str, head_dim: int, group: int) -> Build:
    blocks = prefix_attention.choose_blocks(head_dim, DTYPES[dtype])
    constants = {
        "GROUP": group, "HEAD_DIM": head_dim, "ROWS": blocks.rows, "KEYS": blocks.keys,
        "FIELDS": TILE_FIELDS,
    }  # fmt: skip
    signature = dict.fromkeys("q k v out".split(), f"*{dtype}")
    signature |= {"tiles": "*i32", "segment_starts": "*i32", "scale_log2": "fp32"}
    signature |= {"first_tile": "i32", "skipped": "i32"}
    for name in "q k v out".split():
        signature |= {f"{name}_row_stride": "i32", f"{name}_head_stride": "i32"}
    function = prefix_attention.prefix_attention_kernel
    return Build(
        "prefix_attention", function, dtype, signature, constants, blocks.warps, blocks.stages,
        head_dim, group,
    )  # fmt: skip


def _labels(dtype: str) -> Build:
    signature = dict.fromkeys("hidden norm_weight label_rows".split(), f"*{dtype}")
    signature |= {"last_indices": "*i32", "out": "*fp32", "eps": "fp32"}
    integers = "hidden_size hidden_stride label_stride num_labels".split()
    signature |= dict.fromkeys(integers, "i32")
    constants = {"LABELS": next_power_of_2(NUM_LABELS), "BLOCK": label_head.BLOCK}
    function = label_head.label_head_kernel
    return Build("label_head", function, dtype, signature, constants, label_head.WARPS, 3)


def _pairs(dtype: str, has_head: bool) -> Build:
    signature = {"rows": f"*{dtype}", "pairs": "*i32", "segments": "*i32"}
    floats = "product_weight difference_weight scores means".split()
    signature |= dict.fromkeys(floats, "*fp32")
    signature |= {"bias": "fp32", "width": "i32", "row_stride": "i32"}
    constants = {
        "HAS_HEAD": has_head, "BLOCK_PAIRS": pair_score.BLOCK_PAIRS,
        "BLOCK_COLUMNS": pair_score.block_columns(EMBEDDING),
    }  # fmt: skip
    name = "pair_score, head" if has_head else "pair_score, dot"
    return Build(
        name, pair_score.pair_score_kernel, dtype, signature, constants, pair_score.WARPS, 3
    )


def compile_for(build: Build, target: Target) -> Row:
    """A row of the table: what `build` takes on `target`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = build.function.arg_names
    signature = {name: build.signature.get(name, "constexpr") for name in names}
    # What the launcher finds of its arguments: torch aligns storage, and rows are whole lines.
    aligned = [name for name in names if signature[name][0] == "*" or name.endswith("_stride")]
    aligned += ["width", "hidden_size"]
    attributes = {
        (names.index(name),): [["tt.divisibility", 16]] for name in aligned if name in names
    }
    source = ASTSource(build.function, signature, build.constants, attributes)
    options = {"num_warps": build.warps, "num_stages": build.stages}
    compiled = triton.compile(
        source, target=GPUTarget("cuda", target.capability, 32), options=options
    )
    registers, spills = ptxas_says(compiled.asm["ptx"], target.capability)
    columns = compiled.metadata.tmem_size
    shared = compiled.metadata.shared
    return {
        "kernel": build.kernel,
        "target": f"sm_{target.capability}",
        "dtype": build.dtype,
        "head_dim": build.head_dim or "",
        "group": build.group or "",
        "warps": build.warps,
        "registers": registers,
        "spill_bytes": spills,
        "shared_bytes": shared,
        "tensor_columns": columns,
        "matrix": matrix_instruction(compiled.asm["ptx"]),
        "async_copies": compiled.asm["ptx"].count("cp.async.cg"),
        "blocks_per_sm": blocks_per_sm(target, build.warps, registers, shared, columns),
    }


def ptxas_says(ptx: str, capability: int) -> tuple[int, int]:
    """(registers a thread, bytes spilled by stores and loads), with the flags that Triton uses."""
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx)
        architecture = sm_arch_from_capability(capability)
        tool = get_ptxas(capability).path
        arguments = [tool, "-v", f"--gpu-name={architecture}", str(file), "-o", f"{file}.cubin"]
        log = subprocess.run(arguments, check=True, capture_output=True, text=True).stderr
    registers = re.findall(r"Used (\d+) registers", log)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
    if len(registers) != 1 or not spills:
        raise RuntimeError(f"ptxas says something new: {log}")
    return int(registers[0]), sum(map(int, spills))


def matrix_instruction(ptx: str) -> str:
    """Which tensor cores the kernel uses, by the name of their instruction; empty: none."""
    found = re.search(r"mma\.sync|wgmma\.mma_async|tcgen05\.mma", ptx)
    return found[0] if found else ""


def blocks_per_sm(target: Target, warps: int, registers: int, shared: int, columns: int) -> int:
    """How many blocks a multiprocessor holds at once."""
    units = -(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    limits = [
        target.blocks,
        target.threads // (32 * warps),
        target.registers // (units * warps),
        target.shared_bytes // (shared + RESERVED_SHARED),
    ]
    if columns:
        limits.append(target.tensor_columns // columns)
    return min(limits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    # Of the 4B judge, and one that divides no tile: Qwen2.5-7B has 28 heads over 4.
    parser.add_argument(
        "--groups", type=int, nargs="+", default=[4, 7], help="query heads a KV head, of attention"
    )
    parser.add_argument("--kernels", nargs="+", help="only those whose name begins so")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    chosen = [
        build for build in builds(args.dtypes, args.groups)
        if not args.kernels or build.kernel.startswith(tuple(args.kernels))
    ]  # fmt: skip
    rows = [compile_for(build, target) for build in chosen for target in TARGETS]
    print_table(rows, "Kernels compiled ahead of time")
    if args.json:
        write_json(args.json, "kernels_report", rows)


if __name__ == "__main__":
    main()
