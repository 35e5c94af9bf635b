"""Groups and SGLang's own orders of the queue: longest prefix first, and priorities.

Two rows, scripted tokens, strict memory checks on. Who starts when is read from the streams: a
client's first chunk of a choice follows its prefill. `base` 2 keeps two siblings of a group going,
so each one that ends claims a held one while others wait in SGLang's queue.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks import bench_plugin
from tests.engine import scenario
from tests.engine.conftest import COMMON, MARKER
from tests.engine.server import Server
from tests.engine.test_fill import joined
from tests.engine.test_groups import ask, group_of, states
from tests.engine.test_lazy import DISAGREE, LONG, server_load

pytestmark = pytest.mark.modes

ROWS, FLAT_ROWS = 2, 8
TWO_AT_A_TIME = {"preset": "balanced", "base": 2, "widen": 0.0, "eps": 0.0}
LOW, HIGH = 0, 5  # within SGLang's preemption threshold of 10: only the queue's order changes
URGENT = 100  # beyond it


@pytest.fixture(scope="module")
def lpm(tiny: Any, scripts_env: Any) -> Iterator[Server]:
    flags = ("--schedule-policy", "lpm", "--max-running-requests", str(ROWS))
    with Server(tiny, *COMMON, *MARKER, *flags, env=scripts_env) as server:
        yield server


@pytest.fixture(scope="module")
def priority(tiny: Any, scripts_env: Any) -> Iterator[Server]:
    flags = ("--enable-priority-scheduling", "--max-running-requests", str(ROWS))
    with Server(tiny, *COMMON, *MARKER, *flags, env=scripts_env) as server:
        yield server


@pytest.fixture(scope="module")
def flat(tiny: Any, scripts_env: Any, tmp_path_factory: Any) -> Iterator[Server]:
    """With priorities, and rows that cost nothing."""
    bench = bench_plugin.plugin_env(
        tmp_path_factory.mktemp("bench"), flat_ms=15.0, is_deepprune_on=True
    )
    flags = ("--enable-priority-scheduling", "--max-running-requests", str(FLAT_ROWS),
             "--deepprune-fill", "0.25")  # fmt: skip
    with Server(tiny, *COMMON, *MARKER, *flags, env=joined(scripts_env, bench)) as server:
        yield server


class Client:
    """A streamed request in a thread of its own: when each choice began, and how it ended."""

    def __init__(self, server: Server, body: dict[str, Any]):
        self.server = server
        self.body = body
        self.began: dict[int, float] = {}  # choice -> time of its first token
        self.last: dict[int, dict[str, Any]] = {}  # choice -> its terminal chunk
        self.group: dict[str, Any] = {}
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._read)
        self.thread.start()

    def _read(self) -> None:
        try:
            for chunk in self.server.stream("/generate", self.body):
                index, meta = chunk.get("index", 0), chunk["meta_info"]
                if meta["completion_tokens"]:
                    self.began.setdefault(index, time.monotonic())
                if meta["finish_reason"]:
                    self.last[index] = chunk
                self.group = meta.get("deepprune", {}).get("group") or self.group
        except BaseException as error:
            self.error = error

    def join(self) -> Client:
        self.thread.join(timeout=120)
        assert not self.thread.is_alive(), "the client hangs"
        assert self.error is None, self.error
        return self

    @property
    def cached(self) -> list[int]:
        """Tokens of the prompt that each choice that began did not prefill."""
        return [self.last[index]["meta_info"]["cached_tokens"] for index in sorted(self.began)]


def group(server: Server, prompt: str, n: int, priority: int | None = None) -> Client:
    params = {"n": n, "max_new_tokens": 400, "custom_params": {"deepprune": TWO_AT_A_TIME}}
    return Client(server, {"text": prompt, "sampling_params": params, "priority": priority})


def ordinary(server: Server, text: str, tokens: int, priority: int | None = None) -> Client:
    params = {"max_new_tokens": tokens, "ignore_eos": True, "temperature": 0.0}
    return Client(server, {"text": text, "sampling_params": params, "priority": priority})


def wait_for(server: Server, *, running: int, waiting: int = 0) -> None:
    """Until that many requests run and at least that many wait, held ones included."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        load = server_load(server)
        if load["num_running_reqs"] == running and load["num_waiting_reqs"] >= waiting:
            return
        time.sleep(0.01)
    raise AssertionError(f"not {running} running and {waiting} waiting: {server_load(server)}")


def settled(server: Server) -> None:
    server.wait_idle()
    assert set(server.log_lines("deepprune-tables")[-1].values()) == {0}
    assert "live groups run on as plain sampling" not in server.log


# -- lpm -----------------------------------------------------------------------------------------


