"""Simulation: scores by hand, what is sent word for word, and runs that agree."""

import json
import re
from itertools import chain

import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr

from guard.errors import InvalidInput
from guard.lab.explain.annotator import Files
from guard.lab.explain.cheap import cosines, simulate_cheaply, tfidf
from guard.lab.explain.records import Answer
from guard.lab.explain.scores import LatentScores, agreements, pearson, spearman
from guard.lab.explain.sheets import make_sheet, picked, read_subjects
from guard.lab.explain.simulate import SimulateConfig, scored, simulate
from guard.lab.explain.simulate_prompts import fired, strengths
from tests.lab import explained

FERRY, BAKER = "model.layers.3/1", "model.layers.3/2"


def count(text):
    return len(text.split())


@pytest.fixture
def two(tmp_path):
    """Two latents; the first window of each stands in both."""
    shared = "a ferry and a baker met"
    ferry = [
        explained.window(shared, {"ferry": 1.0}),
        explained.window("no boat today", kind="silent"),
        explained.window("never shown to those who test", {"ferry": 1.0}, part="show"),
    ]
    baker = [explained.window(shared, {"baker": 0.5}), explained.window("bread was late again", kind="near_miss")]
    return explained.written(
        tmp_path,
        [explained.evidence(FERRY, ferry), explained.evidence(BAKER, baker)],
        [explained.explanation(FERRY, "ferries"), explained.explanation(BAKER, "bakers")],
    )


def test_r_is_pearson_s_and_says_nothing_where_the_truth_does_not_vary():
    # Deviations of x: -1 0 1, of y: -1 -1 2; 3 / sqrt(2 * 6).
    assert pearson([1, 2, 3], [0, 0, 3]) == pytest.approx(3 / 12**0.5)
    assert pearson([1, 2, 3], [5, 5, 5]) is None
    assert pearson([1, 1, 1], [0, 0, 3]) == 0.0
    rng = np.random.default_rng(0)
    x, y = rng.random(50), rng.random(50)
    assert pearson(x, y) == pytest.approx(pearsonr(x, y).statistic)


def test_what_is_sent_at_the_segment_level(two):
    subjects, _ = read_subjects(two)
    sheet = make_sheet(subjects, "segment", 0, 2)
    task = sheet.task("segment", sheet.name)
    assert re.fullmatch(rf"segment/{FERRY}\+1/[0-9a-f]{{12}}", task.id)
    assert task.prompt == "segment-1"
    head, *paragraphs = task.user.split("\n\n")
    assert head == "F1 ferries\nF2 bakers"
    # Three texts, not four: the one that both know stands once. Segments of 2 tokens, numbered through.
    assert sorted(re.sub(r"^\d+ ", "", p, flags=re.MULTILINE) for p in paragraphs) == [
        "a ferry\nand a\nbaker met",
        "bread was\nlate again",
        "no boat today",
    ]
    assert [int(n) for n in re.findall(r"^\d+", "\n".join(paragraphs), flags=re.MULTILINE)] == [1, 2, 3, 4, 5, 6]
    assert "never shown" not in task.user


def test_what_is_sent_at_the_token_level(two):
    subjects, _ = read_subjects(two)
    sheet = make_sheet(subjects[:1], "token", 0)
    task = sheet.task("token", sheet.name)
    head, *texts = task.user.split("\n\n")
    assert head == "F1 ferries"
    assert sorted(texts, key=len) == [
        f"Text {1 + sheet.texts.index(('no', ' boat', ' today'))}\n1 +no\n2 boat\n3 today",
        f"Text {1 + sheet.texts.index(('a', ' ferry', ' and', ' a', ' baker', ' met'))}\n1 +a\n2 ferry\n3 and\n4 a\n5 baker\n6 met",
    ]


