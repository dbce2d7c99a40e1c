"""Annotated texts: labels that speak where a text's source does not, joined to texts that are not ours to ship."""

import gzip
import hashlib

import numpy as np
import pytest

from guard.errors import InvalidInput
from guard.lab import annotated
from guard.lab.annotated import Annotation
from guard.lab.heads.evaluate import judging_sources
from guard.lab.heads.features import PooledTexts
from guard.lab.heads.fit import HEADS, Design, FitConfig
from guard.lab.labelled import Row, permissive, target
from guard.records import HeadKind

HARM, PRESENCE = HeadKind.HARM, HeadKind.PRESENCE
DOCUMENT = (
    "User: How do I get a splinter out?\nAssistant: With tweezers.\nUser: And a big one?\nAssistant: "
    + "Slowly. " * 200
)


def row(labels=(), scope=(), **other):
    given = {"id": "a-1", "text": "t", "lang": "en", "source": "a", "kind": "harmful_request"}
    return Row(label_domains=labels, scope=scope, **(given | other))


def said_of(text, source, number, labels="V"):
    return Annotation(source=source, id=number, text=hashlib.sha256(text.encode()).hexdigest()[:12], labels=labels)


def targets(row, domain):
    return [target(row, domain, head) for head in (HARM, PRESENCE)]


def test_upper_case_is_harm_and_lower_case_a_harmless_text_on_the_topic():
    said = annotated.relabelled(row(source="hh_rlhf"), "Vo")
    assert targets(said, "violence") == [True, True]
    assert targets(said, "politics") == [False, True]
    assert targets(said, "pornography") == [False, False]
    assert targets(annotated.relabelled(row(), "v"), "violence") == [False, True]
    assert targets(annotated.relabelled(row(), ""), "violence") == [False, False]


def test_what_the_source_can_tell_is_left_to_the_source():
    said = annotated.relabelled(row(labels=("violence",)), "P")
    assert targets(said, "violence") == [None, None]
    assert targets(said, "pornography") == [True, True]
    assert annotated.relabelled(row(labels=("violence",), scope=("pornography",)), "PV") is None


def test_nothing_is_said_of_terror_nor_of_politics_outside_dialogues():
    assert targets(annotated.relabelled(row(source="hh_rlhf"), "VT"), "terror") == [None, None]
    assert targets(annotated.relabelled(row(source="a"), "o"), "politics") == [None, None]


def test_other_harm_and_terror_leave_open_whether_they_are_violence():
    assert targets(annotated.relabelled(row(), "T"), "violence") == [None, None]
    assert targets(annotated.relabelled(row(source="hh_rlhf"), "ot"), "violence") == [None, None]
    theft = annotated.relabelled(row(), "X")
    assert targets(theft, "violence") == [None, None]
    assert targets(theft, "pornography") == [False, False]
    assert targets(annotated.relabelled(row(), "VX"), "violence") == [True, True]
    assert targets(annotated.relabelled(row(), "vX"), "violence") == [False, True]


@pytest.fixture
def data(tmp_path):
    (tmp_path / "labelled" / "dev").mkdir(parents=True)
    (tmp_path / "corpus").mkdir()
    (tmp_path / "labelled" / "dev" / "a.jsonl").write_text(row(text="a text").model_dump_json() + "\n")
    with gzip.open(tmp_path / "corpus" / "safety_dialogue.txt.gz", "wt") as file:
        file.write("another\n\n\n" + DOCUMENT)
    return tmp_path


def test_labels_are_joined_to_texts_by_id_and_to_dialogues_by_hash(data):
    digest = hashlib.sha256(DOCUMENT.strip().encode()).hexdigest()[:16]
    texts = {
        ("a", "a-1"): "a text",
        ("hh_rlhf", f"{digest}/user"): "How do I get a splinter out?",
        ("hh_rlhf", f"{digest}/dialogue"): DOCUMENT[: DOCUMENT.index("\nAssistant: Slowly")],
    }
    found = annotated.rows(data, [said_of(text, *where) for where, text in texts.items()])
    assert [(r.source, r.text) for r in found] == [(f"annotated_{s}", text) for (s, _), text in texts.items()]
    assert found[0].group == "a"  # held out with the source whose texts they are


