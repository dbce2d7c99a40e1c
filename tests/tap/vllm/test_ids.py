import pytest

from guard.tap.vllm.ids import caller_id


@pytest.mark.parametrize(
    ("engine_id", "caller"),
    [
        ("chatcmpl-order-17-a1b2c3d4", "order-17"),
        ("chatcmpl-deadbeef-a1b2c3d4", "deadbeef"),
        ("cmpl-order-17-0-a1b2c3d4", "order-17"),
        ("cmpl-order-17-3-a1b2c3d4", "order-17"),  # a list of prompts: the ledger sees that they are several
        ("1_chatcmpl-order-17-a1b2c3d4", "order-17"),  # n > 1, likewise
        ("0-a1b2c3d4", "0"),  # vllm.LLM
        ("chatcmpl-order-17", "chatcmpl-order-17"),  # without vLLM's random end
    ],
)
def test_the_callers_id(engine_id, caller):
    assert caller_id(engine_id) == caller


def test_vllm_xargs_win():
    assert caller_id("chatcmpl-a-a1b2c3d4", {"guard_request_id": "mine"}) == "mine"
    assert caller_id("chatcmpl-a-a1b2c3d4", {"guard_request_id": 7}) == "a"
    assert caller_id("chatcmpl-a-a1b2c3d4", {"other": "x"}) == "a"
