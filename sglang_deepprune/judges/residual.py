"""Half precision with a float32 residual stream, so that scores depend less on how a batch is cut.

In bfloat16 every layer rounds the sum that all later layers read. Two ways to run the same prompts
(padded, packed, with a kept prefix) round it differently, and P(same) moves by several hundredths.
Weights and products stay in half precision here; only what is added up is not: the embeddings'
output is float32, layers cast what goes into their products.
"""

from __future__ import annotations

from typing import Any

import torch

_PROBE_IDS = (1, 2, 3, 2, 1)


def widen_residual(model: Any) -> bool:
    """Add the hooks to a transformers model in half precision; False, and no hook is left, where
    it cannot run so (products that are no `nn.Linear`, such as those of packed experts)."""
    dtype = model.dtype

    def wide(_: Any, __: Any, out: torch.Tensor) -> torch.Tensor:
        return out.float()

    def narrow_input(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (inputs[0].to(module.weight.dtype), *inputs[1:])

    def narrow_angles(_: Any, __: Any, out: Any) -> Any:
        # Cosines and sines follow the residual stream, and would make queries and keys wide.
        return tuple(one.to(dtype) for one in out)

    handles = [model.get_input_embeddings().register_forward_hook(wide)]
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            handles.append(module.register_forward_pre_hook(narrow_input))
        elif type(module).__name__.endswith("RotaryEmbedding"):
            handles.append(module.register_forward_hook(narrow_angles))
    try:
        with torch.inference_mode():
            ids = torch.tensor([_PROBE_IDS], device=model.device)
            hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        if hidden.dtype == torch.float32:
            return True
    except (RuntimeError, TypeError, ValueError, AttributeError):
        pass
    for handle in handles:
        handle.remove()
    return False