def test_segment_scores_by_hand(two):
    subjects, _ = read_subjects(two)
    sheet = make_sheet(subjects, "segment", 0, 2)
    number = {text.strip(): n for n, text in enumerate(chain.from_iterable(sheet.parts), 1)}
    said = {"F1": [number["a ferry"], number["no boat today"]], "F2": [number["a ferry"], number["late again"]]}
    ferry, baker = scored(
        sheet,
        Answer(id="x", prompt="segment-1", annotator="ann", answer=said, tokens_sent=100, tokens_received=20),
    )
    # The ferry's segments: a ferry | and a | baker met | no boat today. Truth 1 0 0 0, said 1 0 0 1.
    # Means 1/4 and 1/2: covariance 1/4 * 1/2 * ... = sum 0.5; norms sqrt(3/4) and 1.
    assert ferry.scores == {"simulation_segment": pytest.approx(0.5 / 0.75**0.5, abs=1e-6)}
    assert (ferry.items, ferry.firing) == (4, 1)
    # The baker's: a ferry | and a | baker met | bread was | late again. Truth 0 0 .5 0 0, said 1 0 0 0 1.
    assert baker.scores == {
        "simulation_segment": pytest.approx(pearsonr([1, 0, 0, 0, 1], [0, 0, 0.5, 0, 0])[0], abs=1e-6)
    }
    assert (baker.items, baker.firing) == (5, 1)
    # A prompt for two costs each a half.
    assert (baker.tokens_sent, baker.tokens_received, baker.tokens) == (50, 10, 60)


def test_token_scores_by_hand(two):
    subjects, _ = read_subjects(two)
    sheet = make_sheet(subjects[:1], "token", 0)
    ferry = 1 + sheet.texts.index(("a", " ferry", " and", " a", " baker", " met"))
    (line,) = scored(
        sheet, Answer(id="x", prompt="token-1", annotator="ann", answer={"F1": {str(ferry): {"2": 9, "5": 3}}})
    )
    # Nine tokens: truth is 1 at one, said 9 there and 3 at another. Sums of squares and products about the means:
    # 90 - 144/9 = 74, 1 - 1/9 = 8/9, 9 - 12/9 = 69/9.
    assert line.scores == {"simulation_token": pytest.approx((69 / 9) / (74 * 8 / 9) ** 0.5, abs=1e-6)}
    assert (line.items, line.firing) == (9, 1)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"F1": [1]}, "found the keys F1, expected F1, F2"),
        ({}, "found the keys (none), expected F1, F2"),
        ({"F1": [1], "F2": [], "F3": []}, "found the keys F1, F2, F3, expected F1, F2"),
        ({"F1": 1, "F2": []}, "F1: found 1, expected a list of numbers"),
        ({"F1": [7], "F2": []}, "F1: found 7, expected a number from 1 to 6"),
        ({"F1": [], "F2": [0]}, "F2: found 0, expected a number from 1 to 6"),
        ({"F1": [True], "F2": []}, "F1: found True, expected a number from 1 to 6"),
        ({"F1": ["2"], "F2": []}, "F1: found '2', expected a number from 1 to 6"),
    ],
)
def test_answers_about_segments_that_do_not_fit(answer, message):
    with pytest.raises(InvalidInput) as refused:
        fired(answer, 2, 6)
    assert str(refused.value) == message


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"F1": [1]}, "F1: found [1], expected an object of texts"),
        ({"F1": {"3": {}}}, "F1: found 3, expected a number from 1 to 2"),
        ({"F1": {"one": {}}}, "F1: found 'one', expected a number from 1 to 2"),
        ({"F1": {"2": [0, 3]}}, "F1, text 2: found [0, 3], expected an object of tokens"),
        ({"F1": {"2": {"4": 3}}}, "F1, text 2: found 4, expected a number from 1 to 3"),
        ({"F1": {"2": {"3": 11}}}, "F1, text 2, token 3: found 11, expected an integer from 0 to 10"),
        ({"F1": {"2": {"3": 0.5}}}, "F1, text 2, token 3: found 0.5, expected an integer from 0 to 10"),
    ],
)
def test_answers_about_tokens_that_do_not_fit(answer, message):
    with pytest.raises(InvalidInput) as refused:
        strengths(answer, 1, [5, 3])
    assert str(refused.value) == message


def test_answers_that_fit():
    assert fired({"F2": [6, 1, 1], "F1": []}, 2, 6) == [set(), {0, 5}]
    assert strengths({"F1": {"2": {"1": 4, "3": 10}}}, 1, [2, 3]) == [[[0, 0], [4, 0, 10]]]