def test_longest_prefix_first_orders_claims_and_strangers_and_all_are_served(lpm: Server):
    known = " ".join(["known:", *scenario.WORDS * 10])  # a longer prefix than the group's
    lpm.generate(known, max_new_tokens=1, temperature=0.0)
    for unknown in ("xyz: nothing", "Queer, none", "no, zero"):  # threads may see it out of order
        siblings = group(lpm, scenario.ORDER, 6)
        wait_for(lpm, running=ROWS, waiting=4)
        far = ordinary(lpm, f"{unknown} of it is cached", 8)
        near = ordinary(lpm, f"{known} so {unknown}", 8)
        wait_for(lpm, running=ROWS, waiting=6)
        for client in (siblings, far, near):
            client.join()
        for client in (far, near):
            assert client.last[0]["meta_info"]["completion_tokens"] == 8
        prompt = siblings.last[0]["meta_info"]["prompt_tokens"]
        assert near.cached[0] > prompt and prompt > 32
        assert len(siblings.cached) == 6 and min(siblings.cached) >= prompt - 1
        assert siblings.group["votes"][0] == {"answer": "5", "votes": 3}
        for index, text in enumerate(scenario.PROMPTS[scenario.ORDER]):
            assert siblings.last[index]["text"] == text
        # The first free row goes to the longest cached prefix, though it came last, and whose
        # prompt nobody has cached waits, as under lpm it does, but not for ever.
        claim = min(siblings.began[index] for index in range(ROWS, 6))
        order = near.began[0], claim, far.began[0]
        if order == tuple(sorted(order)):
            break
    assert order == tuple(sorted(order)), "near, claim, far"
    settled(lpm)


def test_a_stranger_is_served_as_soon_as_the_vote_is_decided(lpm: Server):
    waiting = threading.Event()
    found: list[Any] = []

    def vote() -> None:
        waiting.set()
        found.extend(ask(lpm, LONG, 12, {**TWO_AT_A_TIME, "eps": 0.05}))

    thread = threading.Thread(target=vote)
    thread.start()
    waiting.wait()
    wait_for(lpm, running=ROWS, waiting=10)
    stranger = ordinary(lpm, "pqr: nothing of it is cached", 8).join()
    thread.join()
    assert stranger.last[0]["meta_info"]["completion_tokens"] == 8
    assert states(found)[:3] == ["finished"] * 3 and group_of(found)["answer"] == "1"
    assert "not_started" in states(found)
    settled(lpm)


# -- priorities ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("theirs", "yields"), [(HIGH, True), (LOW, False)])
def test_held_siblings_start_after_ordinary_requests_of_a_higher_priority(
    priority: Server, theirs: int, yields: bool
):
    siblings = group(priority, LONG, 6, LOW)
    wait_for(priority, running=ROWS, waiting=4)
    others = [ordinary(priority, f"ordinary {i}", 40, theirs) for i in range(4)]
    wait_for(priority, running=ROWS, waiting=8)
    for client in (siblings, *others):
        client.join()
    claims = sorted(siblings.began[index] for index in range(ROWS, 6))
    came = sorted(other.began[0] for other in others)
    if yields:
        assert came[-1] < claims[0]
    else:  # among equals the group's place is that of its arrival
        assert claims[-1] < came[0]
    assert states_of(siblings) == ["finished"] * 6
    settled(priority)


def test_a_group_of_a_higher_priority_starts_first_its_held_siblings_too(priority: Server):
    before = [ordinary(priority, f"runs {i}", 200, LOW) for i in range(ROWS)]
    wait_for(priority, running=ROWS)
    waiting = [ordinary(priority, f"waits {i}", 20, LOW) for i in range(6)]
    wait_for(priority, running=ROWS, waiting=6)
    siblings = group(priority, scenario.ORDER, 6, HIGH)
    for client in (*before, *waiting, siblings):
        client.join()
    assert len(siblings.began) == 6
    # SGLang sends the siblings of a request when its warm-up has cached the prompt: some of those
    # that wait get a row beside it. From then on nobody does before the last held sibling.
    both, last = max(siblings.began[0], siblings.began[1]), max(siblings.began.values())
    came = [client.began[0] for client in waiting]
    assert not [at for at in came if both < at < last]
    assert sum(at > last for at in came) >= 3
    assert siblings.group["votes"][0] == {"answer": "5", "votes": 3}
    settled(priority)


def test_an_urgent_request_preempts_a_sibling_which_goes_on_with_its_text(priority: Server):
    siblings = group(priority, LONG, 4, LOW)
    wait_for(priority, running=ROWS, waiting=2)
    urgent = ordinary(priority, "urgent", 8, URGENT).join()
    assert siblings.thread.is_alive() and not siblings.last  # it waited for nobody's end
    siblings.join()
    assert urgent.last[0]["meta_info"]["completion_tokens"] == 8
    assert states_of(siblings) == ["finished"] * 4
    for index in range(4):
        assert siblings.last[index]["text"] == scenario.PROMPTS[LONG][index]
    assert priority.log_lines("deepprune-counts")[-1]["retracted"] >= 1
    settled(priority)


def test_free_rows_go_to_the_group_of_the_higher_priority(flat: Server):
    ask(flat, DISAGREE, 12, TWO_AT_A_TIME)  # the server learns that rows cost nothing
    first = group(flat, LONG, 12, HIGH)
    wait_for(flat, running=FLAT_ROWS)
    time.sleep(1.0)  # its first traces end well before those of the second group
    second = group(flat, LONG, 12, LOW)  # takes two rows from the first group's extras
    for client in (first, second):
        client.join()
    # By then the first group has eight votes and the second none: without priorities, the
    # second group's siblings would be next.
    assert max(first.began.values()) < min(second.began[index] for index in range(2, 12))
    assert states_of(first) == states_of(second) == ["finished"] * 12
    assert flat.log_lines("deepprune-counts")[-1]["yielded"] >= 2
    settled(flat)


def states_of(client: Client) -> list[str]:
    return [choice["state"] for choice in client.group["choices"]]
