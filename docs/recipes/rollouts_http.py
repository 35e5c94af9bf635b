"""Rollouts over HTTP: n single requests a prompt, joined by a group key.

Two forms, after the trainers' own calls. `verl`: token ids to /generate, one a sample, as in
AsyncHttpServerAdapter.generate (verl/workers/rollout/sglang_rollout/http_server_engine.py). `trl`:
n=1 to /v1/completions with a seed of its own, as in AsyncRolloutWorker._generate_one_turn
(trl/experimental/async_grpo/async_rollout_worker.py). Ours are `custom_params` and `complete`.
"""

import asyncio
import json
import os
import random
import uuid

import httpx

url = os.environ.get("SGLANG_URL", "http://localhost:30000")
MAX_TOKENS = 700


def grouped(n, preset):
    """Settings that n single requests share. A new key for every prompt of every step."""
    settings = {"group": uuid.uuid4().hex, "size": n, "preset": preset}
    return {"deepprune": settings}


async def verl(client, prompt_ids, n, preset):
    custom_params = grouped(n, preset)

    async def sample():
        payload = {
            "input_ids": prompt_ids,
            "sampling_params": {
                "temperature": 1.0,
                "max_new_tokens": MAX_TOKENS,
                "custom_params": custom_params,
            },
            "return_logprob": True,
        }
        output = (await client.post("/generate", json=payload)).raise_for_status().json()
        meta = output["meta_info"]
        logprobs = [entry[0] for entry in meta.get("output_token_logprobs") or []]
        state = meta["deepprune"]["choice"]["state"]
        # A sample that did not finish gets no reward: mask it, or leave it out of the batch.
        return {"ids": output["output_ids"], "logprobs": logprobs, "complete": state == "finished"}

    return await asyncio.gather(*(sample() for _ in range(n)))


async def trl(client, prompt_ids, n, preset):
    custom_params = grouped(n, preset)

    async def sample():
        payload = {
            "model": "default",
            "prompt": prompt_ids,
            "max_tokens": MAX_TOKENS,
            "temperature": 1.0,
            "n": 1,
            "return_token_ids": True,
            "logprobs": 0,
            "seed": random.getrandbits(63),
            "custom_params": custom_params,
        }
        output = (await client.post("/v1/completions", json=payload)).raise_for_status().json()
        choice = output["choices"][0]
        logprobs = (choice["logprobs"] or {}).get("token_logprobs") or []
        # No choice of its own in an OpenAI reply: what was stopped ends with "length" too early.
        is_complete = choice["finish_reason"] == "stop" or len(choice["token_ids"]) == MAX_TOKENS
        return {"ids": choice["token_ids"], "logprobs": logprobs, "complete": is_complete}

    return await asyncio.gather(*(sample() for _ in range(n)))


async def main():
    async with httpx.AsyncClient(base_url=url, timeout=None) as client:
        questions = [
            "What is 19 + 32 + 37 + 47 ?",
            "What is 11 + 26 + 30 + 18 ?",
            "What is 24 + 19 + 22 ?",
        ]
        batch = (await client.post("/tokenize", json={"prompt": questions})).json()["tokens"]
        # `collect` first: every sample comes back whole, and nothing about the training changes.
        # Then `balanced`, where the estimator can do with fewer samples.
        samples = {}
        for form in (verl, trl):
            for preset in ("collect", "balanced"):
                groups = (form(client, prompt_ids, 8, preset) for prompt_ids in batch)
                samples[f"{form.__name__} {preset}"] = await asyncio.gather(*groups)
        return samples


print(json.dumps(asyncio.run(main())))
