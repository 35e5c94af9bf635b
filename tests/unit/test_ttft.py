"""What counts as a first chunk and as a first answer of a stream, and the table over them."""

from benchmarks.serving_cells import PLAIN_AGAIN, question_set
from benchmarks.ttft import Seen, request_of, rows_of


def chunk(index, text, finish=None):
    return {"choices": [{"index": index, "text": text, "finish_reason": finish}]}


def test_the_first_chunk_is_the_first_with_text():
    seen = Seen()
    assert not seen.take(chunk(0, ""), 0.1)
    assert not seen.take(chunk(1, "so"), 0.2)
    assert not seen.take(chunk(0, "so"), 0.3)
    assert seen.first_chunk_s == 0.2


def test_the_first_answer_is_that_of_a_whole_choice():
    seen = Seen()
    assert not seen.take(chunk(0, "\\boxed{4}"), 0.1)  # not ended
    assert not seen.take(chunk(1, "\\boxed{4}", "length"), 0.2)  # stopped
    assert not seen.take(chunk(2, "no idea", "stop"), 0.3)  # ended without an answer
    assert not seen.take({"choices": [], "metadata": {}}, 0.4)
    assert seen.take(chunk(0, "", "stop"), 0.5)
    assert seen.first_answer_s == 0.5


def test_siblings_draw_the_same_noise_under_every_policy():
    (question,) = question_set(1)
    plain, again = (request_of("plain", question, 8, 3) for _ in range(2))
    ours = request_of("balanced", question, 8, 3)
    assert plain["custom_params"]["bench_seed"] == ours["seed"] == 3
    # Siblings are numbered a key: a key that came twice would number on.
    assert plain["custom_params"]["bench_key"] != again["custom_params"]["bench_key"]
    assert ours["custom_params"] == {"deepprune": {"preset": "balanced"}}
    assert all(body["stream"] and body["n"] == 8 for body in (plain, ours))


def test_ratios_are_to_both_plain_rows_and_an_unanswered_stream_has_no_answer_time():
    found = {
        "plain": [Seen(0.1, 1.0), Seen(0.3, 3.0)],
        PLAIN_AGAIN: [Seen(0.2, 2.0), Seen(0.4, 4.0)],
        "balanced": [Seen(0.1, 4.0), Seen(0.1, None)],
    }
    plain, again, ours = rows_of(found, 64, 32)
    assert (plain["first_chunk_p50_ms"], again["first_chunk_p95_ms"]) == (100, 400)
    assert ours["first_chunk_p50_ms_ratio"] == 0.5  # of 200, the median of the four
    assert ours["first_answer_p50_ms_ratio"] == 2.0 and ours["answered"] == 1
    assert (ours["n"], ours["slots"], ours["questions"]) == (64, 32, 2)


def test_nothing_answered_is_no_ratio():
    nothing = [Seen(0.1, None)]
    *_, ours = rows_of({"plain": nothing, PLAIN_AGAIN: nothing, "balanced": nothing}, 64, 32)
    assert ours["first_answer_p50_ms_ratio"] is None
