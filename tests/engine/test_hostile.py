"""Hostile clients of a real server: bad settings, hostile answers, and who waits for them."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests

from benchmarks.scripted import plugin_env, write_scripts
from sglang_deepprune.config import request_fields
from tests.engine import fault_plugin, scenario
from tests.engine.conftest import COMMON, ENVIRONMENTS
from tests.engine.server import Server

STEP_LIMIT_MS = 50.0
BUSY = 4.0  # other work on the machine evicts caches, which is CPU time too
PATHS = ("/generate", "/v1/completions", "/v1/chat/completions")

# What stands after `"deepprune": ` in the request, as JSON; and the field that the error names.
BAD = [
    ('{"tau": 1e300}', "tau"),
    ('{"tau": 1' + "0" * 300 + "}", "tau"),
    ('{"window": -1' + "0" * 300 + "}", "window"),
    ('{"base": null}', "base"),
    ('{"preset": ["paper"]}', "preset"),
    ('{"return": {"vote": 1}}', "return"),
    ('{"k2": "20"}', "k2"),
    ('{"seed": 1.5}', "seed"),
    ('{"base": true}', "base"),
    ('{"answer_field": "' + "x" * 300 + '"}', "answer_field"),
    ('{"\\u202egnp\\u0000": 1}', "custom_params"),
    ('{"judge": "python:os:getcwd"}', "judge"),
    ('{"enabled": "yes"}', "enabled"),
    ('{"group": 7}', "group"),
    ('{"group": "g", "size": 1e9}', "size"),
    ('"paper"', "custom_params"),
    ("[]", "custom_params"),
    ('{"k": ' + "[" * 60 + "]" * 60 + "}", "k"),
    ("{" + ",".join(f'"x{i}": 1' for i in range(500)) + "}", "custom_params"),
]
# What SGLang's own JSON parser refuses, or makes something else of. Ours never sees it.
UNREADABLE = [
    '{"tau": 1e400}', '{"tau": NaN}', '{"window": 1' + "0" * 4000 + "}", '{"preset": "\\ud800"}',
    '{"answer_field": "\\udfff"}', '{"k": ' + "[" * 100_000 + "]" * 100_000 + "}",
]  # fmt: skip
# What SGLang takes for `custom_params` although it is no object.
STRANGE = ['"deepprune"', '["deepprune", "__deepprune"]', "7", '"x"', "[]", "false"]


def body_of(path: str, custom: str, n: int = 2, stream: bool = False, text: str = "hello") -> bytes:
    """A request as bytes: `requests` would refuse to write some of these values."""
    more = f'"n": {n}, "custom_params": {custom}'
    if path == "/generate":
        said = f'"text": {json.dumps(text)}, "sampling_params": {{"max_new_tokens": 4, {more}}}'
    elif path == "/v1/completions":
        said = f'"model": "m", "prompt": {json.dumps(text)}, "max_tokens": 4, {more}'
    else:
        message = json.dumps({"role": "user", "content": text})
        said = f'"model": "m", "messages": [{message}], "max_tokens": 4, {more}'
    return f'{{{said}, "stream": {json.dumps(stream)}}}'.encode()


def send(server: Server, path: str, body: bytes) -> requests.Response:
    headers = {"Content-Type": "application/json"}
    return requests.post(f"{server.url}{path}", data=body, headers=headers, timeout=120)


def error_of(path: str, reply: requests.Response) -> str:
    """The message of an error in the form that this API has for it, streamed or not."""
    is_stream = reply.headers["content-type"].startswith("text/event-stream")
    if is_stream:
        lines = [line for line in reply.text.split("\n\n") if line]
        assert lines[-1] == "data: [DONE]", lines
        body: Any = json.loads(lines[0].removeprefix("data: "))
    else:
        assert reply.status_code == 400, (reply.status_code, reply.text[:300])
        body = reply.json()
    said = body.get("error", body)
    if path != "/generate" or is_stream:
        assert said["code"] == 400 and said["type"], body
    return str(said["message"])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_bad_setting_is_the_apis_own_error(scripted: Server, path: str, stream: bool):
    for n in (1, 2):
        for value, field in BAD:
            reply = send(scripted, path, body_of(path, f'{{"deepprune": {value}}}', n, stream))
            message = error_of(path, reply)
            assert f"deepprune.{field}: " in message and len(message) < 1000, (value[:60], message)
    for value in UNREADABLE:
        reply = send(scripted, path, body_of(path, f'{{"deepprune": {value}}}', 2, stream))
        assert reply.status_code < 500, (value[:60], reply.text[:300])
    reply = send(scripted, path, body_of(path, '{"deepprune": {"preset": "paper"}}', 2))
    assert reply.status_code == 200, reply.text
    scripted.wait_idle()
    assert "live groups run on" not in scripted.log


def test_custom_params_that_are_no_object_are_not_ours(scripted: Server):
    """Nor do they reach a scheduler that would die of them."""
    is_typed = ENVIRONMENTS.get(scripted.name, {}).get("SGLANG_USE_PICKLE_IPC") == "0"
    for n in (1, 2):
        for value in STRANGE:
            reply = send(scripted, "/generate", body_of("/generate", value, n))
            assert reply.status_code == (400 if is_typed else 200), (value, reply.text[:300])
            assert not is_typed or "deepprune.custom_params" in reply.text
    scripted.wait_idle()
    assert scripted.is_alive


# -- a server of its own ---------------------------------------------------------------------------

USERS = ("alpha", "beta")


def said_by(user: str, index: int) -> str:
    """A trace full of its user's canaries; the answer needs the fence."""
    body = " ".join(f"canary-{user}-{word}" for word in scenario.WORDS)
    # Its number first: the judge is not asked about traces that begin alike.
    return f"<A> turn {index} {body} so \\boxed{{x+{index % 2}+canary_{user}}}"


