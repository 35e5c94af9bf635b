"""What lm-eval makes of a reply of eight choices, one request at a time and concurrently."""

import json
import os

from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI


def texts(num_concurrent: int) -> list[str] | str:
    """The texts that it reads for one request, or its complaint."""
    model = LocalCompletionsAPI(
        model="default",
        base_url=f"{os.environ['SGLANG_URL']}/v1/completions",
        tokenizer_backend=None,
        tokenized_requests=False,
        num_concurrent=num_concurrent,
    )
    wishes = {"n": 8, "until": [], "temperature": 1.0, "max_gen_toks": 700}
    question = "What is 19 + 32 + 37 + 47 ?"
    request = Instance("generate_until", {}, (question, wishes), 0, ("task", 0, 1))
    try:
        return list(model.generate_until([request]))
    except ValueError as error:
        return str(error)


print(json.dumps({"sequential": texts(1), "concurrent": texts(8)}))
