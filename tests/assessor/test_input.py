"""Bad input is refused at once, with a message that says what was found and what is allowed."""

import pytest

from guard.errors import InvalidInput, NotFound
from guard.records import CheckInput, CheckOptions, Message, Phase, Role
from tests.assessor.given import CHAT

USER = Role.USER


@pytest.mark.parametrize(
    ("given", "reason", "message"),
    [
        (CheckInput(), "EMPTY_TEXT", "found neither a prompt nor a completion"),
        (CheckInput(""), "EMPTY_TEXT", "prompt: found an empty text, expected text"),
        (CheckInput(" \n\t\u3000"), "EMPTY_TEXT", "prompt: found only whitespace, expected text"),
        (CheckInput("x", ""), "EMPTY_TEXT", "completion: found an empty text, expected text"),
        (CheckInput(()), "EMPTY_TEXT", "prompt: found an empty text, expected text"),
        (CheckInput((Message(USER, " "),)), "EMPTY_TEXT", "prompt: found only whitespace, expected text"),
        (
            CheckInput("x" * 1_048_577),
            "TEXT_TOO_LARGE",
            "text: found 1048577 bytes in all, the limit is 1048576 (limits.text_bytes)",
        ),
        (
            CheckInput("x" * 600_000, "中" * 200_000),
            "TEXT_TOO_LARGE",
            "text: found 1200000 bytes in all, the limit is 1048576 (limits.text_bytes)",
        ),
        (
            CheckInput((Message(USER, "x"),) * 1025),
            "TOO_MANY_MESSAGES",
            "chat: found 1025 messages, the limit is 1024 (limits.messages)",
        ),
        (
            CheckInput("ab\ud83d"),
            "INVALID_UNICODE",
            "text is not valid Unicode: lone surrogate U+D83D at character 2",
        ),
        (
            CheckInput((Message(USER, "\udc00"),)),
            "INVALID_UNICODE",
            "text is not valid Unicode: lone surrogate U+DC00 at character 0",
        ),
    ],
)
def test_text_that_cannot_be_judged(assessor, given, reason, message):
    with pytest.raises(InvalidInput) as caught:
        assessor.submit(given)
    assert (str(caught.value), caught.value.reason) == (message, reason)
    assert assessor.queue_depth == 0


def test_a_limit_can_be_set_and_is_one_sum_whatever_the_way(loading):
    too_large = "text: found 11 bytes in all, the limit is 10 (limits.text_bytes)"
    with loading(limits={"text_bytes": 10}) as assessor:
        for given in (
            CheckInput("x" * 11),
            CheckInput("12345", "中文"),
            CheckInput((Message(USER, "1234"), Message(USER, "中文x"))),
        ):
            with pytest.raises(InvalidInput) as caught:
                assessor.check(given)
            assert (str(caught.value), caught.value.metadata) == (too_large, {"limit": "10"})
        session = assessor.open_session()
        session.feed(Phase.PROMPT, "12345")
        with pytest.raises(InvalidInput) as caught:
            session.feed(Phase.COMPLETION, "中文")
        assert str(caught.value) == too_large
        assert session.feed(Phase.COMPLETION, "678", last=True).result(60).phases  # what was refused left no trace
        chatting = assessor.open_session()
        chatting.feed_chat((Message(USER, "12345"),)).result(60)
        with pytest.raises(InvalidInput) as caught:
            chatting.feed(Phase.COMPLETION, "中文")
        assert str(caught.value) == too_large


@pytest.mark.parametrize("attributions", [-1, 101])
@pytest.mark.parametrize("way", ["submit", "open_session"])
def test_a_number_of_attributions_out_of_range(assessor, way, attributions):
    options = CheckOptions(max_attributions=attributions)
    with pytest.raises(InvalidInput) as caught:
        assessor.submit(CheckInput("x"), options) if way == "submit" else assessor.open_session(options)
    assert str(caught.value) == f"max_attributions: found {attributions}, expected 0 to 100"
    assert caught.value.reason == "INVALID_OPTION"


@pytest.mark.parametrize("way", ["submit", "open_session"])
def test_an_unknown_domain(assessor, way):
    options = CheckOptions(domains=("violence", "wether"))
    with pytest.raises(NotFound) as caught:
        assessor.submit(CheckInput("x"), options) if way == "submit" else assessor.open_session(options)
    assert str(caught.value) == f"unknown domain 'wether', expected one of: {', '.join(assessor.pack.domains)}"
    assert caught.value.reason == "UNKNOWN_DOMAIN"
    assert assessor.open_sessions == 0


def test_chunks_out_of_order(assessor):
    session = assessor.open_session()
    session.feed(Phase.COMPLETION, "Sure, ").result(60)
    with pytest.raises(InvalidInput) as caught:
        session.feed(Phase.PROMPT, "How")
    assert str(caught.value) == "the prompt has ended: no more of its chunks can follow"
    assert caught.value.reason == "PHASE_ENDED"
    with pytest.raises(InvalidInput) as caught:
        session.feed_chat(CHAT)
    assert str(caught.value) == "a chat must come before every other chunk of its stream"
    session.feed(Phase.COMPLETION, "here.", last=True).result(60)
    with pytest.raises(InvalidInput) as caught:
        session.feed(Phase.COMPLETION, " More")
    assert str(caught.value) == "the completion has ended: no more of its chunks can follow"
    session.close()


def test_a_surrogate_in_a_chunk_leaves_the_stream_as_it_was(assessor):
    session = assessor.open_session()
    session.feed(Phase.PROMPT, "He")
    with pytest.raises(InvalidInput, match=r"^text is not valid Unicode: lone surrogate U\+D83C at character 1$"):
        session.feed(Phase.PROMPT, " \ud83c")
    verdict = session.feed(Phase.PROMPT, " saw there", last=True).result(60)
    session.close()
    assert verdict.phases[0].tokens_read == 3
