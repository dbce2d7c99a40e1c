import pytest
import torch

from guard.tap.vllm.gathering import LONGEST_WAIT, Computed, Gathering


def step(number, batch=("a", "b"), begins=(10, 30)):
    """The `number`th step of an answer: ids and activations tell whose they are and when they came."""
    count = len(batch)
    ids = torch.tensor([100 * (i + 1) + number for i in range(count)])
    return Computed(
        batch,
        [1] * count,
        ids,
        torch.tensor([begin + number for begin in begins]),
        [ids[:, None] * torch.ones(3), -ids[:, None] * torch.ones(3)],
    )


def test_steps_of_the_same_requests_are_read_as_one_run_of_each():
    gathering = Gathering(3)
    assert gathering.add(step(0)) == gathering.add(step(1)) == []
    [read] = gathering.add(step(2))
    assert list(read.batch) == ["a", "b"]
    assert list(read.lengths) == [3, 3]
    assert read.token_ids().tolist() == [100, 101, 102, 200, 201, 202]
    assert read.begins() == [10, 30]
    assert [x[:, 0].tolist() for x in read.activations] == [
        [100, 101, 102, 200, 201, 202],
        [-100, -101, -102, -200, -201, -202],
    ]
    assert gathering.take() == []


def test_what_the_engine_writes_over_is_kept():
    gathering = Gathering(2)
    first = step(0)
    gathering.add(first)
    for buffer in (first.ids, first.positions, *first.activations):
        buffer.zero_()
    [read] = gathering.add(step(1))
    assert read.token_ids().tolist() == [100, 101, 200, 201]
    assert read.begins() == [10, 30]
    assert read.activations[0][0, 0] == 100


def test_another_batch_ends_the_wait():
    gathering = Gathering(8)
    gathering.add(step(0))
    gathering.add(step(1))
    [read] = gathering.add(step(2, batch=("b", "a"), begins=(30, 10)))
    assert list(read.lengths) == [2, 2]
    [rest] = gathering.take()
    assert list(rest.batch) == ["b", "a"]
    assert rest.begins() == [32, 12]


def test_a_slow_engine_is_read_without_waiting_for_more():
    now = 0.0
    gathering = Gathering(8, clock=lambda: now)
    assert gathering.add(step(0)) == []
    now = LONGEST_WAIT
    [read] = gathering.add(step(1))
    assert list(read.lengths) == [2, 2]


def test_a_position_that_comes_again_keeps_its_steps_apart():
    """As after a preemption: the ledger passes over what was told, which it can only do step by step."""
    gathering = Gathering(2)
    gathering.add(step(5))
    read = gathering.add(step(5))
    assert [part.begins() for part in read] == [[15, 35], [15, 35]]


@pytest.mark.parametrize("number", [0, 1])
def test_one_step_is_never_held_where_none_may_wait(number):
    [read] = Gathering(1).add(step(number))
    assert read.token_ids().tolist() == [100 + number, 200 + number]
