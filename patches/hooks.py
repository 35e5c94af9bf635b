"""The functions behind the seam table: each asks its gate, then hands on to its room.

`TABLE` maps a row's `name` in `seams.py` to the function that is installed there.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from sglang.srt.environ import envs
from sglang.srt.managers import io_struct
from sglang.srt.managers.io_struct import AbortReq

from sglang_deepprune.faults import told
from sglang_deepprune.patches import output, sampling, server_args, tokenizer_manager, wire
from sglang_deepprune.patches.arrivals import Arrival
from sglang_deepprune.patches.build import agreed, build_engine, start_judge_early
from sglang_deepprune.patches.fork import ProbeReq
from sglang_deepprune.patches.scheduler import _COMMANDS, Engine
from sglang_deepprune.patches.state import describe

logger = logging.getLogger(__name__)

# What changes the weights, as far as this SGLang has it: some are newer than others.
_NEW_WEIGHTS = tuple(
    getattr(io_struct, name)
    for name in (
        "UpdateWeightFromDiskReqInput", "UpdateWeightsFromDistributedReqInput",
        "UpdateWeightsFromTensorReqInput", "UpdateWeightsFromIPCReqInput",
        "BeginWeightUpdateReqInput", "EndWeightUpdateReqInput", "UpdateWeightVersionReqInput",
    )
    if hasattr(io_struct, name)
)  # fmt: skip
# What SGLang does on an idle server alone: else it fails, or dies of it.
_WANTS_IDLE = (
    *_NEW_WEIGHTS, io_struct.ReleaseMemoryOccupationReqInput, io_struct.FlushCacheReqInput
)  # fmt: skip

_engine: Engine | None = None  # this process's, once its Scheduler is built


def engine() -> Engine | None:
    """The engine of this scheduler process, None elsewhere and where the flag is off."""
    return _engine


def init_model_worker(original: Callable[..., Any], self: Any) -> Any:
    """AROUND `Scheduler.init_model_worker`: a judge on a GPU takes its memory first."""
    config = server_args.config_of(self.server_args)
    if config is not None:
        start_judge_early(self, config)
    return original(self)


def scheduler_init(result: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER `Scheduler.__init__`."""
    global _engine
    config = server_args.config_of(self.server_args)
    if config is not None:
        _engine = build_engine(self, agreed(self, config))


def add_request_to_queue(
    original: Callable[..., Any], self: Any, req: Any, is_retracted: bool = False
) -> Any:
    """AROUND `Scheduler._add_request_to_queue`: siblings are admitted, held or answered at once."""
    ours = _engine
    if ours is None:
        return original(self, req, is_retracted)
    if isinstance(req, ProbeReq):
        ours.probes.guard(ours.probes.lost, req)  # off its row: it does not come back
        return None
    custom = req.sampling_params.custom_params
    if not custom or not wire.is_ours(custom, ours.token):
        if ours.coordinator.is_idle or is_retracted or req.is_retracted:
            return original(self, req, is_retracted)
        ours.room.stamp(req)
        with ours.room.counted(req):
            return original(self, req, is_retracted)
    arrival = ours.guard(ours.arrivals.arrive, req)
    if arrival is Arrival.DONE:
        return None
    if arrival is Arrival.RETURNS:
        with ours.room.unlimited():
            original(self, req, is_retracted)
        ours.guard(ours.room.requeue, req)
        return None
    with ours.room.counted(req):
        original(self, req, is_retracted)
    if arrival is Arrival.IS_HELD:
        ours.guard(ours.room.hold_last, req)
    return None


def abort_request(original: Callable[..., Any], self: Any, recv_req: Any) -> Any:
    """AROUND `Scheduler.abort_request`: the rid of an n>1 request stands for its siblings', and
    held siblings are in sight.

    One tokenizer process translates the rid itself; with several, it may not be the one that knows.
    """
    ours = _engine
    if ours is None or not ours.live:
        return original(self, recv_req)
    siblings = [] if recv_req.abort_all else ours.siblings_of(recv_req.rid)
    with ours.room.shown():
        for rid in siblings:
            original(self, AbortReq(rid=rid))
        return None if siblings else original(self, recv_req)


