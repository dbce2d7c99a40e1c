"""Text longer than the window is read to its end, in windows that overlap."""

import time

import pytest

from guard.records import CheckInput, CheckOptions, Phase
from tests.assessor.given import CHAT, LONG, TEXTS, phase_of, scores

END = " The minister threatened to kill the president before the vote."
DETAIL = CheckOptions(token_detail=True, max_attributions=100)


@pytest.mark.parametrize("copies", [1, 3])
def test_every_token_of_a_long_text_is_read(narrow, copies):
    text = LONG * copies
    ids = narrow.pipeline.tokenizer.text(text).ids
    assert len(ids) > 300
    phase = phase_of(narrow.check(CheckInput(text), DETAIL))
    assert (phase.tokens_read, phase.tokens_total) == (len(ids), len(ids))
    assert [(t.start, t.end) for t in phase.tokens] == narrow.pipeline.tokenizer.text(text).spans


def test_text_longer_than_the_default_window_is_read_to_its_end(assessor):
    text = LONG * 3
    count = len(assessor.pipeline.tokenizer.text(text).ids)
    assert count > assessor.config.reader.window
    assert phase_of(assessor.check(CheckInput(text))).tokens_read == count


@pytest.mark.parametrize("reader", ["assessor", "narrow"])
def test_a_phrase_at_the_very_end_speaks(reader, request):
    reader = request.getfixturevalue(reader)
    text = LONG * 3
    plain, changed = (reader.check(CheckInput(t), DETAIL) for t in (text, text + END))
    assert scores(changed) != pytest.approx(scores(plain), abs=1e-6)
    tail = [t for t in phase_of(changed).tokens if t.start >= len(text)]
    assert len(tail) == len(reader.pipeline.tokenizer.text(END).ids)
    assert tail[-1].end == len(text + END)
    assert any(t.contributions[name] for name in tail[0].contributions for t in tail)


def test_prompt_and_completion_across_windows_are_told_apart(narrow):
    verdict = narrow.check(CheckInput(CHAT, LONG))
    tokenizer = narrow.pipeline.tokenizer
    assert phase_of(verdict, Phase.COMPLETION).tokens_read == len(tokenizer.text(LONG).ids)
    assert phase_of(verdict).tokens_read == sum(len(tokenizer.text(m.content).ids) for m in CHAT)


def test_a_small_window_changes_scores_little_a_text_within_it_not_at_all(assessor, narrow):
    for text in TEXTS[:4]:
        assert scores(narrow.check(CheckInput(text))) == pytest.approx(
            scores(assessor.check(CheckInput(text))), abs=1e-4
        )


def test_stage_timings_of_one_batch_count_once(loading):
    with loading(reader={"window": 64, "overlap": 16, "batch_tokens": 4096}) as wide:
        started = time.perf_counter()
        timings = wide.check(CheckInput(LONG)).timings
        spent = time.perf_counter() - started
    assert 0 < timings["read"] < sum(timings.values()) <= spent