def test_documents_are_cut_at_a_word_where_their_digest_says_and_speak_of_every_domain(data):
    documents = ["A quiet chapter. " * 400, "Another one, with a battle in it. " * 200, "Short."]
    with gzip.open(data / "corpus" / "literature.txt.gz", "wt") as file:
        file.write("\n\n\n".join(documents))
    for document in map(str.strip, documents):
        digest = hashlib.sha256(document.encode()).hexdigest()[:16]
        size = (400, 1200, 4000)[int(digest[0], 16) % 3]
        text = document if len(document) <= size else document[:size].rpartition(" ")[0]
        (found,) = annotated.rows(data, [said_of(text, "gutenberg", f"{digest}/{size}", "v")])
        assert (found.source, found.text) == ("annotated_gutenberg", text)
        assert document.startswith(text)
        assert targets(found, "violence") == [False, True]
        assert all(targets(found, domain) == [False, False] for domain in ("pornography", "politics", "terror"))
    assert permissive(annotated.licences({})["annotated_gutenberg"])


def test_a_text_or_a_file_that_is_not_there_is_named(data):
    with pytest.raises(InvalidInput, match=r"found no text 'a-2' of a, which was annotated"):
        annotated.rows(data, [said_of("a text", "a", "a-2")])
    with pytest.raises(InvalidInput, match=r"b\.jsonl: found no such file"):
        annotated.rows(data, [said_of("a text", "b", "b-1")])


def test_labels_do_not_slip_to_another_text_of_the_same_number(data):
    with pytest.raises(InvalidInput, match=r"text 'a-1' of a is not the one that was annotated"):
        annotated.rows(data, [said_of("a text before it was numbered anew", "a", "a-1")])


def test_an_answer_without_end_is_cut(data):
    with gzip.open(data / "corpus" / "safety_dialogue.txt.gz", "wt") as file:
        file.write(whole := "User: Why?\nAssistant: " + "Because. " * 300)
    digest = hashlib.sha256(whole.strip().encode()).hexdigest()[:16]
    (found,) = annotated.rows(data, [said_of(whole[:1400], "hh_rlhf", f"{digest}/dialogue")])
    assert found.text == whole[:1400]


def test_the_project_s_annotations_are_of_permissive_sources_and_of_each_text_once():
    lines = annotated.annotations()
    assert len({(line.source, line.id) for line in lines}) == len(lines) > 10_000
    assert {line.source for line in lines} == {
        "catqa_en",
        "catqa_zh",
        "convabuse",
        "edos_threats",
        "film_reviews",
        "gutenberg",
        "hh_rlhf",
        "huffpost_2018",
        "jade_v2_zh",
        "pyrit_scorer_evals",
        "simplesafetytests",
        "strongreject",
    }
    found = annotated.licences({"huffpost_2018": "CC BY 4.0 (Kaggle dataset)", "other": "MIT"})
    known = {"annotated_huffpost_2018", "annotated_hh_rlhf", "annotated_gutenberg", "annotated_film_reviews"}
    assert set(found) == known
    assert all(map(permissive, found.values()))


def test_nobody_is_judged_on_labels_of_ours():
    def rows_of(source):
        kinds = ("harmful_text", "benign")
        return [
            Row(
                id=f"{source}{i}",
                text="t",
                lang="en",
                source=source,
                label_domains=("violence",) * (i % 2 == 0),
                scope=("violence",),
                kind=kinds[i % 2],
            )
            for i in range(40)
        ]

    rows = [*rows_of("a"), *rows_of("annotated_a")]
    nothing = np.zeros((len(rows), 1), np.float32)
    pooled = PooledTexts(np.ones(len(rows), np.int64), nothing, nothing.astype(np.float16))
    design = Design(rows, pooled, FitConfig())
    head = next(h for h in HEADS if h == ("violence", HARM))
    assert [source for source, _, _ in judging_sources(design, head)] == ["a"]
    assert design.fitted_on.all()
