"""The one table of everything we hook in SGLang, and the checks that it still fits.

A seam is a row: target, kind, why, versions, parameters we rely on, what we read from it. `check`
resolves each row, compares its parameters, and reads our hook back from what stands there; a
mismatch is a SeamError with one sentence.

Other plugins may hook the same functions. SGLang applies all hooks of a function at once, when all
plugins are loaded, and passes over a function that was patched before
(`plugins/hook_registry.py::HookRegistry.apply_hooks`). So what has to be there from the start is
left to SGLang (`register`), and what comes with the flag is wrapped around whatever stands there
by then (`install`) and leaves no mark in the registry: whoever comes later is applied as well.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NoReturn

from packaging.version import Version
from sglang.srt.plugins.hook_registry import HookRegistry, HookSource, HookType

from sglang_deepprune.patches.support import NEWEST, OLDEST, WINDOW

_MANAGERS = "sglang.srt.managers"
_OPENAI = "sglang.srt.entrypoints.openai"


class SeamError(RuntimeError):
    """This SGLang does not have a seam as we know it."""


@dataclass(frozen=True, slots=True)
class Seam:
    """One hook: where, how, why, since when, and what its function must look like."""

    module: str
    name: str  # attribute path inside the module
    kind: HookType
    why: str
    needs: tuple[str, ...]  # parameters that must be there, in this order
    reads: str  # what we read from the arguments or the object
    since: str = OLDEST
    until: str = ""  # first version without it; "" = still there

    @property
    def target(self) -> str:
        return f"{self.module}.{self.name}"

    def is_in(self, sglang: Version) -> bool:
        if self.until and sglang >= Version(self.until):
            return False
        return sglang >= Version(self.since)


_A, _B = HookType.AROUND, HookType.AFTER

# The parser rows are hooked in every SGLang process that loads plugins, flag or no flag: the flag
# has to be known before it can be given. All other rows exist only where the flag is on.
PARSER = (
    Seam("sglang.srt.server_args", "ServerArgs.add_cli_args", _B, "adds the --deepprune flags",
         ("parser",), "the parser"),
    Seam("sglang.srt.server_args", "ServerArgs.from_cli_args", _A,
         "turns the flags into a config, checks seams and modes, activates the rest",
         ("cls", "args"), "args.deepprune_*; the ServerArgs' modes"),
)  # fmt: skip

TOKENIZER = (
    Seam(f"{_MANAGERS}.tokenizer_manager", "TokenizerManager.generate_request", _A,
         "refuses more siblings than a group can have before SGLang makes n copies of the inputs",
         ("self", "obj", "request"), "obj.sampling_params"),
    Seam(f"{_MANAGERS}.tokenizer_manager", "TokenizerManager._handle_batch_request", _A,
         "knows an n>1 request before it is fanned out; shapes its reply",
         ("self", "obj", "request"), "obj.parallel_sample_num, batch_size, sampling_params, rid"),
    Seam(f"{_MANAGERS}.tokenizer_manager", "TokenizerManager._send_one_request", _A,
         "tags each sibling on its way to the scheduler",
         ("self", "tokenized_obj"), "tokenized_obj.sampling_params, input_ids, rid"),
    Seam(f"{_MANAGERS}.tokenizer_manager", "TokenizerManager._send_batch_request", _A,
         "the same for a batch of prompts as token ids: members of client-side groups",
         ("self", "tokenized_objs"), "the same of each"),
    Seam(f"{_MANAGERS}.tokenizer_manager", "TokenizerManager._wait_one_response", _A,
         "moves our record from the finish reason into meta_info",
         ("self", "obj", "request"), "out['meta_info']['finish_reason']"),
    Seam(f"{_MANAGERS}.tokenizer_manager", "TokenizerManager.abort_request", _A,
         "a group's own rid aborts its siblings",
         ("self", "rid", "abort_all"), "rid"),
    Seam(f"{_OPENAI}.serving_completions", "OpenAIServingCompletion._build_completion_response",
         _A, "metadata.deepprune", ("self", "request", "ret", "created"), "ret[*]['meta_info']"),
    Seam(f"{_OPENAI}.serving_completions", "OpenAIServingCompletion._generate_completion_stream",
         _A, "one last chunk with the record before [DONE]",
         ("self", "adapted_request", "request", "raw_request"), "the SSE lines"),
    Seam(f"{_OPENAI}.serving_chat", "OpenAIServingChat._build_chat_response", _A,
         "metadata.deepprune", ("self", "request", "ret", "created"), "ret[*]['meta_info']"),
    Seam(f"{_OPENAI}.serving_chat", "OpenAIServingChat._generate_chat_stream", _A,
         "one last chunk with the record before [DONE]",
         ("self", "adapted_request", "request", "raw_request"), "the SSE lines"),
)  # fmt: skip

SCHEDULER = (
    Seam(f"{_MANAGERS}.scheduler", "Scheduler.__init__", _B,
         "builds the coordinator; checks the seams where a raise stops the server", ("self",),
         "server_args, tokenizer, ranks, pools, metrics_collector"),
    Seam(f"{_MANAGERS}.scheduler", "Scheduler.init_model_worker", _A,
         "a judge on a GPU takes its memory before the KV pool is sized", ("self",),
         "server_args, ranks"),
    Seam(f"{_MANAGERS}.scheduler", "Scheduler._add_request_to_queue", _A,
         "admits siblings; answers those of a settled group without a prefill",
         ("self", "req", "is_retracted"), "req.sampling_params.custom_params"),
    Seam(f"{_MANAGERS}.scheduler", "Scheduler.abort_request", _A,
         "a group's own rid aborts its siblings, with several tokenizer workers too",
         ("self", "recv_req"), "recv_req.rid, abort_all"),
    Seam(f"{_MANAGERS}.scheduler", "Scheduler.process_input_requests", _A,
         "applies verdicts at one step on every rank", ("self", "recv_reqs"), "recv_reqs"),
    Seam(f"{_MANAGERS}.scheduler", "Scheduler._poll_timeout_aborts", _A,
         "rank 0's verdicts ride the request broadcast; a sibling's waiting time-out counts from "
         "its claim", ("self",), "the list it returns; waiting_queue", since="0.5.20"),
    Seam(f"{_MANAGERS}.scheduler", "Scheduler._abort_on_waiting_timeout", _A,
         "a sibling's waiting time-out counts from its claim", ("self",), "waiting_queue",
         until="0.5.20"),
    Seam(f"{_MANAGERS}.scheduler", "Scheduler.is_fully_idle", _A,
         "a group with held siblings is no idle server", ("self", "for_health_check"),
         "waiting_queue"),
    Seam(f"{_MANAGERS}.scheduler", "Scheduler.get_internal_state", _B,
         "settings and health in /server_info", ("self", "recv_req"), "internal_state"),
    Seam(f"{_MANAGERS}.scheduler_components.load_inquirer", "SchedulerLoadInquirer.get_loads", _A,
         "held siblings count as load, for /v1/loads and the DP balancer", ("self",),
         "waiting_queue"),
    Seam(f"{_MANAGERS}.scheduler", "Scheduler._get_new_batch_prefill_raw", _A,
         "siblings beyond the claims start where rows are free, and yield; so do probes",
         ("self", "prefill_delayer_single_pass"),
         "running_batch.reqs, batch_is_full; waiting_queue; get_num_allocatable_reqs"),
    Seam(f"{_MANAGERS}.scheduler_components.request_receiver",
         "SchedulerRequestReceiver._pull_raw_reqs", _B,
         "rank 0's verdicts ride the request broadcast", ("self",), "the list it returns",
         until="0.5.20"),
    Seam(f"{_MANAGERS}.scheduler", "Scheduler.update_running_batch", _A,
         "probes and dispensable siblings give way before SGLang retracts anybody",
         ("self", "batch"),
         "batch.reqs, check_decode_mem, release_req, filter_batch"),
    Seam(f"{_MANAGERS}.scheduler_components.batch_result_processor",
         "SchedulerBatchResultProcessor.process_batch_result_decode", _A,
         "the decode step: votes seen before SGLang finishes them, windows, doomed siblings",
         ("self", "batch", "result"), "batch.reqs, result.next_token_ids, copy_done"),
    Seam(f"{_MANAGERS}.scheduler_components.batch_result_processor",
         "SchedulerBatchResultProcessor.process_batch_result_prefill", _A,
         "first tokens, and decode rows of mixed batches",
         ("self", "batch", "result"), "batch.reqs, result.next_token_ids, copy_done"),
    Seam(f"{_MANAGERS}.scheduler_components.output_streamer",
         "SchedulerOutputStreamer.stream_output", _A,
         "the one door through which a sibling ends; carries choice and record; no probe passes",
         ("self", "reqs", "return_logprob", "skip_req"), "req.finished(), finished_reason"),
    Seam(f"{_MANAGERS}.scheduler_components.output_sender", "SenderWrapper.send_output", _A,
         "the other door: siblings aborted, refused or timed out in a queue",
         ("self", "output", "recv_obj"), "AbortReq.rid, finished_reason"),
    Seam("sglang.srt.model_executor.model_runner", "ModelRunner.sample", _A,
         "knows which rows are being sampled; a probe's token is the best one",
         ("self", "logits_output", "forward_batch"),
         "forward_batch.rids; logits_output.next_token_logits"),
    Seam("sglang.srt.layers.sampler", "Sampler._sample_from_probs", _A,
         "sibling i of a seeded request draws from (seed, i)",
         ("self", "probs", "sampling_info", "positions"), "probs, positions, top_ks, top_ps"),
)  # fmt: skip


_SOURCE = HookSource("deepprune", "sglang-deepprune")  # what SGLang's log calls us
_installed: dict[tuple[str, Callable[..., Any]], Any] = {}  # (target, hook) -> our wrapper


def table() -> str:
    """The seam table as Markdown; docs/design.md holds it, and a test compares the two."""
    lines = ["| seam | kind | versions | why | reads |", "| --- | --- | --- | --- | --- |"]
    for seam in PARSER + TOKENIZER + SCHEDULER:
        versions = f"before {seam.until}" if seam.until else f"since {seam.since}"
        module = seam.module.removeprefix("sglang.srt.")
        lines.append(
            f"| `{module}:{seam.name}` | {seam.kind.value} | {versions} | {seam.why} "
            f"| {seam.reads} |"
        )
    return "\n".join(lines) + "\n"


def sglang_version() -> Version:
    """The installed SGLang. Raises SeamError where there is none."""
    try:
        return Version(version("sglang"))
    except PackageNotFoundError as error:
        raise SeamError("deepprune needs an installed SGLang, and none was found") from error


def is_known(sglang: Version) -> bool:
    return Version(OLDEST) <= Version(sglang.base_version) <= Version(NEWEST)


def rows(seams: Sequence[Seam]) -> tuple[Seam, ...]:
    """The rows that this SGLang has."""
    sglang = Version(sglang_version().base_version)
    return tuple(seam for seam in seams if seam.is_in(sglang))


def register(seams: Sequence[Seam], hooks: dict[str, Callable[..., Any]]) -> None:
    """Hand rows to SGLang, which applies them with those of the other plugins; `hooks` maps a row's
    `name` to our function. For SGLang's `load_plugins`: it only logs a hook that does not apply."""
    for seam in rows(seams):
        HookRegistry.register(seam.target, hooks[seam.name], seam.kind)


