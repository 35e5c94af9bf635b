"""How a fault of ours is told in a log."""

from __future__ import annotations

import traceback


def told(error: BaseException) -> str:
    """Its type and its frames, as a traceback has them. Its message is left out: `float(answer)`
    and `table[text]` quote what they were given, and a log is no place for a request's text."""
    frames = "".join(traceback.format_tb(error.__traceback__)).rstrip()
    return f"{type(error).__name__} at\n{frames}"