def test_windows_are_picked_evenly_and_in_no_order():
    fires = [explained.window(f"ferry {i}", {"ferry": 1.0}) for i in range(10)]
    near = [explained.window(f"near {i}", kind="near_miss") for i in range(3)]
    silent = [explained.window(f"silent {i}", kind="silent") for i in range(5)]
    from guard.lab.explain.sheets import Subject

    subject = Subject(explained.explanation(FERRY, "ferries"), (*fires, *near, *silent))
    four = picked(subject, 4, seed=0)
    assert sorted(w.peak > 0 for w in four.windows) == [False] * 4 + [True] * 4
    assert [w.peak > 0 for w in picked(subject, None, seed=0).windows] != [True] * 10 + [False] * 8
    assert picked(subject, 4, seed=0) == four != picked(subject, 4, seed=1)
    hard = picked(subject, 4, seed=0, hardest=True)
    assert sorted(w.kind for w in hard.windows) == ["near_miss"] * 3 + ["silent"] + ["top"] * 4
    # Both sides as large as the smaller.
    assert len(picked(subject, None, seed=0, hardest=True).windows) == 16


def latents(number, rng):
    """Latents that fire on a word of their own, and how well a simulator will know each."""
    known, explained_ = [], []
    for i in range(number):
        latent = f"model.layers.3/{i}"
        windows = []
        for n in range(6):
            text = f"one two three word{i} five six, seven eight nine ten eleven {n}"
            windows.append(explained.window(text, {f"word{i}": float(rng.uniform(0.5, 1))}))
            windows.append(explained.window(text.replace(f"word{i}", "four") + f" of {i}", kind="silent"))
        known.append(explained.evidence(latent, windows))
        explained_.append(explained.explanation(latent, f"word{i}"))
    return known, explained_


def oracle(task):
    """Finds each feature's word; the later the latent, the oftener it points elsewhere."""
    head, *texts = task["user"].split("\n\n")
    words = re.findall(r"^F\d+ (\S+)$", head, flags=re.MULTILINE)
    answer = {}
    for f, word in enumerate(words, 1):
        skill = np.random.default_rng(int(word.removeprefix("word")) + 100 * (task["prompt"] == "token-1"))
        miss = int(word.removeprefix("word")) / 30
        if task["prompt"] == "segment-1":
            there = [
                int(n)
                for n, text in re.findall(r"^(\d+) (.*)$", "\n".join(texts), flags=re.MULTILINE)
                if word in text.split()
            ]
            answer[f"F{f}"] = [n for n in there if skill.random() > miss] or [1]
        else:
            answer[f"F{f}"] = {}
            for text in texts:
                number, *lines = text.splitlines()
                hits = {line.split()[0]: 8 for line in lines if line.split()[1].strip("+") == word}
                if hits and skill.random() > miss:
                    answer[f"F{f}"][number.removeprefix("Text ")] = hits
    return answer


def run(files, out, config, **more):
    return simulate(explained=files, out=out, config=config, annotator=Files(out, count), **more)


def test_segments_against_tokens_end_to_end(tmp_path):
    files = explained.written(tmp_path, *latents(30, np.random.default_rng(0)))
    token, segment = tmp_path / "token", tmp_path / "segment"
    before = run(files, token, SimulateConfig(level="token"))
    assert (before.latents, before.open, before.median) == (0, 30, {})
    assert len(explained.tasks(token)) == 30
    explained.answer_all(token, oracle)
    summary = run(files, token, SimulateConfig(level="token"))
    assert (summary.latents, summary.open, summary.annotators) == (30, 0, ("ann",))
    run(files, segment, SimulateConfig(level="segment"))
    explained.answer_all(segment, oracle)
    summary = run(files, segment, SimulateConfig(level="segment"), against=token)
    (found,) = summary.agreement
    lines = [json.loads(line) for line in (segment / "scores.jsonl").open()]
    others = {line["latent"]: line for line in map(json.loads, (token / "scores.jsonl").open())}
    x = [line["scores"]["simulation_segment"] for line in lines]
    y = [others[line["latent"]]["scores"]["simulation_token"] for line in lines]
    assert (found.score, found.against, found.latents) == ("simulation_segment", "simulation_token", 30)
    assert found.spearman == pytest.approx(spearmanr(x, y).statistic, abs=1e-4)
    assert found.interval[0] < found.spearman < found.interval[1]
    assert summary.median == {"simulation_segment": pytest.approx(np.median(x), abs=1e-4)}
    sent = sum(count(t["system"]) + count(t["user"]) for t in explained.tasks(segment))
    assert (summary.cost.prompts, summary.cost.tokens_sent) == (30, sent)
    assert found.cost_cut == pytest.approx(1 - found.tokens_per_latent / found.tokens_per_latent_against, abs=1e-3)
    assert found.cost_cut > 0.3
    assert json.loads((segment / "summary.json").read_text())["agreement"][0]["spearman"] == found.spearman


