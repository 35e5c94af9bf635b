"""A group of single requests through SGLang's router, kept on one worker by a routing key.

    python -m sglang_router.launch_router --policy manual --worker-urls http://a:30000 http://b:30000

Siblings on two workers are two groups that know nothing of each other, so the group's key is the
routing key, too. /v1/completions with a text: the router drops `custom_params` from chat and
/generate requests.
"""

import asyncio
import json
import os
import uuid

import httpx

url = os.environ.get("SGLANG_URL", "http://localhost:30000")


async def vote(client, question, n):
    key = uuid.uuid4().hex
    payload = {
        "model": "default",
        "prompt": question,
        "max_tokens": 700,
        "temperature": 1.0,
        "custom_params": {"deepprune": {"group": key, "size": n}},
    }
    headers = {"X-SMG-Routing-Key": key}
    posts = (client.post("/v1/completions", json=payload, headers=headers) for _ in range(n))
    replies = [reply.raise_for_status().json() for reply in await asyncio.gather(*posts)]
    records = [reply["metadata"]["deepprune"] for reply in replies]
    # Each reply brings the group's record as it was then; one brings it settled.
    return next((record for record in records if record["settled"]), None), records


async def main():
    async with httpx.AsyncClient(base_url=url, timeout=None) as client:
        return [await vote(client, "What is 19 + 32 + 37 + 47 ?", 8) for _ in range(6)]


print(json.dumps(asyncio.run(main())))
