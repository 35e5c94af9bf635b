"""lm-eval with `repeats` as one group: stopped samples abstain, they are not wrong answers.

lm-eval reads texts and no finish reasons, so the model class below hands on what the server said:
a sample that did not run to its end is an empty text, which `lm_eval_filters.finished` takes out.
"""

import uuid

from lm_eval.api.registry import register_model
from lm_eval.models.openai_completions import LocalCompletionsAPI


@register_model("deepprune-completions")
class DeepPruneCompletions(LocalCompletionsAPI):
    """`local-completions` whose repeats of a question are one group."""

    run = uuid.uuid4().hex  # two runs against one server do not meet

    def _create_payload(self, *args, **kwargs):
        payload = super()._create_payload(*args, **kwargs)
        settings = payload.get("custom_params", {}).get("deepprune", {})
        if "group" in settings:
            settings["group"] = self.run  # the server scopes it by prompt: one group a question
        return payload

    @staticmethod
    def parse_generations(outputs, **kwargs):
        for output in outputs if isinstance(outputs, list) else [outputs]:
            for choice in output["choices"]:
                if choice["finish_reason"] != "stop":  # stopped by a verdict, or out of tokens
                    choice["text"] = ""
        return LocalCompletionsAPI.parse_generations(outputs, **kwargs)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