def test_several_latents_in_one_prompt_cost_less_and_score_alike(tmp_path):
    files = explained.written(tmp_path, *latents(7, np.random.default_rng(0)))
    costs, scores = [], []
    for name, config in (
        ("alone", SimulateConfig(level="segment")),
        ("together", SimulateConfig(level="segment", together=3)),
        ("fewer", SimulateConfig(level="segment", together=3, windows=2)),
    ):
        run(files, tmp_path / name, config)
        explained.answer_all(tmp_path / name, oracle)
        summary = run(files, tmp_path / name, config)
        assert (summary.latents, summary.open) == (7, 0)
        costs.append(summary.cost.tokens_per_latent)
        lines = map(json.loads, (tmp_path / name / "scores.jsonl").open())
        scores.append({line["latent"]: line["scores"]["simulation_segment"] for line in lines})
    assert costs[0] > costs[1] > costs[2]
    assert [t["id"].rpartition("/")[0] for t in explained.tasks(tmp_path / "together")] == [
        "segment/model.layers.3/0+2",
        "segment/model.layers.3/3+2",
        "segment/model.layers.3/6",
    ]
    assert scores[0]["model.layers.3/0"] == pytest.approx(scores[1]["model.layers.3/0"], abs=1e-6)


def test_a_run_with_other_settings_is_refused(two, tmp_path):
    out = tmp_path / "run"
    run(two, out, SimulateConfig(level="segment"))
    with pytest.raises(InvalidInput) as refused:
        run(two, out, SimulateConfig(level="segment", windows=3))
    assert str(refused.value) == (
        f"{out}/settings.json: found a run with other settings; choose another --out, or move this one away"
    )


def test_explanations_and_evidence_must_fit(two, tmp_path):
    subjects, not_testable = read_subjects(two)
    assert ([s.explanation.latent for s in subjects], not_testable) == ([FERRY, BAKER], 0)
    lone = explained.explanation("model.layers.3/9", "nothing")
    files = explained.written(
        tmp_path, [explained.evidence("model.layers.3/9", [explained.window("all quiet")])], [lone]
    )
    assert read_subjects(files) == ([], 1)
    files = explained.written(tmp_path, [], [lone])
    with pytest.raises(InvalidInput, match=r"evidence\.jsonl: found nothing on model\.layers\.3/9 of small, which"):
        read_subjects(files)
    files = explained.written(tmp_path, [], [lone, lone])
    with pytest.raises(InvalidInput, match=r"found model\.layers\.3/9 of small twice, expected one explanation"):
        read_subjects(files)


def test_a_text_that_stands_twice_in_the_evidence_counts_once(tmp_path):
    twice = [explained.window("a ferry", {"ferry": 1.0}), explained.window("a ferry", kind="silent")]
    quiet = explained.window("no boat", kind="silent")
    files = explained.written(
        tmp_path, [explained.evidence(FERRY, [*twice, quiet])], [explained.explanation(FERRY, "ferries")]
    )
    ((subject,), _) = read_subjects(files)
    assert sorted((w.text, w.peak) for w in subject.windows) == [("a ferry", 1.0), ("no boat", 0.0)]


