"""Whatever pieces the engine computes, the sidecar is told each token once, in order, and with its own rows."""

import random

import numpy as np
import pytest

from guard.tap.protocol import Ended, Missed
from guard.tap.vllm.blocks import ROOT, BlockStore, chain
from guard.tap.vllm.fired import Fired, joined
from guard.tap.vllm.ledger import Ledger

BLOCK = 4


def alone(ids):
    """What a model would fire on these tokens: each token's hits depend on every token up to it."""
    token, row, value = [], [], []
    for at in range(len(ids)):
        seed = hash(tuple(ids[: at + 1]))
        for hit in range(seed % 3):
            token.append(at)
            row.append((seed + hit) % 50)
            value.append((seed % 1000) / 10 + hit)
    probe = np.array([[hash(tuple(ids[: at + 1])) % 97] for at in range(len(ids))], np.float32).reshape(len(ids), 1)
    return Fired(
        np.array(ids, np.int32), np.array(token, np.int32), np.array(row, np.int32), np.array(value, np.float32), probe
    )


def store(blocks=100, max_bytes=1 << 20):
    return BlockStore(BLOCK, max_blocks=blocks, max_bytes=max_bytes)


def told(steps, caller):
    """Rows of one request over all steps, which must follow each other without gap or repetition."""
    runs, at = [], 0
    for step in steps:
        for rows in step.rows:
            if rows.request_id == caller:
                assert rows.begin == at
                runs.append(Fired(rows.token_ids, rows.token, rows.row, rows.value, rows.probe, rows.finite))
                at += len(rows.token_ids)
    return joined(runs)


def assert_same(found, expected):
    for name in ("ids", "token", "row", "value", "probe"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)


def read(ledger, engine_id, ids, begin, end, drafts=0):
    ledger.add(engine_id, begin, alone(ids).cut(begin, end), drafts)


def test_chunks_of_a_prompt_and_then_single_tokens():
    ids = list(range(10, 23))
    ledger = Ledger(store())
    ledger.begin("e", "x", ids[:9])
    steps = []
    for begin, end in ((0, 3), (3, 9), (9, 10), (10, 11), (11, 12)):
        read(ledger, "e", ids, begin, end)
        steps.append(ledger.take())
    ledger.end("e", "stop")
    assert ledger.take().ended == (Ended("x", "stop", 12),)
    assert_same(told(steps, "x"), alone(ids[:12]))
    assert {rows.prompt_tokens for step in steps for rows in step.rows} == {9}


def test_rows_computed_again_after_a_preemption_are_told_once():
    ids = list(range(10, 23))
    ledger = Ledger(None)
    ledger.begin("e", "x", ids[:9])
    steps = []
    for begin, end in ((0, 9), (9, 10), (0, 4), (4, 11), (11, 12)):
        read(ledger, "e", ids, begin, end)
        if step := ledger.take():
            steps.append(step)
    assert len(steps) == 4  # what came again in full told nothing
    assert_same(told(steps, "x"), alone(ids[:12]))


def test_rejected_drafts_are_never_told():
    ids = [1, 2, 3, 4, 5, 6, 7]
    wrong = [1, 2, 3, 4, 90, 91, 92]
    ledger = Ledger(store())
    ledger.begin("e", "x", ids[:3])
    read(ledger, "e", ids, 0, 3)
    read(ledger, "e", wrong, 3, 7, drafts=3)
    first = ledger.take()
    assert_same(told([first], "x"), alone(ids[:4]))  # held until somebody says
    ledger.settle("e", 0)
    assert ledger.take() is None
    read(ledger, "e", ids, 4, 7, drafts=2)
    ledger.settle("e", 1)
    assert_same(told([first, ledger.take()], "x"), alone(ids[:6]))
    ledger.end("e", "length")
    assert ledger.take().ended == (Ended("x", "length", 6),)


def test_where_nobody_says_the_next_step_does():
    """With asynchronous scheduling: a draft was accepted if the next step begins behind it."""
    ids = [1, 2, 3, 4, 5, 6, 7]
    ledger = Ledger(None)
    ledger.begin("e", "x", ids[:3])
    read(ledger, "e", ids, 0, 3)
    read(ledger, "e", [*ids[:5], 90], 3, 6, drafts=2)  # 5 is right, 90 is not
    read(ledger, "e", ids, 5, 6)
    assert_same(told([ledger.take()], "x"), alone(ids[:6]))


def test_a_cached_prefix_brings_its_hits_along():
    ids = list(range(10, 30))
    ledger = Ledger(store())
    ledger.begin("e1", "first", ids[:15])
    read(ledger, "e1", ids, 0, 18)
    ledger.end("e1", "stop")
    ledger.take()
    # The second prompt is the first's and its answer, but for the end: the answer fills blocks too.
    second = [*ids[:17], 99, 98]
    ledger.begin("e2", "second", second)
    read(ledger, "e2", second, 16, 19)
    assert_same(told([ledger.take()], "second"), alone(second))
    assert ledger.replayed == 16


