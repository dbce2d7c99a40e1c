"""Shared texts: every latent of a prompt with its truth on all texts of it; and the commands, from evidence on."""

import json

import numpy as np
import pytest

from guard.cli.main import main
from guard.errors import InvalidInput
from guard.lab.explain.explain import prepare
from guard.lab.explain.pieces import read_pieces
from guard.lab.explain.records import write
from guard.lab.explain.shared import Source, find, share
from guard.lab.explain.sheets import Subject, read_subjects
from guard.lab.explain.tokens import TokenTexts
from guard.lab.stages import read_rows
from tests.lab import explained, told

WORDS = ("storm", "boat", "garden")  # latent k fires on WORDS[k], at 0.9
LATENTS = len(WORDS)
WRITTEN = [
    f"{who} saw {what} {when}"
    for who in ("Ann", "Bob", "Cid", "Dora", "一位老船长")
    for when in ("today", "at noon", "too late", "again", "once", "in May", "at last", "twice")
    for what in ("a storm=0.9", "a boat=0/0.9", "a garden=0/0/0.9", "a boat=0/0.9 in a storm=0.9", "nothing")
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    model = told.model(folder / "model")
    told.harvested(folder / "texts", [told.own(text) for text in WRITTEN], model, shard_texts=60)
    told.suite(folder / "saes")
    latents = told.latents(folder / "latents.jsonl", range(LATENTS))
    out = folder / "explained"
    prepare(saes=folder / "saes", texts=folder / "texts", latents=latents, out=out)
    write(
        out / "explanations.jsonl",
        [explained.explanation(f"{told.POINT}/{k}", f"the word {word}", sae=told.SAE) for k, word in enumerate(WORDS)],
    )
    return folder


def source(folder):
    return Source(folder / "saes", folder / "texts")


def test_every_latent_is_known_on_all_texts_of_its_prompt(made):
    subjects, not_testable = read_subjects(made / "explained")
    assert (len(subjects), not_testable) == (LATENTS, 0)
    (known,) = share([tuple(subjects)], source(made))
    together = {w.text for s in subjects for w in s.windows}
    elsewhere = []  # what latents do on the others' windows
    for latent, (before, after) in enumerate(zip(subjects, known, strict=True)):
        # The texts are short, so that a window is the whole of one: what its explainer saw is left out, nothing else.
        shown = {w.text for w in before.shown}
        assert {w.text for w in after.windows} == together - shown
        assert shown & together
        assert set(before.windows) <= set(after.windows)
        for window in after.windows:
            # It fires where its word ends, at 0.9 / SCALE.
            ends = window.text.find(WORDS[latent]) + len(WORDS[latent]) if WORDS[latent] in window.text else -1
            stop = np.cumsum([len(token) for token in window.tokens])
            assert window.values == pytest.approx([0.45 * (end == ends) for end in stop], abs=0.002)
            assert (window.kind in {"silent", "near_miss"}) == (ends < 0)
        own = {w.text for w in before.windows}
        elsewhere += [w.peak > 0 for w in after.windows if w.text not in own]
    assert 0 < sum(elsewhere) < len(elsewhere)


def test_a_window_is_found_where_it_stands(made):
    pieces = read_pieces(made / "texts", read_rows(made / "texts"))
    words = TokenTexts(made / "model")
    text = "一位老船长 saw nothing once"
    piece = WRITTEN.index(text)
    ids = pieces.tokens(piece).tolist()
    texts, begins = words.split(ids)
    assert len(texts) < len(ids)  # characters that were split are whole again
    (place,) = find({tuple(texts[1:-1])}, pieces, words)[tuple(texts[1:-1])]
    assert (place.piece, place.begins, place.stop) == (piece, tuple(begins[1:-1]), begins[-1])
    # Shorter than the key that it is looked up by, and in two kinds of text of five, of five people at eight times.
    storm = find({(" ", "storm"), ("no", "such")}, pieces, words)
    assert sum(map(len, storm.values())) == len(storm[" ", "storm"])
    assert storm["no", "such"] == []


def test_evidence_of_other_texts_or_saes_is_refused(made, tmp_path):
    subjects, _ = read_subjects(made / "explained")
    other = told.suite(tmp_path / "saes")
    flat = np.ones(told.WIDTH, dtype=np.float32)
    np.savez(other / told.SAE / "stats.npz", firing_rate=flat / 8, scale=flat * told.SCALE * 2)
    with pytest.raises(InvalidInput, match="than evidence says; expected the SAEs and texts that it was cut from"):
        share([tuple(subjects)], Source(other, made / "texts"))
    stranger = Subject(subjects[0].explanation, (explained.window("not a text of theirs", {"text": 1.0}),))
    with pytest.raises(InvalidInput, match="found no text with 'not a text of theirs', which evidence shows"):
        share([(stranger,)], source(made))


@pytest.fixture
def command(made, capsys, monkeypatch):
    """Runs a command on the evidence, answers what it asks, and runs it again: exit status, and what it says."""
    monkeypatch.setenv("COLUMNS", "300")

    def run(name, out, *options, answer=True):
        given = ["lab", name, "--explained", str(made / "explained"), "--out", str(out), *options]
        status = main(given)
        if answer and status == 0:
            explained.answer_all(out, oracle)
            capsys.readouterr()
            status = main(given)
        said = capsys.readouterr()
        return status, said.out if answer else said.err

    return run


def oracle(task):
    head, *texts = task["user"].split("\n\n")
    words = [line.rpartition(" ")[2] for line in head.splitlines()]
    if task["prompt"] == "token-1":
        lines = [text.splitlines()[1:] for text in texts]
        return {
            f"F{f}": {
                str(t): {line.split()[0]: 9 for line in found if word in line} for t, found in enumerate(lines, 1)
            }
            for f, word in enumerate(words, 1)
        }
    items = [line.split(" ", 1) for line in "\n".join(texts).splitlines()]
    return {f"F{f}": [int(n) for n, text in items if word in text] for f, word in enumerate(words, 1)}


def test_the_commands_from_tokens_to_shared_segments(made, command, tmp_path):
    token, segment, shared = tmp_path / "token", tmp_path / "segment", tmp_path / "shared"
    status, said = command("simulate", token, "--level", "token")
    assert status == 0
    assert "all 3 tasks are answered" in said
    assert f"{token}: 3 latents scored (0 open, 0 not testable), median simulation_token 1.00" in said
    status, said = command("simulate", segment, "--against", str(token))
    assert status == 0
    assert "simulation_segment against simulation_token over 3 latents: " in said
    harvest = ["--saes", str(made / "saes"), "--texts", str(made / "texts")]
    given = ["--together", "3", "--windows", "2", "--shared", *harvest, "--against", str(token)]
    status, said = command("simulate", shared, *given)
    assert status == 0
    assert "all 1 tasks are answered" in said
    summary = {name: json.loads((tmp_path / name / "summary.json").read_text()) for name in ("segment", "shared")}
    assert summary["shared"]["cost"]["tokens_per_latent"] < 0.4 * summary["segment"]["cost"]["tokens_per_latent"]
    assert summary["shared"]["agreement"][0]["cost_cut"] > summary["segment"]["agreement"][0]["cost_cut"] > 0.3
    lines = [json.loads(line) for line in (shared / "scores.jsonl").open()]
    assert [line["scores"]["simulation_segment"] for line in lines] == [pytest.approx(1)] * 3


def test_the_command_that_judges(command, tmp_path):
    status, said = command("judge", tmp_path / "judged")
    assert status == 0
    assert "3 latents judged (0 tasks open, 0 latents not testable), mean detection 1.00" in said
    assert "ahead of shuffled explanations by 0." in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--level", "word"], "--level: found 'word', expected token, segment or embedding"),
        (["--level", "token", "--segment-tokens", "4"], "--segment-tokens has no effect at --level token"),
        (["--level", "embedding", "--together", "2"], "--together has no effect at --level embedding"),
        (["--saes", "runs/saes"], "--saes has no effect without --shared"),
        (["--shared"], "--shared has no effect on one latent in a prompt: give --together"),
        (["--shared", "--together", "2"], "--shared needs --saes and --texts, as given to `guard lab explain`"),
        (["--shared", "--together", "2", "--saes", "s", "--texts", "t", "--corpus", "c"], "--shared: found --corpus, but none was given to"),
    ],
)  # fmt: skip
def test_options_that_make_no_sense(command, tmp_path, options, message):
    status, said = command("simulate", tmp_path / "out", *options, answer=False)
    assert status == 2
    assert message in said
