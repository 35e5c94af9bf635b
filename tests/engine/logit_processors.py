"""Custom logit processors for engine tests; the server imports them by name.

Plain rules over token ids, so that a test knows every token that must come.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.sampling.custom_logit_processor import (
    CustomLogitProcessor,
    ThinkingBudgetLogitProcessor,
)


class OneToken(CustomLogitProcessor):
    """Emits the caller's `token`; `surprise` where it sees a key that is not the caller's."""

    def __call__(
        self, logits: torch.Tensor, custom_param_list: list[dict[str, Any]] | None = None
    ) -> torch.Tensor:
        for row, params in enumerate(custom_param_list or []):
            theirs = {name for name in params if not name.startswith("__")}
            wanted = params["token" if theirs == {"token", "surprise"} else "surprise"]
            logits[row] = -float("inf")
            logits[row, wanted] = 0.0
        return logits


def thinking_budget(start: int, end: int, newline: int) -> str:
    """SGLang's own rule with these token ids, as a request names it."""
    ids = {
        "THINKING_START_TOKEN_ID": start,
        "THINKING_END_TOKEN_ID": end,
        "NEW_LINE_TOKEN_ID": newline,
    }
    made: Any = type("Budget", (ThinkingBudgetLogitProcessor,), ids)
    return str(made.to_str())
