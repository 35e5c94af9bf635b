"""No group crosses a change of the weights: nothing is decided on traces of two versions."""

from __future__ import annotations

from pathlib import Path

import pytest
import requests

from tests.engine.server import Server
from tests.engine.test_lazy import LONG, in_background, server_load, whole
from tests.engine.versions import before


def update(server: Server, tiny: Path, version: str, flush: bool = True) -> None:
    body = {"model_path": str(tiny), "weight_version": version, "flush_cache": flush}
    reply = server.post("/update_weights_from_disk", body)
    assert reply.status_code == 200 and reply.json()["success"], reply.text


def settled(server: Server) -> None:
    server.wait_idle()
    assert set(server.log_lines("deepprune-tables")[-1].values()) == {0}


@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_a_group_that_is_paused_for_new_weights_runs_on_as_plain_sampling(
    scripted: Server, tiny: Path, mode: str
):
    lazy = {"preset": "balanced", "base": 2, "widen": 0.0}  # three equal votes would decide it
    params = {"n": 12, "max_new_tokens": 400, "custom_params": {"deepprune": lazy}}
    thread, replies = in_background(scripted, {"text": LONG, "sampling_params": params})
    while server_load(scripted)["num_running_reqs"] < 2:
        assert thread.is_alive()
    assert scripted.post("/pause_generation", {"mode": mode}).status_code == 200
    # A flush that finds requests waiting ends SGLang's scheduler before 0.5.21, ours or nobody's;
    # one that finds them running is refused.
    update(scripted, tiny, mode, flush=mode == "retract" and not before("0.5.21"))
    assert scripted.post("/continue_generation", {}).status_code == 200
    outputs = whole(thread, replies)
    group = outputs[0]["meta_info"]["deepprune"]["group"]
    assert group["reason"] == "the weights changed: its siblings ran on as plain sampling"
    settled(scripted)


def test_members_of_before_and_after_are_not_one_group(scripted: Server, tiny: Path):
    def member() -> dict:
        named = {"group": f"across {scripted.name}", "size": 4, "preset": "collect"}
        output = scripted.generate(
            "D2: what is 2 + 2 =", max_new_tokens=400, custom_params={"deepprune": named}
        )
        return dict(output["meta_info"]["deepprune"]["group"])

    before = [member(), member()][-1]
    assert before["votes"] == [{"answer": "4", "votes": 2}] and not before["settled"]
    scripted.wait_idle()  # under overlap a row outlives its client's last output by a step
    update(scripted, tiny, "between")
    after = [member(), member()][-1]
    assert after["group_id"] != before["group_id"]
    assert after["votes"] == [{"answer": "4", "votes": 2}] and not after["settled"]
    last = [member(), member()][-1]
    assert last["settled"] and last["votes"] == [{"answer": "4", "votes": 4}]
    settled(scripted)


def test_new_weights_without_a_pause_wait_for_the_group(scripted: Server, tiny: Path):
    lazy = {"preset": "balanced", "base": 2, "widen": 0.0}
    params = {"n": 12, "max_new_tokens": 400, "custom_params": {"deepprune": lazy}}
    thread, replies = in_background(scripted, {"text": LONG, "sampling_params": params})
    while server_load(scripted)["num_running_reqs"] < 2:
        assert thread.is_alive()
    # Under overlap a row is still in the next batch when its client has its last output, so that
    # SGLang may refuse the flush that comes with the update.
    update(scripted, tiny, "waited", flush=False)
    thread.join(timeout=60)
    assert isinstance(replies[0], requests.Response) and replies[0].status_code == 200
    group = replies[0].json()[0]["meta_info"]["deepprune"]["group"]
    assert group["reason"].startswith("decided: ")
    settled(scripted)
