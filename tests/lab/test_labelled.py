"""Labelled texts: what each row can decide, how sources are capped and grouped, and the project's own sentences."""

import json
from collections import Counter
from itertools import product

import pytest

from guard.errors import InvalidInput
from guard.lab import labelled
from guard.lab.labelled import DOMAINS, Row, permissive, target
from guard.records import HeadKind, Role

PLANNED = {
    "terror/en-harmful_request-001": "own_sentences_first",
    "terror/zh-b-harmful_request-001": "own_sentences_second",
    "terror/en-h-topical-001": "own_sentences_third",
    "terror/zh-k-topical-001": "own_sentences_fourth",
    "terror/zh-u-topical-001": "own_sentences_long",
}
HARM, PRESENCE = HeadKind.HARM, HeadKind.PRESENCE


def row(kind="benign", labels=(), scope=DOMAINS, source="somewhere", **other):
    return Row(id="1", text="t", lang="en", source=source, label_domains=labels, scope=scope, kind=kind, **other)


@pytest.mark.parametrize(
    ("kind", "harm"),
    [
        ("harmful_request", True),
        ("harmful_text", True),
        ("topical", False),
        ("benign", False),
        ("hard_negative", False),
    ],
)
def test_a_labelled_text_is_about_its_domain_and_harmful_by_its_kind(kind, harm):
    given = row(kind, ("violence",))
    assert target(given, "violence", PRESENCE) is True
    assert target(given, "violence", HARM) is harm


@pytest.mark.parametrize("kind", ["harmful_request", "harmful_text", "topical", "benign", "hard_negative"])
def test_without_its_label_a_row_is_a_negative_within_scope_and_unknown_outside(kind):
    given = row(kind, ("violence",), scope=("violence", "terror"))
    assert target(given, "terror", HARM) is False
    assert target(given, "terror", PRESENCE) is False
    assert target(given, "politics", HARM) is None
    assert target(given, "politics", PRESENCE) is None


def test_a_label_counts_even_outside_its_row_s_scope():
    given = row("harmful_text", ("violence",), scope=())
    assert (target(given, "violence", HARM), target(given, "violence", PRESENCE)) == (True, True)


@pytest.mark.parametrize("source", ["beavertails_30k_test", "pyrit_scorer_evals", "own_refusal"])
def test_hard_negatives_that_answer_risky_questions_say_nothing_of_presence(source):
    given = row("hard_negative", source=source)
    assert target(given, "violence", HARM) is False
    assert target(given, "violence", PRESENCE) is None
    assert target(row("benign", source=source), "violence", PRESENCE) is False


def test_a_pair_s_text_with_the_concept_is_about_it_and_perhaps_harmful():
    def with_(subdomain):
        found = row("topical", ("terror",), scope=("terror",), source="own_pairs")
        return found.model_copy(update={"id": f"terror/{subdomain}/en-01/with"})

    without = row("benign", scope=("terror",), source="own_pairs")
    assert [target(with_("terrorism"), "terror", h) for h in (HARM, PRESENCE)] == [True, True]
    assert [target(with_("religious_oppression"), "terror", h) for h in (HARM, PRESENCE)] == [None, True]
    assert [target(without, "terror", h) for h in (HARM, PRESENCE)] == [False, False]
    assert [target(without, "violence", h) for h in (HARM, PRESENCE)] == [None, None]


def test_sources_that_share_texts_are_held_out_together():
    def group(source):
        return row(source=source).group

    assert group("catqa_en") == group("catqa_zh") == "catqa"
    assert group("s_eval_base_en") == group("s_eval_base_zh") == "s_eval"
    assert group("huffpost_2018") == "huffpost_2018"
    own = {s: row(source=s).group for s in ("own_pairs", "own_lexical", "own_refusal", "own_informative")}
    assert own == {"own_pairs": "own_pairs"} | dict.fromkeys(
        ("own_lexical", "own_refusal", "own_informative"), "own_sentences_first"
    )
    plans = {i: row(source="own_terror").model_copy(update={"id": i}).group for i in PLANNED}
    assert plans == PLANNED


