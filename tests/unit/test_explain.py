"""A record in words: what is read out of which reply, and what is said of it."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from sglang_deepprune import cli, explain
from sglang_deepprune.policy import ABANDONED, OPEN_ENDED, POOL_FULL, RENEWED
from sglang_deepprune.reply import SCHEMA, ReplyError, read
from sglang_deepprune.types import ChoiceRecord, GroupRecord

VALID = json.loads(SCHEMA.read_text(encoding="utf-8"))


def record(states: list[str], answers: list[str | None] | None = None, **more: Any) -> Any:
    """A group record, held to the schema."""
    answers = answers or [None] * len(states)
    choices = tuple(
        ChoiceRecord(index, state, 10, answer)
        for index, (state, answer) in enumerate(zip(states, answers, strict=True))
    )
    values: dict[str, Any] = {
        "reason": "all siblings finished", "preset": "balanced", "size": len(states),
        "generated_tokens": 10 * len(states), "choices": choices,
    }  # fmt: skip
    group = GroupRecord("g", True, **{**values, **more}).to_json()
    jsonschema.validate({"choice": group["choices"][0], "group": group}, VALID)
    return json.loads(json.dumps(group))


DECIDED = record(
    ["finished"] * 3 + ["decided", "not_started", "not_started"], ["7", "7", "7", None, None, None],
    reason="decided: 3:0 of 3 votes, at most 3 to come", answer="7", winner=0, votes=(("7", 3),),
    saved_tokens_at_most=1180,
)  # fmt: skip
PAPER = record(
    ["finished", "finished", "pruned", "pruned"], ["15", "9", None, None], preset="paper",
    reason="pruned: largest of 2 clusters has 3 members", answer="15", winner=0, tie=True,
    votes=(("15", 1), ("9", 1)), windows=2, judge_calls=5, judge_ms=12.4, judge_tokens=1600,
    clusters=((0, 2, 3), (1,)), saved_tokens_at_most=1500,
)  # fmt: skip


def words(group: dict[str, Any], texts: dict[int, str] | None = None) -> str:
    return explain.as_text([explain.explain(group, texts)])


def test_a_decided_group_in_a_few_sentences():
    assert words(DECIDED).splitlines() == [
        "'7', as sibling 0 wrote it, wins with 3 of 3 votes.",
        "Of 6 siblings, preset balanced, 3 ran to the end, 1 was stopped because the vote was "
        "decided and 2 never started.",
        "The vote was decided early: the leader had 3 of 3, the next answer 0, and with at most 3 "
        "to come another winner was too unlikely to wait for.",
        "60 tokens were generated; at most 1,180 more were saved, had each stopped sibling run to "
        "its limit.",
    ]


def test_a_pruned_group_tells_of_clusters_and_of_the_tie():
    said = words(PAPER)
    assert "'15', as sibling 0 wrote it, wins with 1 of 2 votes; '9' has 1." in said
    assert "2 ran to the end and 2 were stopped as redundant" in said
    assert (
        "5 pairs of traces in 2 windows (1,600 tokens read, 12 ms) and made 2 clusters of 3 and 1"
        in (said)
    )
    assert (
        "Mind: A tie of 2 answers with 1 vote each: the one with the lowest sibling index" in said
    )


@pytest.mark.parametrize(
    ("group", "said"),
    [
        (record(["finished"] * 3, abstentions=3), "All 3 that finished abstained"),
        (record(["finished"] * 3, abstentions=3, reason=OPEN_ENDED),
         "Nobody was stopped any more: the first three finishers held no answer."),
        (record(["finished"] * 2, ["1", None], votes=(("1", 1),), answer="1", winner=0,
                abstentions=1), "1 finished without an answer"),
        (record(["finished"], reason=RENEWED), "The weights changed while it ran"),
        (record(["finished"], windows=2), "was handed 2 windows and had no verdict"),
        (record(["failed", "aborted"]), "1 failed: the server refused or lost it"),
        (record(["failed", "aborted"]), "1 of the siblings was aborted"),
        (record(["finished"] * 3, reason="gave up: the leader has 2 of 16 votes"),
         "without hope of a majority: the leader has 2 of 16 votes"),
        (record(["finished", "decided"], reason="gave up: the leader has 2 of 16 votes"),
         "1 ran to the end and 1 was stopped when the group gave up."),
        (record(["finished", "pruned"], reason=POOL_FULL),
         "redundant were stopped when the KV pool was full"),
        (record(["finished"], reason="something new"), "Why it settled: something new."),
    ],
)  # fmt: skip
def test_what_is_odd_is_named(group: Any, said: str):
    assert said in words(group)


def test_clusters_that_formed_without_the_judge_are_no_missing_verdict():
    said = words(record(["finished"] * 2, windows=1, clusters=((0, 1),)))
    assert "made 1 cluster of 2" in said and "had no verdict" not in said


def test_a_vote_that_was_decided_when_all_had_ended_stopped_nobody():
    group = record(["finished"] * 4, ["7"] * 4, votes=(("7", 4),), answer="7", winner=0,
                   reason="decided: 3:0 of 3 votes, at most 1 to come")  # fmt: skip
    assert "wait for; by then nobody was left to stop." in words(group)


def test_a_group_that_was_none_says_why():
    lost = GroupRecord("", False, ABANDONED, size=4).to_json()
    assert "These 4 siblings were no group: an error of the plugin's own" in words(lost)
    assert "The server's log has the error" in words(lost)


def test_equal_texts_are_one_sample():
    group = record(["finished"] * 3, ["4"] * 3, votes=(("4", 3),), answer="4", winner=0)
    assert "All 3 finished texts are the same" in words(group, {0: "a", 1: "a", 2: "a"})
    assert "texts are the same" not in words(group, {0: "a", 1: "a", 2: "b"})
    assert "texts are the same" not in words(group)  # the record alone does not tell


def test_a_running_group_is_told_as_of_now():
    group = record(["finished"], settled=False, reason="running", votes=(("5", 1),), answer="5",
                   winner=0)  # fmt: skip
    group["choices"] = []
    said = words(group)
    assert (
        "'5', as sibling 0 wrote it, leads with 1 of 1 vote" in said
        and "The group still runs" in said
    )


def test_long_answers_and_many_answers_are_cut_short():
    votes = tuple((str(i) * 99, 1) for i in range(7))
    many = record(["finished"] * 7, answer="0", winner=0, votes=votes)
    line = words(many).splitlines()[0]
    assert len(line) < 500 and "…'" in line and "and 2 other answers the rest" in line


# -- replies of a real server --------------------------------------------------------------------

# Of SGLang 0.5.23 on scripted tokens (tests/engine/scenario.py); `reasoner1`: sampled for real.
REPLIES = {
    row["name"]: row["reply"]
    for row in map(json.loads, Path(__file__).with_name("replies.jsonl").open(encoding="utf-8"))
}
TOLD = {
    "chat": [
        "'15', as sibling 0 wrote it, wins with 2 of 2 votes.",
        "Of 8 siblings, preset paper, 2 ran to the end and 6 were stopped as redundant.",
        "The judge's clusters settled who ran on: largest of 2 clusters has 5 members.",
        "The judge compared 15 pairs of traces in 1 window (480 tokens read, 0 ms) and made 2 "
        "clusters of 5 and 3.",
        "347 tokens were generated; at most 2,286 more were saved, had each stopped sibling run to "
        "its limit.",
    ],
    "decided": [
        "'7', as sibling 0 wrote it, wins with 3 of 3 votes.",
        "Of 12 siblings, preset balanced, 3 ran to the end, 3 were stopped because the vote was "
        "decided and 6 never started.",
        "The vote was decided early: the leader had 3 of 3, the next answer 0, and with at most 9 "
        "to come another winner was too unlikely to wait for.",
        "224 tokens were generated; at most 3,527 more were saved, had each stopped sibling run to "
        "its limit.",
    ],
    "reasoner1": [
        "'134', as sibling 1 wrote it, wins with 4 of 5 votes; '135' has 1.",
        "Of 16 siblings, preset balanced, 5 ran to the end, 5 were stopped because the vote was "
        "decided and 6 never started.",
        "The vote was decided early: the leader had 4 of 5, the next answer 1, and with at most 11 "
        "to come another winner was too unlikely to wait for.",
        "731 tokens were generated; at most 5,396 more were saved, had each stopped sibling run to "
        "its limit.",
    ],
    "abstained": [
        "Nobody of 4 siblings voted for an answer.",
        "Of 4 siblings, preset collect, 4 ran to the end.",
        "Nothing ended it early: every sibling came to its end.",
        "47 tokens were generated.",
        "Mind: All 4 that finished abstained: no final answer was found in their texts (a cut box, "
        "or a prompt without one right answer).",
    ],
    "equal": [
        "'4', as sibling 0 wrote it, wins with 3 of 3 votes.",
        "Of 3 siblings, preset collect, 3 ran to the end.",
        "Nothing ended it early: every sibling came to its end.",
        "135 tokens were generated.",
        "Mind: All 3 finished texts are the same: siblings that sample alike (temperature 0?) are "
        "one sample, and their votes one vote.",
    ],
    "raise": [
        "'3', as sibling 0 wrote it, wins with 4 of 4 votes.",
        "Of 4 siblings, preset paper, 4 ran to the end.",
        "Nothing ended it early: every sibling came to its end.",
        "The judge compared 0 pairs of traces in 1 window (0 tokens read, 0 ms) and made no "
        "cluster.",
        "327 tokens were generated.",
        "Mind: The judge was handed 1 window and had no verdict: the group ended first, or it is "
        "loading, too slow, broken or not sure; see the server's log, or doctor --url.",
    ],
    "nan": [
        "'3', as sibling 0 wrote it, wins with 4 of 4 votes.",
        "Of 4 siblings, preset paper, 4 ran to the end.",
        "Nothing ended it early: every sibling came to its end.",
        "The judge compared 3 pairs of traces in 1 window (96 tokens read, 0 ms) and made 1 "
        "cluster of 1; 3 siblings are in none.",
        "319 tokens were generated.",
    ],
    "members": [  # eight replies of a client-side group, of which one has the settled record
        "'7', as sibling 0 wrote it, wins with 3 of 3 votes.",
        "Of 8 siblings, preset latency, 3 ran to the end and 5 were stopped because the vote was "
        "decided.",
        "The vote was decided early: the leader had 3 of 3, the next answer 0, and with at most 5 "
        "to come another winner was too unlikely to wait for.",
        "431 tokens were generated; at most 1,720 more were saved, had each stopped sibling run to "
        "its limit.",
    ],
}


@pytest.mark.parametrize("name", TOLD)
def test_a_real_reply_is_told_word_for_word(name: str):
    reply = read(json.dumps(REPLIES[name]))
    (group,) = reply.groups
    assert words(group, reply.texts).splitlines() == TOLD[name]


def test_a_real_reply_to_two_prompts_is_two_groups():
    reply = read(json.dumps(REPLIES["completions_two"]))
    said = explain.as_text([explain.explain(group) for group in reply.groups])
    assert "Group 1 of 2:\n'15', as sibling 0 wrote it, wins with 5 of 8 votes; '9' has 3." in said
    assert "by then nobody was left to stop" in said and "Group 2 of 2:\n'7'" in said


def test_real_records_are_those_of_the_schema():
    for reply in REPLIES.values():
        for group in read(json.dumps(reply)).groups:
            jsonschema.validate(group, {**VALID, **VALID["$defs"]["group"]})


# -- where the record stands --------------------------------------------------------------------


def native(group: Any = DECIDED) -> list[dict[str, Any]]:
    outputs: list[dict[str, Any]] = [
        {"text": f"text {i}", "meta_info": {"deepprune": {"choice": group["choices"][i]}}}
        for i in range(len(group["choices"]))
    ]
    outputs[0]["meta_info"]["deepprune"]["group"] = group
    return outputs


def events(*chunks: Any) -> str:
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"


def chat(index: int, text: str) -> dict[str, Any]:
    return {"object": "chat.completion.chunk",
            "choices": [{"index": index, "delta": {"content": text}}]}  # fmt: skip


OPENAI = {"object": "chat.completion", "usage": {}, "metadata": {"deepprune": DECIDED},
          "choices": [{"index": 0, "message": {"content": "text 0"}}]}  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(native()),
        json.dumps([native()]),
        "\n".join(json.dumps(one) for one in native()),
        json.dumps(native()[0]),
        json.dumps(native()[0]["meta_info"]),
        json.dumps(OPENAI),
        json.dumps(OPENAI["metadata"]),
        json.dumps(DECIDED),
        json.dumps({"choice": DECIDED["choices"][0], "group": DECIDED}),
        events(chat(0, "text "), chat(0, "0"), {"choices": [], "metadata": OPENAI["metadata"]}),
        ": ping\nevent: message\n" + events(*native()[1:], native()[0]),
    ],
    ids=["list", "nested", "lines", "one", "meta", "openai", "metadata", "bare", "pair", "chat-sse",
         "native-sse"],
)  # fmt: skip
def test_the_record_is_found_in_every_form(text: str):
    assert read(text).groups == [DECIDED]


def test_a_streams_pieces_are_joined_and_its_whole_texts_are_not():
    joined = read(
        events(chat(0, "a"), chat(1, "b"), chat(0, "c"), {"metadata": OPENAI["metadata"]})
    )
    assert joined.texts == {0: "ac", 1: "b"}
    pieces = [{"object": "text_completion", "choices": [{"index": 0, "text": text}], "usage": None}
              for text in "ab"]  # fmt: skip
    assert read(events(*pieces, {"metadata": OPENAI["metadata"]})).texts == {0: "ab"}
    outputs = native()
    outputs[1]["index"] = 1
    grown = read(events({"index": 1, "text": "te", "meta_info": {}}, outputs[1], outputs[0]))
    assert grown.texts[1] == "text 1"


def test_a_list_of_prompts_has_a_group_each():
    other = {**PAPER, "group_id": "h"}
    text = json.dumps({"choices": [], "metadata": {"deepprune": {"groups": [DECIDED, other]}}})
    reply = read(text)
    assert reply.groups == [DECIDED, other] and reply.texts == {}
    said = explain.as_text([explain.explain(group) for group in reply.groups])
    assert said.startswith("Group 1 of 2:") and "Group 2 of 2:" in said


def test_of_a_client_side_groups_records_the_settled_one_counts():
    early = {**DECIDED, "settled": False, "choices": [], "generated_tokens": 5}
    for order in ([early, DECIDED], [DECIDED, early]):
        lines = [json.dumps({"meta_info": {"deepprune": {"group": one}}}) for one in order]
        assert read("\n".join(lines)).groups == [DECIDED]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "the input is empty"),
        ("hello there", "line 1 is no JSON"),
        ("{}", "no reply of SGLang's in this"),
        ("[1, null]", "no reply of SGLang's in this"),
        (json.dumps({"text": "x", "meta_info": {"id": "1"}}), "the plugin is off, n is 1"),
        (json.dumps({"choices": [{"index": 0}], "metadata": None}), "the plugin is off, n is 1"),
        (json.dumps(native()[1:]), "5 choices here have a record of their own"),
        (json.dumps({"group_id": "g", "votes": []}), "no group record of this version: active"),
    ],
)  # fmt: skip
def test_what_has_no_record_is_one_error(text: str, said: str):
    with pytest.raises(ReplyError, match=said):
        read(text)


# -- the command --------------------------------------------------------------------------------


def test_the_command_reads_a_file_and_standard_input(tmp_path, capsys, monkeypatch):
    place = tmp_path / "reply.json"
    place.write_text(json.dumps(OPENAI))
    assert cli.main(["explain", str(place)]) == 0
    from_file = capsys.readouterr().out
    assert from_file.startswith("'7', as sibling 0 wrote it, wins with 3 of 3 votes")
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(OPENAI)))
    assert cli.main(["explain", "-"]) == 0
    assert capsys.readouterr().out == from_file


def test_the_command_speaks_json(tmp_path, capsys):
    place = tmp_path / "reply.json"
    place.write_text(json.dumps(PAPER))
    assert cli.main(["explain", "--json", str(place)]) == 0
    (group,) = json.loads(capsys.readouterr().out)["groups"]
    assert (group["group_id"], group["answer"], group["settled"]) == ("g", "15", True)
    assert len(group["sentences"]) == 5 and len(group["odd"]) == 1


def test_exit_codes_tell_no_record_from_wrong_usage(tmp_path, capsys):
    place = tmp_path / "reply.json"
    place.write_text('{"choices": []}')
    assert cli.main(["explain", str(place)]) == 1
    assert capsys.readouterr().err.startswith("error: this reply has no record")
    assert cli.main(["explain", str(tmp_path / "nowhere.json")]) == 2
    assert "cannot be read" in capsys.readouterr().err
    place.write_bytes(b"\xff\xfe\x00")
    assert cli.main(["explain", str(place)]) == 2
    with pytest.raises(SystemExit) as error:
        cli.main(["explain"])
    assert error.value.code == 2


@pytest.mark.parametrize(
    "change",
    [{"votes": None}, {"votes": "x"}, {"choices": ["a"]}, {"choices": [{"state": "finished"}]},
     {"size": "4"}, {"settled": None}, {"reason": None}, {"group_id": [7]}],
)  # fmt: skip
def test_a_record_of_another_kind_is_one_error(change: dict[str, Any]):
    with pytest.raises(ReplyError, match="no group record"):
        read(json.dumps({**DECIDED, **change}))


@pytest.mark.parametrize(
    "document",
    ['[{"text": "a", "index": 0, "meta_info": "x"}]', '{"choices": [{"index": 0, "message": "x"}]}',
     '{"metadata": {"deepprune": {"groups": 3}}}', "[" * 100_000, '{"error": {"message": "m"}}'],
    ids=["meta", "message", "groups", "deep", "error"],
)  # fmt: skip
def test_odd_replies_are_one_error(document: str):
    with pytest.raises(ReplyError):
        read(document)


def test_a_batch_line_a_byte_order_mark_and_headers_are_read_over():
    body = {"choices": [], "metadata": {"deepprune": {"group": DECIDED}}}
    line = json.dumps({"custom_id": "1", "response": {"status_code": 200, "body": body}})
    headers = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\n" + json.dumps(body)
    for text in (line, "\ufeff" + json.dumps(body), headers):
        assert read(text).groups == [DECIDED]
