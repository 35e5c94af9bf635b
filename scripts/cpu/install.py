"""Puts SGLang for CPU and this project, editable, into the running virtual environment.

Called by the Makefile where there is no GPU; with one, SGLang's own install is used instead.
SGLang declares its CUDA dependencies unconditionally, so here it is installed without them from
the pinned list beside this file, and two small modules stand in for what has no CPU build.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
REQUIREMENTS = HERE / "requirements.txt"

TORCH = "torch==2.13.0"
TORCHVISION = "torchvision==0.28.0"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
PROBE_TIMEOUT_S = 5


def pip_install(*arguments: str) -> bool:
    """One quiet pip call; `compile_modules` does on all cores what pip does on one."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-compile"]
    return subprocess.run([*command, *arguments], cwd=ROOT).returncode == 0


def is_reachable(index: str) -> bool:
    """Asked first: pip's own attempt would wait through its retries."""
    try:
        with urlopen(f"{index}/torch/", timeout=PROBE_TIMEOUT_S):
            return True
    except (URLError, TimeoutError):
        return False


def install_torch() -> bool:
    """PyTorch's CPU build where it can be had; the default index may give one for CUDA."""
    if is_reachable(CPU_INDEX) and pip_install(
        "--no-deps", "--index-url", CPU_INDEX, TORCH, TORCHVISION
    ):
        return True
    print(f"PyTorch's CPU index is out of reach; taking {TORCH} from the default index")
    return pip_install(TORCH)


def install_stand_ins() -> bool:
    packages = Path(sysconfig.get_path("purelib"))
    for module in ("sgl_kernel.py", "torchvision_schemas.py"):
        shutil.copyfile(HERE / module, packages / module)
    (packages / "torchvision_schemas.pth").write_text("import torchvision_schemas\n")
    return True


def compile_modules() -> bool:
    """Not left to the first import: PYTHONDONTWRITEBYTECODE would make each process pay again."""
    packages = sysconfig.get_path("purelib")
    # It fails on the templates that some packages ship as .py; nothing imports those.
    subprocess.run(
        [sys.executable, "-m", "compileall", "-qq", "-j", "0", packages], stdout=subprocess.DEVNULL
    )
    return True


def main() -> int:
    if sys.prefix == sys.base_prefix:
        print("run this with a virtual environment's python", file=sys.stderr)
        return 1
    steps = {
        TORCH: install_torch,
        "SGLang and pinned packages": lambda: pip_install("--no-deps", "-r", str(REQUIREMENTS)),
        "stand-ins for GPU-only modules": install_stand_ins,
        "sglang-deepprune": lambda: pip_install(
            "--no-deps", "--no-build-isolation", "--editable", str(ROOT)
        ),
        "bytecode": compile_modules,
    }
    for name, install in steps.items():
        start = time.monotonic()
        if not install():
            print(f"set-up failed at: {name}", file=sys.stderr)
            return 1
        print(f"installed {name} ({time.monotonic() - start:.0f} s)", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
