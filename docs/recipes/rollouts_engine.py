"""Rollouts in process: n calls of `Engine.async_generate` a prompt, joined by a group key.

The call is that of verl's SGLangHttpServer.generate (verl/workers/rollout/sglang_rollout/
async_sglang_server.py), which builds one such request a sample for the engine in its process.
"""

import asyncio
import json
import os
import uuid

import sglang


async def rollout(engine, prompt_ids, n, preset):
    settings = {"group": uuid.uuid4().hex, "size": n, "preset": preset}
    sampling_params = {
        "temperature": 1.0,
        "max_new_tokens": 700,
        "custom_params": {"deepprune": settings},
    }
    outputs = await asyncio.gather(
        *(
            engine.async_generate(
                input_ids=prompt_ids, sampling_params=sampling_params, return_logprob=True
            )
            for _ in range(n)
        )
    )
    return [
        {
            "ids": output["output_ids"],
            "logprobs": [e[0] for e in output["meta_info"].get("output_token_logprobs") or []],
            "complete": output["meta_info"]["deepprune"]["choice"]["state"] == "finished",
        }
        for output in outputs
    ]


if __name__ == "__main__":  # the engine's processes import this file again
    more = json.loads(os.environ.get("ENGINE_OPTIONS", "{}"))
    engine = sglang.Engine(model_path=os.environ["MODEL"], enable_deepprune=True, **more)
    questions = [
        "What is 19 + 32 + 37 + 47 ?",
        "What is 11 + 26 + 30 + 18 ?",
        "What is 24 + 19 + 22 ?",
    ]
    batch = [engine.tokenizer_manager.tokenizer.encode(question) for question in questions]

    async def step(preset):
        return await asyncio.gather(*(rollout(engine, ids, 8, preset) for ids in batch))

    # `collect` first: every sample comes back whole. Then `balanced`.
    samples = {
        preset: engine.loop.run_until_complete(step(preset)) for preset in ("collect", "balanced")
    }
    print(json.dumps(samples))
    engine.shutdown()
