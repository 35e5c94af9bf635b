"""LiteLLM in process: the record survives a whole reply, and is lost in a stream."""

import json
import os

import litellm

url = os.environ.get("SGLANG_URL", "http://localhost:30000")
request = {
    "model": "openai/default",
    "api_base": f"{url}/v1",
    "api_key": "none",
    "messages": [{"role": "user", "content": "What is 19 + 32 + 37 + 47 ?"}],
    "n": 8,
    "seed": 5,
    "max_tokens": 700,
}


def body(**settings):
    return {"custom_params": {"deepprune": settings}}


reply = litellm.completion(**request, extra_body=body(preset="balanced"))
group = reply.metadata["deepprune"]

# A stream of n choices arrives with one finish reason and no record: ask for the winner alone.
# Nothing is sent before the vote is over, then one choice comes, whole.
winner = ""
for chunk in litellm.completion(**request, stream=True, extra_body=body(**{"return": "vote"})):
    if chunk.choices:
        winner += chunk.choices[0].delta.content or ""

print(
    json.dumps(
        {
            "answer": group["answer"],
            "states": [choice["state"] for choice in group["choices"]],
            "finish_reasons": [choice.finish_reason for choice in reply.choices],
            "texts": [choice.message.content for choice in reply.choices],
            "winner": winner,
        }
    )
)
