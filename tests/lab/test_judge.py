"""Detection: balanced accuracy by hand, hard negatives, and a control that nobody can tell from the rest."""

import json
import re

import pytest

from guard.errors import InvalidInput
from guard.lab.explain.annotator import Files
from guard.lab.explain.judge import JudgeConfig, balanced_accuracy, exchanged, judge
from guard.lab.explain.sheets import Subject
from tests.lab import explained


def count(text):
    return len(text.split())


def run(files, out, **settings):
    return judge(explained=files, out=out, config=JudgeConfig(**settings), annotator=Files(out, count))


def latents(number):
    known, told = [], []
    for i in range(number):
        latent = f"model.layers.3/{i}"
        fires = [explained.window(f"text {n} on word{i}", {f"word{i}": 1.0}) for n in range(4)]
        near = [explained.window(f"text {n} of {i} on another word alike", kind="near_miss") for n in range(2)]
        silent = [explained.window(f"silence {n} of {i}", kind="silent") for n in range(9)]
        known.append(explained.evidence(latent, [*silent, *fires, *near]))
        told.append(explained.explanation(latent, f"word{i}"))
    return known, told


def texts(task):
    head, body = task["user"].split("\n\n")
    return head.removeprefix("F1 "), [line.split(" ", 1)[1] for line in body.splitlines()]


def oracle(task):
    word, lines = texts(task)
    return {"F1": [n for n, text in enumerate(lines, 1) if word in text]}


def test_balanced_accuracy_weighs_both_sides_alike():
    # Two of three found, one of two spared.
    assert balanced_accuracy([True, True, False, True, False], [True, True, True, False, False]) == pytest.approx(
        7 / 12
    )
    assert balanced_accuracy([False] * 5, [True, True, True, False, False]) == 0.5
    assert balanced_accuracy([True, False], [True, False]) == 1


def test_half_fire_and_the_others_are_near_misses_first(tmp_path):
    files = explained.written(tmp_path, *latents(1))
    assert run(files, tmp_path / "out").open == 1  # nobody else to exchange explanations with
    (task,) = explained.tasks(tmp_path / "out")
    _, lines = texts(task)
    assert sorted(line.split()[0] + " " + line.split()[-1] for line in lines) == [
        "silence 0", "silence 0", "text alike", "text alike", "text word0", "text word0", "text word0", "text word0",
    ]  # fmt: skip
    assert lines != sorted(lines)
    assert run(files, tmp_path / "two", windows=2).open == 1
    (task,) = explained.tasks(tmp_path / "two")
    assert sorted(line.split()[-1] for line in texts(task)[1]) == ["alike", "alike", "word0", "word0"]


def test_detection_and_its_control_end_to_end(tmp_path):
    files, out = explained.written(tmp_path, *latents(6)), tmp_path / "out"
    run(files, out)
    explained.answer_all(out, oracle)
    summary = run(files, out)
    lines = [json.loads(line) for line in (out / "scores.jsonl").open()]
    # A word of another latent stands in none of the texts: none is said to fire, half are right.
    assert [line["scores"] for line in lines] == [{"detection": 1.0, "detection_shuffled": 0.5}] * 6
    assert [(line["items"], line["firing"]) for line in lines] == [(8, 4)] * 6
    assert (summary.latents, summary.open, summary.median) == (6, 0, {"detection": 1.0, "detection_shuffled": 0.5})
    assert (summary.lead, summary.lead_interval) == (0.5, (0.5, 0.5))
    asked = explained.tasks(out)
    assert summary.cost.prompts == len(asked) == 12
    assert summary.cost.tokens_sent == sum(count(t["system"]) + count(t["user"]) for t in asked)
    assert json.loads((out / "summary.json").read_text())["lead"] == 0.5


def test_the_control_cannot_be_told_from_the_rest(tmp_path):
    files, out = explained.written(tmp_path, *latents(6)), tmp_path / "out"
    run(files, out)
    asked = explained.tasks(out)
    assert all(re.fullmatch("detect/[0-9a-f]{12}", t["id"]) for t in asked)
    assert len({t["system"] for t in asked}) == 1
    own = [texts(t)[0] == f"word{re.search('on word(.)', t['user'])[1]}" for t in asked]
    assert sum(own) == 6
    assert own not in ([True] * 6 + [False] * 6, [False] * 6 + [True] * 6)
    # The same windows in the same order, so that the explanation alone is another; and one of the two in either half.
    shown = [tuple(texts(t)[1]) for t in asked]
    assert len(set(shown)) == len(set(shown[:6])) == 6


def test_what_is_answered_by_now_is_scored(tmp_path):
    files, out = explained.written(tmp_path, *latents(3)), tmp_path / "out"
    run(files, out, shuffled=False)
    first = explained.tasks(out)[0]
    (out / "answers" / "one.jsonl").write_text(
        json.dumps({"id": first["id"], "prompt": first["prompt"], "answer": oracle(first)})
    )
    summary = run(files, out, shuffled=False)
    assert (summary.latents, summary.open, summary.lead, summary.lead_interval) == (1, 2, None, None)
    with pytest.raises(InvalidInput, match="found a run with other settings"):
        run(files, out, shuffled=True)


def test_an_answer_that_does_not_fit_is_named(tmp_path):
    files, out = explained.written(tmp_path, *latents(1)), tmp_path / "out"
    run(files, out)
    (task,) = explained.tasks(out)
    file = out / "answers" / "one.jsonl"
    file.write_text(json.dumps({"id": task["id"], "prompt": task["prompt"], "answer": {"F1": [9]}}))
    with pytest.raises(InvalidInput) as refused:
        run(files, out)
    assert str(refused.value) == f"{file}:1: {task['id']}: F1: found 9, expected a number from 1 to 8"


def test_every_latent_gets_another_s_explanation():
    told = ["a", "b", "b", "c", "b"]
    subjects = [Subject(explained.explanation(f"m/{i}", text), ()) for i, text in enumerate(told)]
    for seed in range(20):
        after = exchanged(subjects, seed)
        assert [s.explanation.latent for s in after] == [f"m/{i}" for i in range(5)]
        assert all(s.explanation.explanation != text for s, text in zip(after, told, strict=True))
    different = [Subject(explained.explanation(f"m/{i}", f"{i}"), ()) for i in range(9)]
    # Where all differ, each is used once.
    assert sorted(s.explanation.explanation for s in exchanged(different, 0)) == [str(i) for i in range(9)]
    assert exchanged(subjects[1:3], 0) == []
