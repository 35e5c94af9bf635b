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

GPU = "a GPU"

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
    """The modes of this server that the plugin is written for and was never run in, and why that
    matters.

    `server_args`: SGLang's ServerArgs, the parsed flags, or what /server_info says of them.
    """

    def has(*names: str) -> bool:
        return any(getattr(server_args, name, None) for name in names)

    modes = (
        (str(getattr(server_args, "device", None) or "").startswith("cuda"),
         f"{GPU}: everything was run on SGLang's CPU engine"),
        (has("speculative_algorithm"),
         "--speculative-algorithm: several tokens come at once, so votes are seen a step later"),
        (has("enable_lora", "lora_paths"),
         "--enable-lora: siblings share their prompt's adapter"),
        (has("enable_deterministic_inference", "rl_on_policy_target"),
         "--enable-deterministic-inference: siblings get a seed each"),
        (has("enable_dp_attention") or (getattr(server_args, "attn_dp_size", None) or 1) > 1,
         "--attn-dp-size: a group has to stay on one rank"),
        (has("enable_hierarchical_cache"),
         "--enable-hierarchical-cache: a stopped sibling's KV may be on its way to the host"),
        (has("enable_strict_thinking"),
         "--enable-strict-thinking: SGLang's mask for it has no CPU path"),
        (has("enable_return_routed_experts"),
         "--enable-return-routed-experts: a mixture of experts has no CPU kernels"),
    )  # fmt: skip
    return [sentence for applies, sentence in modes if applies]
