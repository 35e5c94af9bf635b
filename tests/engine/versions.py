"""What older SGLangs of the window cannot do on this machine: reasons to skip, or to do without."""

from __future__ import annotations

from importlib import metadata

import pytest
from packaging.version import Version

from sglang_deepprune.local_server import has_gpu

SGLANG = Version(metadata.version("sglang"))


def before(version: str) -> bool:
    return Version(SGLANG.base_version) < Version(version)


# `mem_cache/allocator/paged.py` asks `supports_triton` since 0.5.22; this can go with 0.5.21.
HAS_PAGES = not before("0.5.22") or has_gpu()
paged = pytest.mark.skipif(
    not HAS_PAGES, reason="before SGLang 0.5.22 pages of KV are handed out by Triton alone"
)
# `patches/fork.py::SINCE`; this can go with 0.5.22.
probes = pytest.mark.skipif(
    before("0.5.23"), reason="the judge probe is refused before SGLang 0.5.23"
)
# This can go with 0.5.18.
dllm = pytest.mark.skipif(
    before("0.5.19"), reason="before SGLang 0.5.19 its parser wants a diffusion model for the flag"
)
