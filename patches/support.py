"""Which SGLang this is made for, and what of it nobody has tried. Imports no SGLang.

`doctor` reads it on machines whose SGLang is missing, broken or of another version.
"""

from __future__ import annotations

import re
from typing import Any, Literal

OLDEST, NEWEST = "0.5.15", "0.5.23"
WINDOW = f"SGLang {OLDEST} to {NEWEST}"
PLUGIN = "deepprune"  # our entry point, as SGLANG_PLUGINS names it
INSTALL = f'pip install "sglang=={NEWEST}"'

Place = Literal["older", "known", "newer"]


def place_of(version: str) -> Place:
    """Where a version lies beside the window; what follows its three numbers does not count."""
    numbers = _numbers(version)
    if numbers < _numbers(OLDEST):
        return "older"
    return "newer" if numbers > _numbers(NEWEST) else "known"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


def untested(server_args: Any) -> list[str]:
    """The modes of this server that the plugin is written for and was never run in.

    `server_args`: SGLang's ServerArgs, the parsed flags, or what /server_info says of them.
    """
    attention_dp = getattr(server_args, "attn_dp_size", None)
    modes = (
        (getattr(server_args, "speculative_algorithm", None),
         "--speculative-algorithm: votes come a step later, for several tokens come at once"),
        (getattr(server_args, "enable_lora", None) or getattr(server_args, "lora_paths", None),
         "LoRA adapters: siblings share their prompt's adapter"),
        (getattr(server_args, "enable_dp_attention", None) or (attention_dp or 1) > 1,
         "DP attention: a group has to stay on one rank"),
        (str(getattr(server_args, "device", None) or "").startswith("cuda"),
         "a GPU: everything was measured on the CPU engine"),
    )  # fmt: skip
    return [sentence for applies, sentence in modes if applies]