def with_held(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND whatever looks at SGLang's queue and must see the held siblings there."""
    ours = _engine
    if ours is None or not ours.room.held:
        return original(self, *args, **kwargs)
    with ours.room.shown():
        return original(self, *args, **kwargs)


def get_internal_state(result: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER `Scheduler.get_internal_state`: /server_info says what is in force and how it fares."""
    ours, state = _engine, result.internal_state
    # SGLang 0.5.15 dumps every attribute of `server_args`: the token there proves a tag to be ours.
    state.pop(server_args.ATTRIBUTE, None)
    if ours is not None:
        try:  # not `guard`: nothing was acted on, so no group need be given up
            state[wire.KEY] = describe(ours)
        except Exception as error:
            logger.error("deepprune: its state cannot be told: %s", told(error))


def abort_on_waiting_timeout(original: Callable[..., Any], self: Any) -> Any:
    """AROUND `Scheduler._abort_on_waiting_timeout`. SGLang comes by in every pass, and looks at its
    queue only where the time-out is set. Who is held waits by design, not for want of room."""
    ours = _engine
    if ours is None or not ours.live or envs.SGLANG_REQ_WAITING_TIMEOUT.get() <= 0:
        return original(self)
    with ours.room.since_claimed():
        return original(self)


def is_fully_idle(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND `Scheduler.is_fully_idle`. A paused server asks before it flushes the tree, whoever
    waits: our locks would outlive their nodes."""
    ours = _engine
    if ours is not None and kwargs.get("ignore_waiting", args[1] if len(args) > 1 else False):
        ours.guard(ours.prefixes.let_go_all)
    elif ours is not None and ours.pending:
        return False  # an idle server sleeps a second at a time, and the fence would wait with it
    return with_held(original, self, *args, **kwargs)


def poll_timeout_aborts(original: Callable[..., Any], self: Any) -> Any:
    """AROUND `Scheduler._poll_timeout_aborts`: a sibling's waiting time-out counts from its
    claim."""
    aborts = abort_on_waiting_timeout(original, self)
    return poll_commands(aborts, self) or aborts


def get_new_batch_prefill(
    original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any
) -> Any:
    """AROUND `Scheduler._get_new_batch_prefill_raw`: extras yield, or start."""
    ours = _engine
    if ours is None or not (
        ours.room.held or ours.rows.extras or ours.prefixes.locks or ours.probes.is_busy
    ):
        return original(self, *args, **kwargs)
    # Handed in since 0.5.19.
    batch = kwargs.get("running_batch", args[1] if len(args) > 1 else self.running_batch)
    ours.probes.guard(ours.probes.sweep)
    ours.guard(ours.rows.before_prefill, batch)
    ours.probes.guard(ours.probes.before_prefill, batch)
    planned = original(self, *args, **kwargs)
    new, batch = planned if isinstance(planned, tuple) else (planned, self.running_batch)
    ours.guard(ours.rows.after_prefill, batch)
    ours.probes.guard(ours.probes.after_prefill, batch)
    ours.guard(ours.after_admission, new, batch)
    return planned


def process_input_requests(original: Callable[..., Any], self: Any, recv_reqs: Any) -> Any:
    """AROUND `Scheduler.process_input_requests`: our commands are not SGLang's to dispatch, no
    group crosses a change of the weights, and no output waits for the fence when the server is to
    be idle. All ranks get the same requests."""
    ours = _engine
    if ours is None or not (recv_reqs or ours.has_lost):
        return original(self, recv_reqs)
    is_idle = ours.coordinator.is_idle
    if not is_idle and any(isinstance(one, _NEW_WEIGHTS) for one in recv_reqs or ()):
        ours.guard(ours.renew)
    if ours.pending and any(isinstance(one, _WANTS_IDLE) for one in recv_reqs or ()):
        ours.guard(ours.settle_pending)
    commands = [one for one in recv_reqs or () if isinstance(one, _COMMANDS)]
    if commands:
        recv_reqs = [one for one in recv_reqs if not isinstance(one, _COMMANDS)]
    result = original(self, recv_reqs)
    if commands:
        ours.guard(ours.apply, commands)
    ours.guard(ours.replan_lost)
    return result


def poll_commands(result: Any, self: Any) -> Any:
    """AFTER `SchedulerRequestReceiver._pull_raw_reqs`: what is broadcast with the requests.

    Called in every pass of the loop, on the leader alone: elsewhere there is no list."""
    ours = _engine
    if ours is None or result is None:
        return None
    ours.gauges.tick()
    if ours.coordinator.is_idle:
        ours.guard(ours.coordinator.tidy)
        return None
    commands = ours.poll()
    return [*result, *commands] if commands else None


def process_batch_result_decode(
    original: Callable[..., Any], self: Any, batch: Any, result: Any
) -> Any:
    """AROUND `SchedulerBatchResultProcessor.process_batch_result_decode`."""
    ours = _engine
    if ours is None:
        return original(self, batch, result)
    if ours.steps.is_on:
        return _timed(original, self, batch, result, ours)
    if ours.is_idle:
        return original(self, batch, result)
    _before_decode(ours, batch, result)
    returned = original(self, batch, result)
    _after_decode(ours, batch)
    return returned


def _before_decode(ours: Engine, batch: Any, result: Any) -> None:
    ours.guard(ours.before_result, batch, result)
    if ours.dooms.slots:
        ours.guard(ours.dooms.weigh_doomed, batch)


def _after_decode(ours: Engine, batch: Any) -> None:
    ours.guard(ours.after_result, batch)
    if ours.probes.running:
        ours.probes.guard(ours.probes.after_result)
    ours.rows.decoded(len(batch.reqs))


def update_running_batch(original: Callable[..., Any], self: Any, batch: Any) -> Any:
    """AROUND `Scheduler.update_running_batch`, which retracts when the KV pool is full."""
    ours = _engine
    if ours is not None and (ours.live or ours.probes.running):
        ours.guard(ours.pressure.relieve, batch)
    return original(self, batch)


_last_end = 0


def _timed(original: Callable[..., Any], self: Any, batch: Any, result: Any, ours: Engine) -> Any:
    """The same with a clock around our part."""
    global _last_end
    start = time.perf_counter_ns()
    if not ours.is_idle:
        _before_decode(ours, batch, result)
    middle = time.perf_counter_ns()
    ours.steps.begin()
    returned = original(self, batch, result)
    ours.steps.end()
    resumed = time.perf_counter_ns()
    if not ours.is_idle:
        _after_decode(ours, batch)
    end = time.perf_counter_ns()
    if _last_end:
        ours.steps.spent(middle - start + end - resumed, end - _last_end, len(batch.reqs))
    _last_end = end
    return returned


def process_batch_result_prefill(
    original: Callable[..., Any], self: Any, batch: Any, result: Any
) -> Any:
    """AROUND `process_batch_result_prefill`: decode rows of a mixed batch count their step here."""
    ours = _engine
    if ours is not None and ours.probes.running:
        ours.guard(ours.before_prefill_result, batch, result)
    if ours is not None and ours.live and batch.decoding_reqs:
        ours.guard(ours.before_mixed_result, batch, result)
    if ours is not None and ours.dooms.slots:
        ours.guard(ours.dooms.weigh_doomed, batch)
    returned = original(self, batch, result)
    if ours is not None and not ours.is_idle:
        ours.rows.interrupted()
        if ours.probes.running:
            ours.probes.guard(ours.probes.after_result)
        if ours.room.held:
            ours.guard(ours.after_prefill, batch)
        if batch.decoding_reqs:
            ours.guard(ours.after_result, batch)
    return returned


def stream_output(
    original: Callable[..., Any], self: Any, reqs: Any, return_logprob: bool, skip_req: Any = None
) -> Any:
    """AROUND `SchedulerOutputStreamer.stream_output`: the door through which siblings end."""
    ours = _engine
    if ours is None or not (ours.live or ours.pending or ours.probes.running):
        return original(self, reqs, return_logprob, skip_req)
    if ours.probes.running:
        reqs = ours.probes.without(reqs)
        if not reqs:
            return None
    ours.guard(ours.close, reqs, skip_req)
    if ours.pending:
        # Under overlap a finished row comes by once more, in the batch that was launched already.
        reqs = ours.without_pending(reqs)
        if not reqs:
            return None
    return original(self, reqs, return_logprob, skip_req)


def send_output(original: Callable[..., Any], self: Any, output: Any, recv_obj: Any = None) -> Any:
    """AROUND `SenderWrapper.send_output`: the other door, for siblings aborted in a queue."""
    ours = _engine
    if ours is not None and isinstance(output, AbortReq):
        if ours.probes.owns(output.rid):
            return ours.probes.guard(ours.probes.aborted, output.rid)
        ours.guard(ours.aborted, output, recv_obj)
    return original(self, output, recv_obj)


TABLE: dict[str, Callable[..., Any]] = {
    "TokenizerManager.generate_request": tokenizer_manager.generate_request,
    "TokenizerManager._handle_batch_request": tokenizer_manager.handle_batch_request,
    "TokenizerManager._send_one_request": tokenizer_manager.send_one_request,
    "TokenizerManager._send_batch_request": tokenizer_manager.send_batch_request,
    "TokenizerManager._wait_one_response": tokenizer_manager.wait_one_response,
    "TokenizerManager.abort_request": tokenizer_manager.abort_request,
    "OpenAIServingCompletion._build_completion_response": output.build_response,
    "OpenAIServingCompletion._generate_completion_stream": output.completion_stream,
    "OpenAIServingChat._build_chat_response": output.build_response,
    "OpenAIServingChat._generate_chat_stream": output.chat_stream,
    "Scheduler.__init__": scheduler_init,
    "Scheduler.init_model_worker": init_model_worker,
    "Scheduler._add_request_to_queue": add_request_to_queue,
    "Scheduler.abort_request": abort_request,
    "Scheduler.process_input_requests": process_input_requests,
    "Scheduler._poll_timeout_aborts": poll_timeout_aborts,
    "Scheduler._abort_on_waiting_timeout": abort_on_waiting_timeout,
    "Scheduler.get_internal_state": get_internal_state,
    "Scheduler.is_fully_idle": is_fully_idle,
    "Scheduler._get_new_batch_prefill_raw": get_new_batch_prefill,
    "Scheduler.update_running_batch": update_running_batch,
    "SchedulerLoadInquirer.get_loads": with_held,
    "SchedulerRequestReceiver._pull_raw_reqs": poll_commands,
    "SchedulerBatchResultProcessor.process_batch_result_decode": process_batch_result_decode,
    "SchedulerBatchResultProcessor.process_batch_result_prefill": process_batch_result_prefill,
    "SchedulerOutputStreamer.stream_output": stream_output,
    "SenderWrapper.send_output": send_output,
    "ModelRunner.sample": sampling.sample,
    "Sampler._sample_from_probs": sampling.sample_from_probs,
}