UNITS = ", ".join(f"{i}x kilograms" for i in range(40))
HOSTILE = {
    "braces": "{" * 1200,
    "cues": "the answer is " * 300,
    "option": "Option " + "<|im_end|>" * 120,
    "spaces": "the answer" + " " * 1100 + "is",
    "units": f"\\boxed{{{UNITS}}}",
    "powers": "\\boxed{" + "+".join(["9^{9999}"] * 60) + "}",
    "roots": "\\boxed{" + "+".join(["\\sqrt[3]{8^{5000}/27^{900}}"] * 20) + "}",
    "boxes": "\\boxed{1}" * 130,
    "json": '{"answer": ' * 100,
}


def write_own(tokenizer: Any, path: Path) -> None:
    texts = {f"canary-{user}-prompt": [said_by(user, i) for i in range(6)] for user in USERS}
    texts["hostile answers"] = [f"{text} {i}" for i, text in enumerate(HOSTILE.values())]
    texts["hostile sets"] = [
        "\\boxed{" + ", ".join(f"{i + j}x kilograms" for j in range(30)) + "}" for i in range(8)
    ]
    write_scripts(
        path,
        {tuple(tokenizer.encode(prompt)): scenario.token_lists(tokenizer, said)
         for prompt, said in texts.items()},
    )  # fmt: skip