# -- other people's sources, read from a folder


def write_source(folder, name, positives, negatives):
    lines = [
        row("harmful_text" if i < positives else "benign", ("violence",) if i < positives else (), source=name)
        .model_copy(update={"id": f"{name}/{i}", "text": f"text {i}"})
        .model_dump_json()
        for i in range(positives + negatives)
    ]
    (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("positives", "negatives", "kept"),
    [
        (30, 30, (5, 5)),  # both are plenty: half each
        (2, 30, (2, 8)),  # few positives: all of them, and negatives fill up
        (30, 3, (7, 3)),  # few negatives: positives fill up
        (4, 4, (4, 4)),  # fewer rows than the cap
        (30, 0, (10, 0)),
        (0, 30, (0, 10)),
    ],
)
def test_a_source_gives_at_most_its_cap_with_positives_first(tmp_path, positives, negatives, kept):
    write_source(tmp_path, "a", positives, negatives)
    rows = labelled.external_rows(tmp_path, cap=10, seed=0)
    labels = Counter(bool(r.label_domains) for r in rows)
    assert (labels[True], labels[False]) == kept
    assert len({r.id for r in rows}) == len(rows)


def test_the_seed_chooses_the_same_rows_again_and_the_cap_is_for_each_source(tmp_path):
    write_source(tmp_path, "a", 30, 30)
    write_source(tmp_path, "b", 30, 30)
    rows = labelled.external_rows(tmp_path, cap=10, seed=3)
    assert Counter(r.source for r in rows) == {"a": 10, "b": 10}
    assert labelled.external_rows(tmp_path, cap=10, seed=3) == rows
    assert labelled.external_rows(tmp_path, cap=10, seed=4) != rows
    assert labelled.digest(rows) != labelled.digest(rows[:-1])


def test_a_row_that_does_not_fit_is_named_by_file_and_line(tmp_path):
    write_source(tmp_path, "a", 1, 0)
    with (tmp_path / "a.jsonl").open("a") as stream:
        stream.write(json.dumps(row().model_dump() | {"kind": "evil"}) + "\n")
    message = (
        f"{tmp_path}/a.jsonl:2: kind: Input should be 'harmful_request', 'harmful_text', 'topical', 'benign' or "
        "'hard_negative'"
    )
    with pytest.raises(InvalidInput) as caught:
        labelled.external_rows(tmp_path, cap=10, seed=0)
    assert str(caught.value) == message


def test_a_folder_without_rows_is_named(tmp_path):
    with pytest.raises(InvalidInput) as caught:
        labelled.external_rows(tmp_path, cap=10, seed=0)
    assert str(caught.value) == f"{tmp_path}: holds no *.jsonl, expected labelled rows"


# -- the project's own sentences


def test_every_sub_domain_has_40_english_and_10_chinese_pairs():
    found = Counter((p.domain, p.subdomain, p.lang) for p in labelled.pairs())
    subdomains = {key[:2] for key in found}
    assert len(subdomains) == 17
    assert {domain for domain, _ in subdomains} == set(DOMAINS)
    assert {s for s in subdomains if found[*s, "en"] < 40 or found[*s, "zh"] < 10} == set()


def test_a_sub_domain_s_name_is_used_once():
    names = [name for _, name in {(p.domain, p.subdomain) for p in labelled.pairs()}]
    assert len(names) == len(set(names))


def test_ids_and_texts_are_unique_and_no_pair_says_the_same_twice():
    rows = [*labelled.own_rows(), *labelled.lookalike_rows()]
    assert [i for i, n in Counter(r.id for r in rows).items() if n > 1] == []
    assert [t for t, n in Counter(r.text for r in rows).items() if n > 1] == []
    assert [p.id for p in labelled.pairs() if not p.id.startswith(f"{p.domain}/{p.subdomain}/{p.lang}-")] == []


