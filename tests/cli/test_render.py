"""What people see of a verdict."""

import dataclasses

import pytest
from rich.padding import Padding

from guard.cli import render, watch
from guard.cli.colouring import EXCERPT, coloured
from guard.cli.terminal import visible
from guard.records import (
    Action,
    CheckInput,
    HeadKind,
    Message,
    NotAssessed,
    NotAssessedReason,
    Passage,
    Phase,
    Role,
    SpanContribution,
    TokenDetail,
)
from tests.cli.given import attribution, domain, head, phase, shown, verdict

TEXT = "I will kill you"
ASKED = CheckInput(prompt=TEXT)


def test_a_verdict_from_top_to_bottom():
    probe = dataclasses.replace(attribution("dense probe", -0.25, 0.1, ()), latent=None, tags=())
    blocked = domain(
        action=Action.BLOCK,
        heads=[head(score=0.95, attributions=[attribution(), probe]), head(HeadKind.PRESENCE, 0.5, None, None)],
    )
    given = verdict(phase([blocked, domain("terror")], action=Action.BLOCK), action=Action.BLOCK)
    assert (
        shown(render.verdict(given, ASKED))
        == """\
 BLOCK   violence  r-1

prompt  4 tokens
  violence  harm      ████████████╎████████┃█·  0.950  flag 0.50  block 0.90
            presence  ████████████············  0.500
  terror    harm      ██··········╎········┃··  0.100  flag 0.50  block 0.90

  tokens coloured by their part in violence.harm: red adds, blue takes away
    I will kill you

  why violence.harm  score 0.950, logit +1.25, 80% explained by named features
  share     adds   feature                    on
  ──────────────────────────────────────────────────
    60%   +1.500   threats                    “kill”
                   model.layers.2/3  threat
    10%   -0.250   dense probe
                   probe rows
          +0.250   everything else
          -0.500   bias

pack toy 1.0.0  policy p1  23 ms"""
    )


def test_every_line_fits_a_terminal_of_80_columns():
    long = attribution("fires on: " + "knife, " * 30)
    given = verdict(phase([domain("pornography", heads=[head(attributions=[long]), head(HeadKind.PRESENCE)])]))
    lines = shown(render.verdict(given, CheckInput(prompt="word " * 60)), width=80).splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.endswith("flag 0.50  block 0.90") for line in lines)


@pytest.mark.parametrize(
    ("score", "flag_at", "block_at", "expected"),
    [
        (0.0, None, None, "··········"),
        (1.0, None, None, "██████████"),
        (0.5, None, None, "█████·····"),
        (0.5, 0.7, None, "█████··╎··"),
        (0.9, 0.3, 0.8, "███╎████┃·"),
        (0.2, 0.5, 1.0, "██···╎···┃"),
    ],
)
def test_a_bar_marks_the_thresholds(score, flag_at, block_at, expected):
    assert render.bar(score, flag_at, block_at, width=10).plain == expected


def test_the_head_that_leads_is_highest_relative_to_its_threshold():
    near = domain("near", heads=[head(score=0.4, flag_at=0.5, block_at=None)])  # 0.8 of the way
    far = domain("far", heads=[head(score=0.6, flag_at=0.9, block_at=None)])  # 0.67 of the way, though higher
    without = domain("without", heads=[head(score=0.99, flag_at=None, block_at=None)])
    assert render.leading([far, near, without]).name == "near.harm"
    assert render.leading([without]).name == "without.harm"
    assert render.leading([]) is None


def test_each_domain_that_acted_is_explained():
    flagged = [
        domain(n, Action.FLAG, [head(score=s, attributions=[attribution(f"{n} words")])])
        for n, s in (("violence", 0.6), ("terror", 0.8))
    ]
    text = shown(render.verdict(verdict(phase(flagged, action=Action.FLAG), action=Action.FLAG), ASKED))
    assert text.startswith(" FLAG   violence, terror  r-1")
    assert 0 < text.index("why terror.harm") < text.index("why violence.harm")


def test_what_was_not_assessed_says_why():
    missing = NotAssessed(NotAssessedReason.NON_FINITE, "the model's activations hold NaN", Phase.PROMPT)
    text = shown(render.verdict(verdict(phase([]), action=Action.NOT_ASSESSED, not_assessed=[missing]), ASKED))
    assert text.startswith(" NOT ASSESSED   r-1\n  non_finite (prompt): the model's activations hold NaN\n")


def test_an_unverified_model_is_told():
    text = shown(render.verdict(verdict(phase([domain()]), verified=False), ASKED))
    assert text.endswith("UNVERIFIED MODEL: the pack was not made for it")


def test_a_chat_shows_each_message_with_its_own_tokens():
    chat = (Message(Role.SYSTEM, "Be kind."), Message(Role.USER, TEXT))
    tokens = [TokenDetail(7, 11, 1, {"violence.harm": 1.0})]
    given = verdict(phase([domain(heads=[head(attributions=[attribution(message=1)])])], tokens=tokens))
    text = shown(render.verdict(given, CheckInput(prompt=chat)), colour=True)
    assert "white on rgb" not in text
    assert "\x1b[37;48;2;220;25;25mkill\x1b[0m you" in text
    assert "Be kind." in text
    plain = shown(render.verdict(given, CheckInput(prompt=chat)))
    assert "  system\n    Be kind.\n  user\n    I will kill you\n" in plain
    assert "“kill”" in plain


