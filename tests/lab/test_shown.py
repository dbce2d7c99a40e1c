"""Examples of a latent, as a pack keeps them."""

import pytest

from guard.lab.heads.shown import BEFORE, BEHIND, excerpt


@pytest.mark.parametrize(
    "text", ["a knife", "one two " * 200 + "knife" + " three four" * 200, "一二三" * 300 + "刀" + "四五六" * 300]
)
def test_an_example_is_what_stands_near_its_token_from_blank_to_blank(text):
    token = "刀" if "刀" in text else "knife"
    start = text.index(token)
    shown = excerpt(text, start, start + len(token), 1.5)
    assert shown.text[shown.start : shown.end] == token
    assert shown.text in text
    assert len(shown.text) <= BEFORE + len(token) + BEHIND
    assert set(shown.text.split()) <= set(text.split()) or " " not in text
    if len(text) > 1000:
        assert len(shown.text) > (BEFORE + BEHIND) * 0.9