def test_a_cached_prefix_without_its_hits_is_missed_and_stays_so():
    ids = list(range(10, 30))
    ledger = Ledger(store(blocks=2))
    ledger.begin("e1", "first", ids[:16])
    read(ledger, "e1", ids, 0, 16)
    ledger.end("e1", "stop")
    ledger.begin("other", "other", [77] * 8)
    read(ledger, "other", [77] * 8, 0, 8)
    ledger.end("other", "stop")
    ledger.take()
    ledger.begin("e2", "second", ids[:17])
    read(ledger, "e2", ids, 16, 17)
    read(ledger, "e2", ids, 17, 18)
    step = ledger.take()
    assert step.rows == ()
    assert step.missed == (
        Missed("second", "a cached prefix of 16 tokens (from position 0), whose rows are gone from position 0 on"),
    )
    ledger.end("e2", "stop")
    assert ledger.take().ended == (Ended("second", "stop", 0),)


def test_what_a_missed_request_computes_is_there_for_the_next_one():
    ids = list(range(10, 43))
    ledger = Ledger(store())
    for number in range(2):  # n = 2: one id twice, which nobody could tell apart
        ledger.begin(f"{number}_e", "twice", ids)
    for number in range(2):
        read(ledger, f"{number}_e", ids, 16 * number, 33)  # the second finds the first one's blocks in the cache
        ledger.end(f"{number}_e", "stop")
    assert ledger.take().rows == ()
    ledger.begin("next", "next", [*ids[:24], 5, 6])
    read(ledger, "next", [*ids[:24], 5, 6], 24, 26)
    step = ledger.take()
    assert step.missed == ()
    assert_same(told([step], "next"), alone([*ids[:24], 5, 6]))


def test_behind_a_prefix_whose_hits_are_gone_a_missed_request_s_own_blocks_are_kept():
    ids = list(range(10, 50))
    ledger = Ledger(store(blocks=3))
    ledger.begin("e1", "first", ids)
    read(ledger, "e1", ids, 8, 40)  # a prefix that nobody here computed
    step = ledger.take()
    assert (step.rows, [missed.request_id for missed in step.missed]) == ((), ["first"])
    ledger.begin("e2", "second", ids)
    read(ledger, "e2", ids, 0, 8)  # computed anew
    read(ledger, "e2", ids, 32, 40)
    step = ledger.take()
    assert step.missed == ()
    assert_same(told([step], "second"), alone(ids))


def test_where_rows_got_lost_nothing_more_of_these_requests_is_kept():
    ids = list(range(10, 26))
    ledger = Ledger(store())
    ledger.begin("e1", "first", ids)
    read(ledger, "e1", ids, 0, 4)
    ledger.lose_all("the tap failed")
    read(ledger, "e1", ids, 6, 16)
    assert [missed.detail for missed in ledger.take().missed] == ["the tap failed"]
    ledger.end("e1", "stop")
    ledger.begin("e2", "second", ids)
    read(ledger, "e2", ids, 8, 16)
    assert "whose rows are gone from position 4 on" in ledger.take().missed[0].detail


def test_a_running_request_keeps_its_blocks():
    ids = list(range(10, 30))
    ledger = Ledger(store(blocks=2))
    ledger.begin("e1", "first", ids[:16])
    read(ledger, "e1", ids, 0, 16)
    for number in range(5):
        ledger.begin(f"o{number}", f"o{number}", [number] * 8)
        read(ledger, f"o{number}", [number] * 8, 0, 8)
        ledger.end(f"o{number}", "stop")
    ledger.begin("e2", "second", ids[:17])
    read(ledger, "e2", ids, 16, 17)
    assert_same(told([ledger.take()], "second"), alone(ids[:17]))


def test_a_prefix_found_while_resuming_continues_where_the_request_stood():
    """Preempted within its prompt; meanwhile another request computed more of the same prompt."""
    ids = list(range(10, 30))
    ledger = Ledger(store())
    ledger.begin("e1", "first", ids)
    read(ledger, "e1", ids, 0, 6)
    ledger.begin("e2", "second", ids)
    read(ledger, "e2", ids, 0, 20)
    read(ledger, "e1", ids, 16, 20)
    assert_same(told([ledger.take()], "first"), alone(ids))


def test_one_id_of_two_running_requests_is_missed_for_both():
    ledger = Ledger(store())
    ledger.begin("0_chatcmpl", "x", [1, 2, 3])
    read(ledger, "0_chatcmpl", [1, 2, 3], 0, 3)
    ledger.begin("1_chatcmpl", "x", [1, 2, 3])
    read(ledger, "1_chatcmpl", [1, 2, 3], 0, 3)
    assert ledger.running({"x", "y"}) == ["0_chatcmpl", "1_chatcmpl"]
    step = ledger.take()
    assert {missed.request_id for missed in step.missed} == {"x"}
    assert len(step.rows) == 1
    ledger.end("0_chatcmpl", "stop")
    assert ledger.take() is None
    ledger.end("1_chatcmpl", "stop")
    assert [ended.request_id for ended in ledger.take().ended] == ["x"]