@pytest.fixture(scope="module")
def own(tiny: Path, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Its judge raises, and quotes the trace; log at its most talkative, metrics on."""
    folder = tmp_path_factory.mktemp("hostile")
    write_own(tokenizer, folder / "scripts.json")
    first = fault_plugin.plugin_env(folder / "faults")
    second = plugin_env(folder / "scripts.json", folder / "scripted")
    env = second | {"PYTHONPATH": f"{second['PYTHONPATH']}:{first['PYTHONPATH']}"}
    flags = (
        *COMMON, "--deepprune-judge", "python:faulty_judges:raising", "--log-level", "debug",
        "--enable-metrics", "--deepprune-group-timeout-s", "2",
    )  # fmt: skip
    with Server(tiny, *flags, env=env) as server:
        deadline = time.monotonic() + 60
        while state_of(server)["deepprune"]["judge_state"] == "loading":
            assert time.monotonic() < deadline  # groups that end before it has loaded ask nobody
            time.sleep(0.2)
        yield server


def state_of(server: Server) -> dict[str, Any]:
    return dict(server.get("/server_info")["internal_states"][0])


def longest_ms(server: Server) -> dict[str, float]:
    """Function of ours -> CPU time of its longest call so far."""
    return dict(state_of(server)[fault_plugin.KEY]["longest_ms"])


def work_of(server: Server, user: str) -> list[str]:
    """All that one user is told, over every API and way out."""
    told: list[str] = []
    prompt = f"canary-{user}-prompt"
    settings = {
        "preset": "paper", "cut": "tokens", "cut_tokens": 32, "window": 4,
        "answer_field": f"canary-{user}-field",
    }  # fmt: skip
    params = {"max_new_tokens": 400, "custom_params": {"deepprune": settings}}
    for _ in range(2):
        told.append(
            server.post("/generate", {"text": prompt, "sampling_params": {**params, "n": 6}}).text
        )
        body = {"model": "m", "n": 4, "max_tokens": 400, "custom_params": params["custom_params"]}
        pieces: dict[int, str] = {}  # a chunk may end in the middle of a canary
        for chunk in server.stream("/v1/completions", {**body, "prompt": prompt}):
            for one in chunk["choices"]:
                pieces[one["index"]] = pieces.get(one["index"], "") + one["text"]
            told.append(json.dumps({**chunk, "choices": []}))
        told += pieces.values()
        group = {**settings, "group": f"canary-{user}-group", "size": 3}
        one = {**params, "custom_params": {"deepprune": group}}
        with ThreadPoolExecutor(3) as pool:
            bodies = [{"text": prompt, "sampling_params": one}] * 3
            told += [
                reply.text for reply in pool.map(lambda b: server.post("/generate", b), bodies)
            ]
        for bad in ({"preset": f"canary-{user}-preset"}, {"window": f"canary-{user}-window"},
                    f"canary-{user}-object"):  # fmt: skip
            custom = {"custom_params": {"deepprune": bad}, "n": 2}
            told.append(server.post("/generate", {"text": prompt, "sampling_params": custom}).text)
        leaving = requests.post(
            f"{server.url}/generate", stream=True, timeout=120,
            json={"text": prompt, "stream": True, "sampling_params": {**params, "n": 6}},
        )  # fmt: skip
        next(leaving.iter_lines())
        leaving.close()
    return told


@pytest.mark.modes
def test_no_text_of_a_request_is_in_anothers_reply_nor_in_log_or_metrics(own: Server):
    with ThreadPoolExecutor(len(USERS)) as pool:
        told = dict(zip(USERS, pool.map(lambda user: work_of(own, user), USERS), strict=True))
    own.wait_idle()
    for user in USERS:
        other = next(one for one in USERS if one != user)
        assert sum(f"canary-{user}" in text for text in told[user]) >= 16
        assert not [text for text in told[user] if other in text]
    # SGLang has a server argument of that name.
    marks = [f"canary{joint}{user}" for user in USERS for joint in "-_"]
    quoted = [line for line in own.log.splitlines() if any(mark in line for mark in marks)]
    assert not quoted, quoted[:3]
    assert "gives no verdict" in own.log  # the judge did raise
    metrics = requests.get(f"{own.url}/metrics", timeout=60).text
    assert "sglang" in metrics and not [mark for mark in marks if mark in metrics]


@pytest.mark.modes
def test_hostile_answers_hold_up_no_decode_step(own: Server):
    for prompt, n in (("hostile answers", len(HOSTILE)), ("hostile sets", 8)):
        outputs = own.generate(
            prompt, n=n, max_new_tokens=1500, temperature=1.0,
            custom_params={"deepprune": {"preset": "latency", "eps": 0.0, "window": 1}},
        )  # fmt: skip
        reasons = {output["meta_info"]["finish_reason"]["type"] for output in outputs}
        assert reasons == {"stop"}, reasons
    own.wait_idle()
    found = longest_ms(own)
    print("longest calls of ours, ms of CPU:", {k: round(v, 1) for k, v in found.items()})
    assert {"before_result", "poll"} <= found.keys()
    slow = {name: ms for name, ms in found.items() if ms > BUSY * STEP_LIMIT_MS}
    assert not slow, slow
    assert "live groups run on" not in own.log


def longest_wait_s(server: Server, path: str, body: bytes) -> float:
    """How long a cheap request waits at most while another one is answered."""
    is_over = threading.Event()
    waits: list[float] = []

    def ask() -> None:
        with requests.Session() as session:
            while not is_over.is_set():
                start = time.monotonic()
                session.get(f"{server.url}/model_info", timeout=60)
                waits.append(time.monotonic() - start)
                time.sleep(0.002)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        time.sleep(0.05)
        send(server, path, body)
    finally:
        is_over.set()
        thread.join()
    return max(waits)


# Each with the key of ours, and with another one that nobody reads: SGLang's own share.
LONG = {
    "a megabyte of text": '{"KEY": {"answer_field": "' + "x" * 1_000_000 + '"}}',
    "fifty thousand names": '{"KEY": {' + ",".join(f'"n{i}": 1' for i in range(50_000)) + "}}",
    "nested lists": '{"KEY": {"k": ' + "[" * 900 + "]" * 900 + "}}",
    "a long number": '{"KEY": {"seed": ' + "9" * 300 + "}}",
}


@pytest.mark.modes
@pytest.mark.parametrize("name", LONG)
def test_a_cheap_request_does_not_wait_for_hostile_settings(own: Server, name: str):
    waits: dict[str, list[float]] = {"deepprune": [], "nobodys": []}
    for _ in range(5):
        for key, found in waits.items():
            custom = LONG[name].replace("KEY", key)
            found.append(longest_wait_s(own, "/generate", body_of("/generate", custom)))
    reply = send(own, "/generate", body_of("/generate", LONG[name].replace("KEY", "deepprune")))
    assert reply.status_code == 400, reply.text[:300]
    ours, theirs = (min(found) for found in waits.values())
    print(f"{name}: a cheap request waits {ours * 1e3:.0f} ms, without us {theirs * 1e3:.0f} ms")
    assert ours - theirs < BUSY * STEP_LIMIT_MS / 1e3
    assert longest_ms(own)["_fan_of"] < BUSY * STEP_LIMIT_MS


@pytest.mark.modes
def test_a_list_of_prompts_with_settings_of_its_own_each_holds_up_nobody(own: Server):
    """The checks of a whole list run in one go."""
    count = 300
    names = sorted(request_fields())
    assert "seed" in names
    each = [{"n": 2, "max_new_tokens": 1, "custom_params": {"deepprune": {"seed": i, "k1": 3}}}
            for i in range(count)]  # fmt: skip
    body = json.dumps({"text": ["hello"] * count, "sampling_params": each}).encode()
    longest_wait_s(own, "/generate", body)
    own.wait_idle()
    assert longest_ms(own)["_fan_of"] < BUSY * STEP_LIMIT_MS