def test_look_alikes_are_kept_for_judging():
    fitting, held = labelled.own_rows(), labelled.lookalike_rows()
    assert Counter(r.source for r in held) == {f"lookalike_{d}": 50 for d in DOMAINS}
    assert not {r.id for r in held} & {r.id for r in fitting}
    assert not {_bare(r.text) for r in held} & {_bare(r.text) for r in fitting}
    assert not any(r.own for r in held)
    assert all(target(r, d, HARM) is False for r in held for d in DOMAINS)


def test_cases_of_the_pack_and_texts_of_the_demo_are_not_fitted_on():
    fitting = {_bare(r.text) for r in labelled.own_rows()}
    for name in ("cases.jsonl", "demo.jsonl"):
        assert [line["id"] for line in labelled._own(name) if _bare(line["text"]) in fitting] == []


def test_in_chats_each_text_of_others_stands_once_and_half_of_our_own():
    others = [row(source="somewhere").model_copy(update={"id": str(i)}) for i in range(900)]
    bare = [*others, *labelled.lookalike_rows(), *labelled.own_rows()]
    found = labelled.in_chats(bare, seed=0)
    assert found == labelled.in_chats(bare, seed=0)
    assert {r.frame for r in found} == {"prompt", "completion"}
    assert [r.id for r in found if not r.own] == [r.id for r in bare if not r.own]
    frames = Counter(r.frame for r in found if not r.own)
    assert 0.6 < frames["prompt"] / frames.total() < 0.73
    own = [r for r in bare if r.own and r.source != "own_pairs"]
    assert 0.48 < sum(r.own for r in found) / len(own) < 0.52
    assert not [r for r in found if r.source == "own_pairs"]
    assert labelled.digest(found) != labelled.digest([r.model_copy(update={"frame": "text"}) for r in found])


def test_an_answer_follows_a_question_in_its_language_that_tells_nothing():
    chinese = row(frame="completion").model_copy(update={"lang": "zh"})
    (asked,) = labelled.said_before(chinese)
    assert asked.role is Role.USER
    assert not asked.content.isascii()
    assert labelled.said_before(row(frame="completion"))[0].content.isascii()
    assert labelled.said_before(row(frame="prompt")) == ()


def test_informative_texts_are_about_their_topic_and_harmless():
    rows = [r for r in labelled.own_rows() if r.source == "own_informative"]
    assert {r.label_domains for r in rows} == {(d,) for d in DOMAINS}
    for r in rows:
        assert (target(r, r.label_domains[0], HARM), target(r, r.label_domains[0], PRESENCE)) == (False, True)
    # A text on terror may be about violence too, and the other way round.
    terror = next(r for r in rows if r.label_domains == ("terror",))
    assert target(terror, "violence", PRESENCE) is None
    assert target(terror, "politics", PRESENCE) is False


def test_long_texts_of_our_own_are_a_source_by_themselves_harmful_ones_and_harmless_in_both_languages():
    rows = [r for r in labelled.own_rows() if r.source == "own_long"]
    assert {r.group for r in rows} == {"own_sentences_long"}
    assert min(len(r.text) for r in rows) > 100
    for lang, domain in product(("en", "zh"), ("pornography", "violence", "terror")):
        found = Counter(target(r, domain, HARM) for r in rows if r.lang == lang)
        assert found[True] == 18
        assert found[False] > 100


def _bare(text):
    return "".join(c for c in text.lower() if c.isalnum())


@pytest.mark.parametrize("licence", ["MIT", "Apache-2.0", "CC0 1.0", "CC BY 4.0 (some data set)", "MIT (upstream)"])
def test_licences_that_pass_nothing_on_are_permissive(licence):
    assert permissive(licence)


@pytest.mark.parametrize(
    "licence",
    [
        "CC BY-NC 4.0",
        "CC BY-NC-SA 4.0",
        "CC BY-SA 3.0 (some data set)",
        "GPL-3.0",
        "none stated (a research set)",
        "repo MIT; research use",
        "repo MIT; text under a platform's terms",
        "MIT / CC BY-NC 4.0",
        "",
    ],
)
def test_licences_that_bind_are_not(licence):
    assert not permissive(licence)
