"""What plain ChatOpenAI leaves of n choices: prints it as JSON."""

import json
import os

from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI

question = "What is 19 + 32 + 37 + 47 ?"
model = ChatOpenAI(
    model="default",
    base_url=f"{os.environ['SGLANG_URL']}/v1",
    api_key="none",
    n=8,
    seed=int(os.environ["SEED"]),
    max_tokens=700,
    extra_body={"custom_params": {"deepprune": {"preset": "balanced"}}},
)
message = model.invoke(question)
result = model.generate([[HumanMessage(question)]])
chunks = list(model.stream(question))
everything = repr((message, result, chunks))
print(
    json.dumps(
        {
            "invoked": message.content,
            "finish_reason": message.response_metadata["finish_reason"],
            "generated": [one.text for one in result.generations[0]],
            "reasons": [one.generation_info["finish_reason"] for one in result.generations[0]],
            "streamed": "".join(chunk.content for chunk in chunks),
            "has_record": "not_started" in everything or "group_id" in everything,
        }
    )
)