def test_prompt_and_completion_are_shown_apart():
    given = verdict(phase([domain()]), phase([domain()], Phase.COMPLETION, read=2, total=3))
    text = shown(render.verdict(given, CheckInput("the prompt", "the answer")))
    assert "completion  2 tokens, 1 held for the next chunk" in text
    assert text.index("the prompt") < text.index("completion  2 tokens") < text.index("the answer")


def test_without_token_detail_the_spans_of_the_features_colour_the_text():
    given = verdict(phase([domain(heads=[head(attributions=[attribution()])])]))
    assert "\x1b[37;48;2;220;25;25mkill\x1b[0m" in shown(render.verdict(given, ASKED), colour=True)


def test_colours_say_what_adds_and_what_takes_away():
    text = coloured("abcd", [SpanContribution(0, 1, 2.0), SpanContribution(1, 2, -1.0), SpanContribution(2, 3, 0.01)])
    styles = {(s.start, s.end): str(s.style) for s in text.spans}
    assert styles == {(0, 1): "white on rgb(220,25,25)", (1, 2): "white on rgb(25,50,145)"}


def test_tokens_that_share_a_character_add_up():
    text = coloured("🙂x", [SpanContribution(0, 1, 1.0), SpanContribution(0, 1, 1.0), SpanContribution(1, 2, 2.0)])
    assert {(s.start, s.end) for s in text.spans} == {(0, 2)}


@pytest.mark.parametrize(
    "text", ["I will smash 🔪👨‍👩‍👧‍👦 your skull", "👩‍❤️‍👨 👍🏽 your skull", "e\u0301 and क्षि, words here"]
)
def test_joined_characters_hide_nothing_of_what_stands_behind_them(text):
    parts = [SpanContribution(i, i + 1, (-1.0) ** i * (1 + i)) for i in range(len(text))]
    printed = shown(Padding(coloured(text, parts), (0, 0, 0, 4), expand=False), colour=False)
    assert printed.strip() == text


def test_a_long_text_is_shown_around_its_strongest_token():
    text = "a" * 5000 + "KNIFE" + "b" * 5000
    plain = coloured(text, [SpanContribution(5000, 5005, 1.0)]).plain
    assert plain.startswith("[4,400 characters before] aaa")
    assert plain.endswith("bbb [4,405 characters after]")
    assert "KNIFE" in plain
    assert len(plain) < EXCERPT + 100


def test_a_text_cannot_write_to_the_terminal():
    hostile = "\x1b[2J\x9b31m\u202egnirts\x00\r[bold]not markup[/bold]\ud800\ttab\n"
    assert visible(hostile) == "␛[2J\ufffd31m\ufffdgnirts␀␍[bold]not markup[/bold]\ufffd\ttab\n"
    assert len(visible(hostile)) == len(hostile)
    given = verdict(phase([domain(heads=[head(attributions=[attribution("\x1b]0;title\x07")])])]), request_id="\x1b[1m")
    text = shown(render.verdict(given, CheckInput(prompt=hostile)))
    assert "\x1b" not in text
    assert "[bold]not markup[/bold]" in text
    assert "␛]0;title␇" in text


def test_a_line_of_a_running_stream():
    given = verdict(
        phase([domain(action=Action.FLAG, heads=[head(score=0.6)]), domain("terror")], Phase.COMPLETION, Action.FLAG),
        action=Action.FLAG,
    )
    line = watch.running_line(given, Phase.COMPLETION, "and  then\n").plain
    assert line == "FLAG          violence █████╎···┃ 0.60  terror █····╎···┃ 0.10  and then"
    assert watch.running_line(given, Phase.COMPLETION, None).plain.endswith("  (end)")
    empty = verdict(action=Action.NOT_ASSESSED, not_assessed=[NotAssessed(NotAssessedReason.NOTHING_READ, "")])
    assert watch.running_line(empty, Phase.COMPLETION, "a").plain == "NOT ASSESSEDnothing_read  a"


def test_a_score_of_one_passage_says_which():
    blocked = dataclasses.replace(head(score=0.95, attributions=[attribution()]), passage=Passage(7, 15, 0, 0, 2))
    given = verdict(phase([domain(action=Action.BLOCK, heads=[blocked])], action=Action.BLOCK), action=Action.BLOCK)
    assert "of the passage of 2 tokens from “kill you…” to “…kill you”, which scores above the whole" in shown(
        render.verdict(given, ASKED)
    )
    chat = CheckInput(prompt=(Message(Role.USER, "Tell me all."), Message(Role.ASSISTANT, "Gladly, now.")))
    across = dataclasses.replace(blocked, passage=Passage(5, 6, 0, 1, 4))
    given = verdict(phase([domain(action=Action.BLOCK, heads=[across])], action=Action.BLOCK), action=Action.BLOCK)
    assert "of the passage of 4 tokens from “me all.…” to “…Gladly”" in shown(render.verdict(given, chat))
