"""LangChain: `invoke` sees the first choice alone, so ask the server for the vote's winner."""

import json
import os

from langchain_openai import ChatOpenAI

url = os.environ.get("SGLANG_URL", "http://localhost:30000")
question = "What is 19 + 32 + 37 + 47 ?"
setup = {
    "model": "default",
    "base_url": f"{url}/v1",
    "api_key": "none",
    "n": 8,
    "seed": 5,
    "max_tokens": 700,
    "extra_body": {"custom_params": {"deepprune": {"return": "vote"}}},
}

# The winner's text, in `invoke` and in `stream`; chains, agents and parsers need no change.
message = ChatOpenAI(**setup).invoke(question)
streamed = "".join(chunk.content for chunk in ChatOpenAI(**setup).stream(question))


class ChatWithRecord(ChatOpenAI):
    """Keeps a whole reply's record: `message.response_metadata["deepprune"]`."""

    def _create_chat_result(self, response, generation_info=None):
        result = super()._create_chat_result(response, generation_info)
        is_dict = isinstance(response, dict)
        metadata = response.get("metadata") if is_dict else response.metadata
        record = (metadata or {}).get("deepprune")
        for generation in result.generations:
            generation.message.response_metadata["deepprune"] = record
        return result


recorded = ChatWithRecord(**setup).invoke(question)
group = recorded.response_metadata["deepprune"]

print(
    json.dumps(
        {
            "message": message.content,
            "streamed": streamed,
            "recorded": recorded.content,
            "answer": group["answer"],
            "states": [choice["state"] for choice in group["choices"]],
        }
    )
)
