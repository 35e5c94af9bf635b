"""What doctor says of versions, the environment and a live server; no SGLang is loaded here.

What needs SGLang's own parser and seams is in tests/engine/test_doctor.py.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from importlib import metadata
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_deepprune import cli, server_check
from sglang_deepprune.findings import Finding, as_json, as_text, exit_code
from sglang_deepprune.patches import doctor, support
from tests.unit.fake_http import FakeHandler, FakeServer, running

GOOD = metadata.EntryPoint("deepprune", "sglang_deepprune.patches:register", doctor._GROUP)


@pytest.fixture
def set_up(monkeypatch):
    """A sound set-up whose version and entry points a test may change."""
    found = SimpleNamespace(version="0.5.23", points=[GOOD])

    def version(name: str) -> str:
        if found.version is None:
            raise metadata.PackageNotFoundError(name)
        return found.version

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(metadata, "entry_points", lambda group: found.points)
    monkeypatch.setattr(doctor, "_preflight", lambda argv, limit: [Finding("seams", "ok", "hold")])
    monkeypatch.delenv("SGLANG_PLUGINS", raising=False)
    return found


def of(findings: list[Finding], check: str) -> Finding:
    (one,) = [one for one in findings if one.check == check]
    return one


def test_a_sound_set_up_has_no_fault(set_up, capsys):
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "this machine" in out and out.endswith("no faults, no warnings.\n")


@pytest.mark.parametrize("version", ["0.5.14", "0.5.14.post3", "0.4.9", "0.5.2rc1"])
def test_an_older_sglang_is_a_fault_and_ends_the_checks(set_up, version):
    set_up.version = version
    findings = doctor.check_here(None)
    one = of(findings, "version")
    assert one.state == "fault" and exit_code(findings) == 1
    assert f"SGLang {version} is older than {support.OLDEST}" in one.sentence
    assert f'pip install "sglang=={support.NEWEST}"' in one.sentence
    assert not any(one.check == "seams" for one in findings)


@pytest.mark.parametrize("version", ["0.5.24", "0.6.0.dev1", "1.0"])
def test_a_newer_sglang_is_a_warning_and_is_checked(set_up, version):
    set_up.version = version
    findings = doctor.check_here(None)
    one = of(findings, "version")
    assert one.state == "warning" and exit_code(findings) == 0
    assert f"SGLang {version} is newer" in one.sentence and "if every seam holds" in one.sentence
    assert of(findings, "seams").state == "ok"


@pytest.mark.parametrize("version", [support.OLDEST, "0.5.19.post1", support.NEWEST, "0.5.23+cpu"])
def test_versions_of_the_window_are_well(set_up, version):
    set_up.version = version
    assert of(doctor.check_here(None), "version").state == "ok"


def test_no_sglang_is_a_fault_with_its_remedy(set_up):
    set_up.version = None
    one = of(doctor.check_here(None), "version")
    assert one.state == "fault" and "no SGLang is installed" in one.sentence
    assert "pip install" in one.sentence


@pytest.mark.parametrize("allowed", ["other", "other, deep-prune", " , ", "sglang_deepprune"])
def test_a_whitelist_without_us_is_a_fault(set_up, monkeypatch, allowed):
    monkeypatch.setenv("SGLANG_PLUGINS", allowed)
    one = of(doctor.check_here(None), "whitelist")
    assert one.state == "fault"
    assert repr(allowed) in one.sentence and "add deepprune to it" in one.sentence


@pytest.mark.parametrize("allowed", ["", "deepprune", "other, deepprune"])
def test_a_whitelist_with_us_is_none_of_our_business(set_up, monkeypatch, allowed):
    monkeypatch.setenv("SGLANG_PLUGINS", allowed)
    assert not any(one.check == "whitelist" for one in doctor.check_here(None))


def test_no_entry_point_is_a_fault_and_two_are_a_warning(set_up):
    set_up.points = []
    one = of(doctor.check_here(None), "entry-point")
    assert one.state == "fault" and "pip install sglang-deepprune" in one.sentence
    set_up.points = [GOOD, GOOD]
    one = of(doctor.check_here(None), "entry-point")
    assert one.state == "warning" and "pip uninstall" in one.sentence


def test_a_process_that_dies_is_a_fault_and_what_it_said_before_counts(monkeypatch):
    def run(command: list[str], **_: Any) -> Any:
        path = command[3]
        with open(path, "w", encoding="utf-8") as file:
            file.write(json.dumps({"check": "flag", "state": "ok", "sentence": "known"}) + "\n")
        return SimpleNamespace(returncode=-11, stderr="first\nSegmentation fault\n\n")

    monkeypatch.setattr(subprocess, "run", run)
    known, died = doctor._preflight(None, 1.0)
    assert known == Finding("flag", "ok", "known")
    assert died.state == "fault" and "ended with -11: Segmentation fault" in died.sentence


def test_a_process_that_hangs_is_a_fault(monkeypatch, tmp_path):
    script = tmp_path / "sleeps"
    script.write_text("sleep 60")
    real = subprocess.run
    monkeypatch.setattr(
        subprocess, "run", lambda command, **more: real(["/bin/sh", str(script)], **more)
    )
    (one,) = doctor._preflight(None, 0.2)
    assert one.state == "fault" and "did not end within 0.2 s" in one.sentence


@pytest.mark.parametrize(
    ("words", "flags"),
    [
        (["--model-path", "M", "--x"], ["--model-path", "M", "--x"]),
        (["sglang", "serve", "M", "--x"], ["--model-path", "M", "--x"]),
        (["/opt/bin/sglang", "serve", "--model-path", "M"], ["--model-path", "M"]),
        (["python", "-m", "sglang.launch_server", "--model-path", "M"], ["--model-path", "M"]),
        ([], []),
    ],
)
def test_a_whole_command_line_is_taken_for_its_flags(words, flags):
    assert doctor.server_flags(words) == flags


def test_flags_stand_behind_two_dashes_and_not_beside_a_url(set_up, monkeypatch, capsys):
    seen: list[Any] = []

    def preflight(argv: Any, limit_s: float) -> list[Finding]:
        seen.append(argv)
        return []

    monkeypatch.setattr(doctor, "_preflight", preflight)
    assert cli.main(["doctor", "--", "--enable-deepprune", "--json"]) == 0
    assert cli.main(["doctor", "--json", "--", "--config", "x.yaml"]) == 0
    assert cli.main(["doctor"]) == 0
    assert seen == [["--enable-deepprune", "--json"], ["--config", "x.yaml"], None]
    capsys.readouterr()
    assert cli.main(["doctor", "--url", "http://h:1", "--", "--x"]) == 2
    assert "flags are for one to come" in capsys.readouterr().err
    assert cli.main(["doctor", "--url", "http://h:1", "--timeout-s", "0"]) == 2
    with pytest.raises(SystemExit) as error:
        cli.main(["doctor", "--no-such-option"])
    assert error.value.code == 2


def test_findings_print_alike_for_people_and_for_programs():
    findings = [Finding("a", "ok", "well"), Finding("bee", "fault", "broken; mend it")]
    text = as_text(findings, "title")
    assert "ok       a    well" in text and "FAULT    bee  broken; mend it" in text
    assert text.endswith("1 fault, no warnings.")
    body = json.loads(as_json(findings, url="u"))
    assert (body["faults"], body["warnings"], body["url"]) == (1, 0, "u")
    assert body["findings"][1] == {"check": "bee", "state": "fault", "sentence": "broken; mend it"}
    assert exit_code(findings) == 1 and exit_code(findings[:1]) == 0


def test_untested_modes_are_told_from_flags_and_from_server_info():
    flags = argparse.Namespace(speculative_algorithm="EAGLE", device="cuda", enable_lora=None)
    assert len(support.untested(flags)) == 2
    info = SimpleNamespace(attn_dp_size=2, lora_paths=[{"lora": "x"}], device="cpu")
    assert len(support.untested(info)) == 2
    assert support.untested(SimpleNamespace()) == []


# -- a live server -------------------------------------------------------------------------------

STATE = {
    "version": "0.1.0", "seams": 25, "judge": "judge similarity (prunes)", "judge_is_asked": True,
    "judge_state": "ready", "live_groups": 2, "faults": [],
    "settings": {"enable_deepprune": True, "deepprune_preset": "paper", "deepprune_window": 8},
}  # fmt: skip
INFO = {
    "version": "0.5.23", "frontend": "python", "device": "cpu",
    "launch_command": "-m m --enable-deepprune", "internal_states": [{"deepprune": STATE}],
}  # fmt: skip
GROUP = {"active": True, "reason": "all siblings finished", "preset": "paper", "group_id": "g"}


class Sglang(FakeServer):
    """Answers as an SGLang server does; `answers`: path -> (status, body)."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.seen: list[tuple[str, Any, Any]] = []
        self.answers: dict[str, tuple[int, Any]] = {
            "/server_info": (200, INFO),
            "/model_info": (200, {"model_path": "m", "is_generation": True, "weight_version": "1"}),
            "/v1/models": (200, {"data": [{"id": "m"}]}),
            "/generate": (200, [{"meta_info": {"deepprune": {"group": GROUP}}}, {"meta_info": {}}]),
        }