def line(latent, cost=0.0, **scores):
    return LatentScores(latent=latent, sae="s", scores=scores, items=1, firing=1, tokens_sent=cost)


def test_runs_are_compared_over_the_latents_that_both_scored(tmp_path):
    (tmp_path / "scores.jsonl").write_text(
        "\n".join(line(k, 100, token=v).model_dump_json() for k, v in zip("abcdx", (1, 2, 3, 4, 9), strict=True))
    )
    mine = [line(k, 25, mine=v) for k, v in zip("abcdy", (1, 2, 4, 3, 0), strict=True)]
    (found,) = agreements(mine, tmp_path)
    # One swap of neighbours among four: 1 - 6 * 2 / (4 * 15).
    assert (found.latents, found.spearman, found.cost_cut) == (4, 0.8, 0.75)
    with pytest.raises(
        InvalidInput, match=r"elsewhere: holds no scores\.jsonl; expected what `guard lab simulate` wrote"
    ):
        agreements(mine, tmp_path / "elsewhere")


def test_spearman_is_not_told_where_there_is_none():
    assert spearman(np.array([1.0, 2]), np.array([1.0, 2])) == (None, None)
    assert spearman(np.array([1.0, 1, 1]), np.array([1.0, 2, 3])) == (None, None)


def test_cosines_and_words_by_hand():
    assert cosines(np.array([3.0, 4]), np.array([[3.0, 4], [4, -3], [0, 0], [1, 0]])).tolist() == pytest.approx(
        [1, 0, 0, 0.6]
    )
    x = tfidf(["ferry", "ferry", "baker", "渡轮", "坐渡轮"]).toarray()
    near = x @ x.T
    assert near[0, 1] == pytest.approx(1)
    assert near[0, 3] == 0
    assert 0 < near[3, 4] < 1  # characters, where there are no blanks


def test_the_cheap_scorer_knows_a_latent_by_its_words(tmp_path):
    """With the real reader: two latents, the explanations of each at home in its own segments."""
    texts = {
        FERRY: (
            "The ferry crossed the bay at dawn.",
            "Ships and ferries wait in the harbour.",
            "A boat sailed to the island.",
        ),
        BAKER: (
            "The baker kneads dough for bread.",
            "Cakes and rolls come out of the oven.",
            "He bakes a loaf of rye.",
        ),
    }

    def windows(own):
        return [
            explained.window(
                text,
                dict.fromkeys(text.rstrip(".").split(), 1.0) if latent == own else None,
                kind="top" if latent == own else "silent",
            )
            for latent, found in texts.items()
            for text in found
        ]

    files = explained.written(
        tmp_path,
        [explained.evidence(latent, windows(latent)) for latent in texts],
        [
            explained.explanation(FERRY, "ferries, boats and ships at sea"),
            explained.explanation(BAKER, "baking bread and cakes"),
        ],
    )
    other = tmp_path / "other"
    other.mkdir()
    (other / "scores.jsonl").write_text(
        "".join(
            LatentScores(
                latent=k, sae="small", scores={"simulation_segment": v}, items=1, firing=1, tokens_sent=9
            ).model_dump_json()
            + "\n"
            for k, v in ((FERRY, 0.3), (BAKER, 0.6))
        )
    )
    summary = simulate_cheaply(
        explained=files,
        out=tmp_path / "cheap",
        config=SimulateConfig(level="embedding", hook_point="model.layers.3"),
        against=other,
    )
    lines = [json.loads(line) for line in (tmp_path / "cheap" / "scores.jsonl").open()]
    assert [(li["items"], li["firing"], li["tokens_sent"]) for li in lines] == [(6, 3, 0)] * 2
    assert all(li["scores"]["simulation_embedding"] > 0.4 for li in lines)
    assert all(li["scores"]["simulation_tfidf"] > 0 for li in lines)
    assert [(a.score, a.against, a.latents, a.cost_cut) for a in summary.agreement] == [
        ("simulation_embedding", "simulation_segment", 2, 1.0),
        ("simulation_tfidf", "simulation_segment", 2, 1.0),
    ]
    assert (summary.open, summary.cost.prompts) == (0, 0)
