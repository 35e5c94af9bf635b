"""Natural ends, as SGLang is about to see them in a step's tokens, or has seen them."""

from __future__ import annotations

from typing import Any

from sglang_deepprune.patches import finish


def tokens_of(batch: Any, result: Any) -> list[int] | None:
    """[rows] the tokens of this step, before SGLang has looked at them; None: not one a row."""
    if not batch.spec_algorithm.is_none() or result.next_token_ids is None:
        return None
    if result.copy_done is not None:
        result.copy_done.synchronize()  # the original does the same right after
    ids = result.next_token_ids
    return ids.tolist() if hasattr(ids, "tolist") else list(ids)


def ends_with(req: Any, token: int) -> tuple[bool, bool]:
    """(it ends with this token, by length) as `Req.update_finish_state` will see it."""
    params = req.sampling_params
    if not params.ignore_eos:
        tokenizer = req.tokenizer
        if (
            (params.stop_token_ids and token in params.stop_token_ids)
            or (req.eos_token_ids and token in req.eos_token_ids)
            or (tokenizer is not None and token == tokenizer.eos_token_id)
            or (tokenizer is not None and token in (tokenizer.additional_stop_token_ids or ()))
        ):
            return True, False
    return len(req.output_ids) + 1 >= params.max_new_tokens, True


def text_ids(req: Any) -> list[int]:
    """The output ids that carry text: through the stop, less the end token itself."""
    ids = list(req.output_ids)
    if req.finished_len is not None:
        ids = ids[: req.finished_len]
    return ids if finish.is_cut(req.finished_reason) else ids[:-1]