class _Handler(FakeHandler):
    server: Sglang

    def do_GET(self) -> None:
        self._answer(None)

    def do_POST(self) -> None:
        self._answer(self.read_json())

    def _answer(self, body: Any) -> None:
        self.server.seen.append((self.path, body, self.headers.get("Authorization")))
        self.send_json(*self.server.answers.get(self.path, (404, {"error": "not found"})))


@pytest.fixture
def sglang():
    server = Sglang()
    with running(server):
        yield server


def look(server: Sglang, **options: Any) -> list[Finding]:
    return server_check.look(
        server.url, doctor.version_finding, support.untested, timeout_s=5, **options
    ).findings


def states(server: Sglang, *ranks: dict[str, Any]) -> None:
    """What each rank says of us."""
    server.answers["/server_info"] = (200, {**INFO, "internal_states": list(ranks)})


def test_a_sound_server_has_no_fault(sglang):
    findings = look(sglang)
    assert exit_code(findings) == 0 and not any(one.state == "warning" for one in findings)
    assert "sglang-deepprune 0.1.0 is on, 25 seams each, 2 groups live" in (
        of(findings, "plugin").sentence
    )
    assert of(findings, "settings").sentence == "preset=paper, window=8"
    assert "as a group, preset paper" in of(findings, "request").sentence
    ((_, sent, _),) = [one for one in sglang.seen if one[0] == "/generate"]
    assert (sent["sampling_params"]["n"], sent["sampling_params"]["max_new_tokens"]) == (2, 1)


