"""The filter that `lm_eval_repeats.yaml` counts its vote with."""


def finished(resps, docs):
    """The samples of each question that ran to their end; one empty text where none did."""
    return [[text for text in texts if text] or [""] for texts in resps]
