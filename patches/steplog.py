"""What the hooks cost and what a verdict freed, by the allocator's own numbers. Off by default.

With `--deepprune-log-steps` one JSON line a verdict step goes to the log: pool and rows before and
after SGLang's own processing of that step; and at idle one line with the time spent in our hooks.
The engine tests and the overhead benchmark read these lines.
"""

from __future__ import annotations

import json
import logging
import time
from typing import Any

logger = logging.getLogger(__name__)


class StepLog:
    """Counts nothing unless it is switched on."""

    def __init__(self, scheduler: Any, is_on: bool):
        self.scheduler = scheduler
        self.is_on = is_on
        self._num_doomed = 0
        self._before: dict[str, int] | None = None
        self._hook_ns = 0
        self._step_ns = 0
        self._steps = 0
        self._rows = 0

    def doomed(self, count: int) -> None:
        self._num_doomed += count

    def begin(self) -> None:
        """Right before SGLang processes the step's result."""
        if self.is_on and self._num_doomed:
            self._before = self._pool()

    def end(self) -> None:
        """Right after it."""
        if self._before is None:
            return
        line = {"doomed": self._num_doomed, "before": self._before, "after": self._pool()}
        logger.info("deepprune-verdict %s", json.dumps(line))
        self._before, self._num_doomed = None, 0

    def tables(self, sizes: dict[str, int]) -> None:
        """A group has ended: how full our tables are now."""
        if self.is_on:
            logger.info("deepprune-tables %s", json.dumps(sizes))

    def counts(self, numbers: dict[str, int]) -> None:
        """Since the start: rows that extras gave back, rows freed so that SGLang need not retract,
        siblings that it did retract, probes that were taken off their rows."""
        if self.is_on:
            logger.info("deepprune-counts %s", json.dumps(numbers))

    def spent(self, hook_ns: int, step_ns: int, rows: int) -> None:
        """Time of one step: ours, and all between two steps."""
        self._hook_ns += hook_ns
        self._step_ns += step_ns
        self._rows += rows
        self._steps += 1
        if self._steps == 200:
            line = {
                "steps": self._steps,
                "rows": self._rows / self._steps,
                "hook_us": self._hook_ns / self._steps / 1e3,
                "step_us": self._step_ns / self._steps / 1e3,
            }
            logger.info("deepprune-steps %s", json.dumps(line))
            self._hook_ns = self._step_ns = self._steps = self._rows = 0

    def _pool(self) -> dict[str, int]:
        scheduler = self.scheduler
        return {
            "available": int(scheduler.token_to_kv_pool_allocator.available_size()),
            "evictable": int(scheduler.tree_cache.evictable_size()),
            "protected": int(scheduler.tree_cache.protected_size()),
            "rows": int(scheduler.req_to_token_pool.available_size()),
            "time_ns": time.monotonic_ns(),
        }