def test_the_command_prints_a_live_server_as_json(sglang, capsys):
    assert cli.main(["doctor", "--json", "--url", f"{sglang.url}/v1/"]) == 0
    body = json.loads(capsys.readouterr().out)
    assert body["server"]["settings"]["deepprune_preset"] == "paper"
    assert body["server"]["record"] == GROUP
    assert "launch_command" not in json.dumps(body)  # it may hold a key


def test_nothing_is_sent_where_nothing_may_be(sglang):
    findings = look(sglang, sends=False)
    assert exit_code(findings) == 0
    assert not any(body for _, body, _ in sglang.seen)


def test_the_key_goes_along(sglang, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    look(sglang)
    assert {key for _, _, key in sglang.seen} == {"Bearer secret"}
    sglang.answers["/server_info"] = (401, {})
    assert "wants a key" in of(look(sglang), "server").sentence


def test_the_old_name_of_server_info_is_found(sglang):
    sglang.answers["/get_server_info"] = sglang.answers.pop("/server_info")
    assert exit_code(look(sglang)) == 0


def test_no_server_and_no_sglang_are_told_apart(sglang):
    del sglang.answers["/server_info"]
    assert "it has no /server_info" in of(look(sglang), "server").sentence
    sglang.answers["/server_info"] = (200, ["hello"])
    assert "is no SGLang server" in of(look(sglang), "server").sentence
    gone = SimpleNamespace(url="http://127.0.0.1:9")
    findings = look(gone)  # type: ignore[arg-type]
    assert "no server answers at http://127.0.0.1:9" in of(findings, "server").sentence
    assert exit_code(findings) == 1
    findings = look(SimpleNamespace(url="nonsense"))  # type: ignore[arg-type]
    assert of(findings, "server").state == "fault"


def test_a_server_without_the_flag_is_named(sglang):
    info = {**INFO, "launch_command": "--model-path m", "internal_states": [{}]}
    sglang.answers["/server_info"] = (200, info)
    sglang.answers["/generate"] = (200, [{"meta_info": {}}] * 2)
    faults = [one for one in look(sglang) if one.state == "fault"]
    assert [one.check for one in faults] == ["plugin"]  # once, not twice
    assert "start it with --enable-deepprune" in faults[0].sentence


@pytest.mark.parametrize("command", ["--enable-deepprune -m x", "--config s.yaml", "it's --config"])
def test_a_plugin_that_says_nothing_is_known_by_its_record(sglang, command):
    info = {**INFO, "launch_command": command, "internal_states": [{}]}
    sglang.answers["/server_info"] = (200, info)
    findings = look(sglang)
    assert of(findings, "plugin").state == "warning" and of(findings, "request").state == "ok"
    sglang.answers["/generate"] = (200, [{"meta_info": {}}] * 2)
    assert "does not carry the plugin" in of(look(sglang), "request").sentence


def test_a_rank_without_the_plugin_is_a_fault(sglang):
    states(sglang, {"deepprune": STATE}, {})
    findings = look(sglang)
    (fault,) = [one for one in findings if one.state == "fault"]
    assert "only 1 of 2 scheduler ranks" in fault.sentence


def test_a_front_end_without_the_plugin_is_a_fault(sglang):
    sglang.answers["/generate"] = (200, [{"meta_info": {}}] * 2)
    assert of(look(sglang), "request").state == "fault"


def test_the_rust_front_end_is_a_fault(sglang):
    sglang.answers["/server_info"] = (200, {**INFO, "frontend": "rust"})
    one = of(look(sglang), "front-end")
    assert one.state == "fault" and "SGLANG_RUST_SERVER" in one.sentence


def test_the_running_version_is_judged_too(sglang):
    sglang.answers["/server_info"] = (200, {**INFO, "version": "0.5.9"})
    assert of(look(sglang), "version").state == "fault"


@pytest.mark.parametrize(
    ("change", "state", "said"),
    [
        ({"judge_state": "off"}, "fault", "it is off after failures in a row"),
        ({"judge_state": "off", "judge_is_asked": False}, "warning", "it is off after"),
        ({"judge_state": "loading"}, "warning", "still loading"),
        ({"judge_state": None}, "ok", "judge similarity"),
    ],
)
def test_an_unwell_judge_is_told(sglang, change, state, said):
    states(sglang, {"deepprune": {**STATE, **change}})
    one = of(look(sglang), "judge")
    assert one.state == state and said in one.sentence


def test_errors_of_our_own_are_told(sglang):
    states(sglang, {"deepprune": {**STATE, "faults": ["arrive: KeyError"]}})
    assert "arrive: KeyError" in of(look(sglang), "health").sentence


def test_untested_modes_of_a_live_server_are_told(sglang):
    sglang.answers["/server_info"] = (200, {**INFO, "speculative_algorithm": "EAGLE"})
    assert "--speculative-algorithm" in of(look(sglang), "mode").sentence


def test_a_server_of_embeddings_is_a_fault_and_gets_no_request(sglang):
    sglang.answers["/model_info"] = (200, {"model_path": "m", "is_generation": False})
    assert of(look(sglang), "model").state == "fault"
    assert not any(path == "/generate" for path, _, _ in sglang.seen)


def test_an_inactive_record_says_why(sglang):
    group = {**GROUP, "active": False, "reason": "an error of the plugin's own"}
    sglang.answers["/generate"] = (200, [{"meta_info": {"deepprune": {"group": group}}}])
    one = of(look(sglang), "request")
    assert one.state == "fault" and "an error of the plugin's own" in one.sentence


@pytest.mark.parametrize(
    ("answer", "state"), [((503, {}), "warning"), ((200, {"no": "reply"}), "fault")]
)
def test_a_request_without_a_reply_is_told(sglang, answer, state):
    sglang.answers["/generate"] = answer
    assert of(look(sglang), "request").state == state
