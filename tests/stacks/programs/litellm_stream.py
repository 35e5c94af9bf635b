"""What LiteLLM leaves of a stream of n choices: prints it as JSON."""

import json
import os

import litellm

texts: dict[int, str] = {}
reasons: list[str] = []
said = ""
for chunk in litellm.completion(
    model="openai/default",
    api_base=f"{os.environ['SGLANG_URL']}/v1",
    api_key="none",
    messages=[{"role": "user", "content": "What is 19 + 32 + 37 + 47 ?"}],
    n=8,
    seed=5,
    max_tokens=700,
    stream=True,
    extra_body={"custom_params": {"deepprune": {"preset": "balanced"}}},
):
    said += str(chunk.model_dump())
    for choice in chunk.choices:
        texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
        reasons += [choice.finish_reason] if choice.finish_reason else []
print(json.dumps({"texts": texts, "reasons": reasons, "has_record": "deepprune" in said}))