@pytest.mark.parametrize(
    ("prompt", "given", "detail"),
    [
        (None, {}, "a prompt of embeddings, which has no token ids"),
        (
            [1, 2],
            {"refuse": "adapter poet, which the pack was not made for"},
            "adapter poet, which the pack was not made for",
        ),
    ],
)
def test_what_cannot_be_read_is_missed(prompt, given, detail):
    ledger = Ledger(store())
    ledger.begin("e", "x", prompt, **given)
    read(ledger, "e", [1, 2], 0, 2)
    assert ledger.take().missed == (Missed("x", detail),)


def test_images_never_share_blocks():
    """Their tokens are placeholders: equal ids do not mean equal activations."""
    ids = list(range(8))
    ledger = Ledger(store())
    ledger.begin("e1", "first", ids, shared=False)
    read(ledger, "e1", ids, 0, 8)
    ledger.begin("e2", "second", ids, shared=False)
    read(ledger, "e2", ids, 4, 8)
    step = ledger.take()
    assert [missed.request_id for missed in step.missed] == ["second"]
    assert_same(told([step], "first"), alone(ids))


@pytest.mark.parametrize("seed", range(60))
def test_any_schedule_tells_what_reading_alone_tells(seed):  # noqa: C901 - a small engine, in one piece
    """Requests that share prefixes, run in any order, in chunks, with preemptions, drafts and cached prefixes."""
    rng = random.Random(seed)
    ledger, cached = Ledger(store()), set()
    stems = [[rng.randrange(9) for _ in range(rng.randrange(1, 20))] for _ in range(3)]
    wanted, live, steps = {}, {}, []
    for number in range(12):
        prompt = [*rng.choice(stems), *(rng.randrange(9) for _ in range(rng.randrange(1, 9)))]
        ids = [*prompt, *(rng.randrange(9) for _ in range(rng.randrange(0, 9)))]
        wanted[f"x{number}"] = ids
        live[f"e{number}"] = [ids, len(prompt), 0, False]
    while live:
        engine_id = rng.choice(list(live))
        ids, prompt, done, begun = live[engine_id]
        if not begun:
            ledger.begin(engine_id, "x" + engine_id[1:], ids[:prompt])
            live[engine_id][3] = True
        if done == 0 or rng.random() < 0.1:  # new, or preempted: from the longest prefix that is cached
            done = 0
            while tuple(ids[: done + BLOCK]) in cached and done + BLOCK < prompt:
                done += BLOCK
        if done < prompt:
            end, drafts = min(prompt, done + rng.randrange(1, 8)), 0
            read(ledger, engine_id, ids, done, end)
        else:
            right = rng.randrange(min(3, len(ids) - done)) if done < len(ids) else 0
            drafts = rng.randrange(3)
            end = done + 1 + right
            guess = [*ids[:end], *(50 + n for n in range(drafts))]
            read(ledger, engine_id, guess, done, len(guess), drafts=right + drafts)
            if rng.random() < 0.5:
                ledger.settle(engine_id, right)
        cached.update(tuple(ids[:n]) for n in range(BLOCK, end + 1, BLOCK))
        live[engine_id][2] = end
        if end >= len(ids):
            ledger.settle(engine_id, right if done >= prompt else 0)
            ledger.end(engine_id, "stop")
            del live[engine_id]
        if rng.random() < 0.7 and (step := ledger.take()):
            steps.append(step)
    steps.append(ledger.take())
    steps = [step for step in steps if step]
    assert not [step.missed for step in steps if step.missed]
    for caller, ids in wanted.items():
        assert_same(told(steps, caller), alone(ids))


def test_the_store_is_bounded_by_blocks_and_by_bytes():
    one = alone(list(range(BLOCK))).compact()
    by_blocks, by_bytes = store(blocks=3), store(max_bytes=2 * one.nbytes)
    for number in range(9):
        for each in (by_blocks, by_bytes):
            each.put(bytes([number]), one)
    assert (len(by_blocks), len(by_bytes)) == (3, 2)
    assert by_bytes.nbytes == 2 * one.nbytes
    assert by_blocks.get(bytes([5])) is None
    assert by_blocks.get(bytes([8])).fired is one


def test_a_block_is_known_by_every_token_before_it():
    ids = np.arange(BLOCK, dtype=np.int32)
    assert chain(chain(ROOT, ids), ids) != chain(chain(ROOT, ids + 1), ids)
    assert chain(ROOT, ids) == chain(ROOT, ids.astype(np.int64))