def install(seams: Sequence[Seam], hooks: dict[str, Callable[..., Any]]) -> None:
    """Wrap rows around what stands there now; what has our hook already keeps it.

    Raises SeamError for the first that does not take it.
    """
    for seam in rows(seams):
        hook = hooks[seam.name]
        if not _holds(seam, hook):
            try:
                HookRegistry._apply_target(seam.target, [(seam.kind, hook, _SOURCE)])
            except Exception as error:  # anything: it comes from SGLang's side
                _refuse(seam, f"did not take our hook ({error})")
            _installed[seam.target, hook] = _resolve(seam)


def check(seams: Sequence[Seam], hooks: dict[str, Callable[..., Any]] | None = None) -> None:
    """Resolve every row and compare its parameters; with `hooks`, read the rows back as well.

    Raises SeamError naming the seam and the supported window.
    """
    for seam in rows(seams):
        function = _resolve(seam)
        names = tuple(inspect.signature(inspect.unwrap(function)).parameters)
        if tuple(name for name in names if name in seam.needs) != seam.needs:
            _refuse(seam, f"has the parameters ({', '.join(names)})")
        if hooks is not None and not _holds(seam, hooks[seam.name]):
            _refuse(seam, "did not take our hook")


def loaded(seams: Sequence[Seam]) -> tuple[Seam, ...]:
    """The rows whose module this process has imported: a role is what a process imports."""
    return tuple(seam for seam in seams if seam.module in sys.modules)


def _resolve(seam: Seam) -> Any:
    try:
        found: Any = importlib.import_module(seam.module)
        for part in seam.name.split("."):
            parent, found = found, inspect.getattr_static(found, part)
    except (ImportError, AttributeError):
        _refuse(seam, "is not there")
    if isinstance(found, (classmethod, staticmethod)):
        return found.__func__
    return getattr(parent, seam.name.rsplit(".", 1)[-1])


def _holds(seam: Seam, hook: Callable[..., Any]) -> bool:
    """Whether our wrapper is what stands there, or is wrapped in it by other plugins."""
    ours, found = _installed.get((seam.target, hook)), _resolve(seam)
    while found is not ours:
        found = getattr(found, "__wrapped__", None)
        if found is None:
            return False
    return True


def _refuse(seam: Seam, what: str) -> NoReturn:
    raise SeamError(
        f"deepprune cannot start: {seam.target} {what} in SGLang {sglang_version()}, "
        f"but {seam.why!r} needs ({', '.join(seam.needs)}); supported: {WINDOW}"
    )
