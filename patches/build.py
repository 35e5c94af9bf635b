"""Builds the engine of one scheduler process, and says in one line what is active."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

from sglang_deepprune import __version__
from sglang_deepprune.answers import Fence
from sglang_deepprune.config import DeepPruneConfig
from sglang_deepprune.coordinator import Coordinator
from sglang_deepprune.ending import mark_ids_of
from sglang_deepprune.judges.permission import sentence
from sglang_deepprune.judging import JudgeWorker
from sglang_deepprune.metrics import JUDGE_FAILURES, Failure
from sglang_deepprune.patches import metrics, seams, server_args
from sglang_deepprune.patches.scheduler import Engine
from sglang_deepprune.probing import ProbeDesk, is_probe
from sglang_deepprune.truncation import plain_decoder

logger = logging.getLogger(__name__)


_early: JudgeWorker | None = None  # one that was started before the model


def start_judge_early(scheduler: Any, config: DeepPruneConfig) -> None:
    """A judge on a GPU loads before the server's model: SGLang measures afterwards what is free for
    its KV pool (`KVCacheConfigurator._profile_available_bytes` in 0.5.23)."""
    global _early
    if config.judge_device == "cpu" or config.judge == "none" or not _is_leader(scheduler):
        return
    _early = _worker(config)
    _early.start()
    if not _early.wait_loaded():
        logger.warning("deepprune: the judge could not load; nothing is pruned by it")


def _worker(config: DeepPruneConfig) -> JudgeWorker:
    return JudgeWorker(
        config.judge, config.judge_deadline_ms / 1000,
        device=config.judge_device, memory_mib=config.judge_mem,
        attention=config.judge_attention, gpu=config.judge_gpu,
    )  # fmt: skip


def agreed(scheduler: Any, config: DeepPruneConfig) -> DeepPruneConfig:
    """The settings of all ranks. Each node reads a command line and a judge's card of its own, and
    draws a token of its own (`server_args.Carrier`): those of the first rank hold."""
    args = scheduler.server_args
    if int(getattr(args, "nnodes", 1) or 1) < 2:
        return config
    from sglang.srt.distributed.parallel_state import get_world_group

    ours = (dataclasses.asdict(config), server_args.token_of(args))
    values, token = get_world_group().broadcast_object(ours)
    carrier = server_args.Carrier(DeepPruneConfig(**values), token)
    setattr(args, server_args.ATTRIBUTE, carrier)
    return carrier.config


def build_engine(scheduler: Any, config: DeepPruneConfig) -> Engine:
    """Children (judge, answer fence) exist on the leader only: the rank that reads requests."""
    is_leader = _is_leader(scheduler)
    judge: JudgeWorker | ProbeDesk | None = None
    fence = None
    if is_leader:
        fence = Fence()
        fence.warm_up()
        if config.judge != "none":
            judge = _early or _worker(config)
            if is_probe(config.judge):
                judge = ProbeDesk(judge)
            judge.start()
    tokenizer = scheduler.tokenizer

    def decode(ids: Any) -> str:
        # Control tokens stay visible: they mark where the thinking ends.
        return str(tokenizer.decode(list(ids), skip_special_tokens=False))

    meter = metrics.meter_of(scheduler, is_leader=is_leader, has_judge=judge is not None)
    if judge is not None:
        worker = judge.worker if isinstance(judge, ProbeDesk) else judge
        worker.meter = meter
        if worker.is_disabled:  # it could not load before the model
            meter.count(JUDGE_FAILURES, value=Failure.OFF)
    if is_leader and getattr(scheduler.model_config, "is_multimodal", False):
        logger.warning(server_args.UNTESTED, "a multimodal model")
    coordinator = Coordinator(
        config, decode, read=plain_decoder(tokenizer), mark_ids=mark_ids_of(tokenizer),
        judge=judge, fence=fence, meter=meter,
    )  # fmt: skip
    if is_leader:
        logger.info(
            "deepprune %s is active: SGLang %s, %d seams, preset %s, %s, overlap %s, default %s",
            __version__, seams.sglang_version(), len(server_args.activated()), config.preset,
            sentence(config), "on" if scheduler.enable_overlap else "off", config.default,
        )  # fmt: skip
    return Engine(scheduler, config, coordinator)


def _is_leader(scheduler: Any) -> bool:
    """Rank 0 of those that share one waiting queue; SGLang's `ingest_requests` asks the same."""
    ranks = getattr(scheduler, "ps", None) or _parallel()
    return not (ranks.attn_tp_rank or ranks.attn_cp_rank or ranks.pp_rank)


def _parallel() -> Any:
    from sglang.srt.runtime_context import get_parallel  # where `scheduler.ps` is gone

    return get_parallel()
