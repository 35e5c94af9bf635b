"""n answers and their vote, with the official OpenAI SDK."""

import json
import os

from openai import OpenAI

url = os.environ.get("SGLANG_URL", "http://localhost:30000")
client = OpenAI(base_url=f"{url}/v1", api_key="none")
request = {
    "model": "default",
    "messages": [{"role": "user", "content": "What is 19 + 32 + 37 + 47 ?"}],
    "n": 8,
    "seed": 5,
    "max_tokens": 700,
    "extra_body": {"custom_params": {"deepprune": {"preset": "balanced"}}},
}

# All n choices come back, in order; the record says which of them ran to their end.
reply = client.chat.completions.create(**request)
group = reply.metadata["deepprune"]
states = [choice["state"] for choice in group["choices"]]

# In a stream the record is the last chunk; it has no choices.
texts, streamed = [""] * 8, None
for chunk in client.chat.completions.create(**request, stream=True):
    for choice in chunk.choices:
        texts[choice.index] += choice.delta.content or ""
    if getattr(chunk, "metadata", None):
        streamed = chunk.metadata["deepprune"]

print(
    json.dumps(
        {
            "answer": group["answer"],
            "votes": group["votes"],
            "states": states,
            "finish_reasons": [choice.finish_reason for choice in reply.choices],
            "texts": [choice.message.content for choice in reply.choices],
            "completion_tokens": reply.usage.completion_tokens,
            "streamed": streamed,
            "streamed_texts": texts,
        }
    )
)
