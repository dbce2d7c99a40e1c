"""Candidates: the tests against others' and by hand, false discoveries under the null, and a suite whose truth is known."""

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, false_discovery_control, mannwhitneyu

from guard.cli.main import main
from guard.errors import InvalidInput
from guard.lab import labelled, shards
from guard.lab.search import stages
from guard.lab.search.candidates import Ground, Question, find
from guard.lab.search.contrast import pair_rows
from guard.lab.search.significance import (
    LEAST_DISCORDANT,
    pooled,
    q_values,
    rank_stratum,
    sign_test,
    simes,
    together,
    upper_tail,
)
from guard.lab.search.splits import balanced, first_half
from guard.lab.search.surface import TokenUse, bound_to_language, mark, token_use
from guard.lab.suite.measure import SaeReport
from guard.lab.suite.sae import FullSae
from tests.lab import planted


def report(name):
    """Of an SAE whose hook point is its name's."""
    return SaeReport(
        name=name, hook_point=name, architecture="batch_topk", width=8, l0_target=4, tokens_trained=0, fvu=0, fvu_typical=0,
        outlier_share=0, l0=4, dead_share=0, threshold=0,
    )  # fmt: skip


def test_the_sign_test_is_the_exact_binomial_one():
    forward, backward = np.array([10, 5, 3, 4, 0]), np.array([2, 0, 3, 0, 6])
    p, chance = sign_test(forward, backward)
    for k in (0, 1, 2, 4):
        assert p[k] == pytest.approx(
            binomtest(int(forward[k]), int(forward[k] + backward[k]), alternative="greater").pvalue
        )
    # Four discordant pairs cannot be significant: not asked.
    assert LEAST_DISCORDANT == 5
    assert np.isnan(p[3])
    # Of 12 pairs, 10 or more forward are significant: (66 + 12 + 1) / 4096. Of 5, all 5: 1 / 32. Of 6 as well: 1 / 64.
    assert chance.tolist() == pytest.approx([79 / 4096, 1 / 32, 1 / 64, 0, 1 / 64])


def test_the_rank_test_of_a_stratum_is_mann_whitney_s():
    rng = np.random.default_rng(0)
    strength = (np.round(rng.random((60, 5)) * 5) * (rng.random((60, 5)) < 0.5)).astype(np.float16)
    strength[:, 4] = 0  # never fires
    positive = rng.random(60) < 0.4
    stratum = rank_stratum(strength, positive)
    for k in range(4):
        known = mannwhitneyu(
            strength[positive, k],
            strength[~positive, k],
            alternative="greater",
            method="asymptotic",
            use_continuity=False,
        )
        assert stratum.shift[k] == pytest.approx(known.statistic / (positive.sum() * (~positive).sum()) - 0.5)
        normal = upper_tail(stratum.shift[k] / np.sqrt(stratum.variance[k]), np.zeros(()))
        assert normal == pytest.approx(known.pvalue, abs=1e-3)  # scipy rounds nothing, halves do
    assert (stratum.shift[4], stratum.variance[4], stratum.fires[4]) == (0, 0, 0)
    assert stratum.fires.tolist() == (strength > 0).sum(axis=0).tolist()


def test_the_third_moment_is_that_of_shuffled_labels():
    rng = np.random.default_rng(1)
    strength = ((rng.random((80, 1)) < 0.1) * rng.random((80, 1))).astype(np.float16)
    positive = np.arange(80) < 10
    stratum = rank_stratum(strength, positive)
    drawn = np.array([rank_stratum(strength, rng.permutation(positive)).shift[0] for _ in range(4000)])
    assert drawn.var() == pytest.approx(stratum.variance[0], rel=0.1)
    assert (drawn**3).mean() == pytest.approx(stratum.third[0], rel=0.3)


@pytest.mark.parametrize(("positives", "rate"), [(50, 0.01), (50, 0.1), (500, 0.02)])
def test_no_false_discoveries_among_rare_latents_of_one_sided_sources(positives, rate):
    rng = np.random.default_rng(2)
    strata = []
    for _ in range(3):
        fires = rng.random((1000, 2000)) < rate * rng.gamma(0.5, 2, size=2000)
        strength = (fires * rng.random(fires.shape)).astype(np.float16)
        strata.append(rank_stratum(strength, np.arange(1000) < positives))
    _, p = pooled(strata)
    asked = p[~np.isnan(p)]
    assert len(asked) > 1000
    for level in (0.05, 0.01, 0.001):
        assert (asked <= level).mean() <= level * 1.2
    assert not (q_values(p) <= 0.05).any()


def test_one_source_s_quirk_is_not_significant():
    """Ten thousand texts of one source say yes, two others no: a plain rank test over all would be sure."""
    rng = np.random.default_rng(3)

    def stratum(texts, shift):
        positive = np.arange(texts) < texts // 2
        fires = rng.random((texts, 1)) < np.where(positive, 0.2 + shift, 0.2)[:, None]
        return rank_stratum(fires.astype(np.float16), positive)

    quirk = [stratum(10_000, 0.1), stratum(1000, -0.05), stratum(1000, -0.05)]
    steady = [stratum(1000, 0.2), stratum(1000, 0.2), stratum(1000, 0.2)]
    assert pooled(quirk[:1])[1][0] < 1e-9
    assert pooled(quirk)[1][0] > 0.05
    assert pooled(steady)[1][0] < 1e-9


def test_two_translations_of_one_source_count_once():
    """The same 400 texts twice, as a latent that reads both languages alike sees them, beside another source."""
    rng = np.random.default_rng(5)
    positive = np.arange(400) < 200
    fires = (rng.random((400, 300)) < 0.3).astype(np.float16)
    other = rank_stratum((rng.random((400, 300)) < 0.3).astype(np.float16), positive)
    one = rank_stratum(fires, positive)
    twice = together([one, one])
    for name in ("weight", "shift", "variance", "third"):
        np.testing.assert_allclose(getattr(twice, name), getattr(one, name), rtol=1e-9, atol=1e-15)
    assert twice.fires.tolist() == (2 * one.fires).tolist()
    np.testing.assert_allclose(pooled([twice, other])[1], pooled([one, other])[1])
    # Counted as three sources, the translated one would be surer than it is.
    assert (pooled([one, one, other])[1] <= 0.01).mean() > (pooled([twice, other])[1] <= 0.01).mean()


def test_one_p_for_the_questions_of_a_latent():
    nan = np.nan
    p = np.array([[0.01, 0.04, nan, nan], [0.3, 0.05, 0.02, nan], [0.5, 0.06, 0.9, nan]])
    # 3 * 0.01 / 1; 3 * 0.06 / 3; 2 * 0.02 / 1; nothing asked.
    assert simes(p).tolist() == pytest.approx([0.03, 0.06, 0.04, nan], nan_ok=True)
    # Under any dependence: times 1 + 1/2 + 1/3, or 1 + 1/2 where two were asked.
    assert simes(p, "by").tolist() == pytest.approx([0.055, 0.11, 0.06, nan], nan_ok=True)


def test_q_values_are_benjamini_s():
    p = np.array([[0.01, np.nan, 0.04], [0.03, 0.5, 0.002]])
    known = p[~np.isnan(p)]
    for control in ("bh", "by"):
        q = q_values(p, control)
        assert np.isnan(q[0, 1])
        assert q[~np.isnan(q)].tolist() == pytest.approx(false_discovery_control(known, method=control).tolist())
    assert np.isnan(q_values(np.array([np.nan]))).all()


def test_false_discoveries_stay_under_the_rate():
    """A tenth of the latents is real: of what is found at 5%, at most about 5% is not."""
    rng = np.random.default_rng(4)
    false, found = 0, 0
    for _ in range(30):
        real = np.arange(500) < 50
        forward = rng.binomial(40, np.where(real, 0.85, 0.5))
        p, _ = sign_test(forward, 40 - forward)
        chosen = q_values(p) <= 0.05
        false, found = false + int((chosen & ~real).sum()), found + int(chosen.sum())
    assert found > 30 * 40
    assert false / found < 0.06


def test_of_the_latents_found_in_a_domain_the_rate_is_false():
    """Forty latents answer twenty questions each, and four hundred none: that many tags must not let more latents in."""
    rng = np.random.default_rng(6)
    questions = [Question("violence", f"s{i}", "contrast") for i in range(20)]
    reports = [report("model.layers.1.a"), report("model.layers.1.b")]
    false, found, loose = 0, 0, 0
    for _ in range(20):
        p = rng.random((2, 20, 400))
        p[0, :, :40] **= 20
        kept = find(reports, questions, list(p), fdr=0.05, control="bh")
        latents = [f.tagged.any(axis=0) for f in kept]
        false, found = false + int(latents[0][40:].sum() + latents[1].sum()), found + int(sum(x.sum() for x in latents))
        assert all((f.latent_q[f.tagged] <= 0.05).all() for f in kept)
        loose += int((kept[0].q <= 0.05).any(axis=0)[40:].sum() + (kept[1].q <= 0.05).any(axis=0).sum())
    assert found > 20 * 35
    assert false / found < 0.06
    assert loose / found > 0.3  # what taking every latent with a tag at 5% would have let in


def test_tags_of_a_latent_that_is_found():
    questions = [Question("violence", s, "contrast") for s in ("a", "b")] + [Question("terror", "*", "contrast")]
    p = np.array([[0.001, 0.2, 0.012, 0.9], [0.9, 0.9, 0.013, np.nan], [0.9, 0.001, 0.9, 0.9]])
    (found,) = find([report("model.layers.1")], questions, [p], fdr=0.03, control="bh")
    # Simes: 0.002, 0.4, 0.013, 0.9; q of the latents: 0.008, 0.4 * 4 / 3, 0.026, 0.9.
    assert found.latent_q[0].tolist() == pytest.approx([0.008, 1.6 / 3, 0.026, 0.9])
    # Neither question of the third has q <= 0.03 among seven: it keeps the one of the smaller p.
    assert found.q[0, 2] == pytest.approx(0.013 * 7 / 3)
    assert found.tagged.tolist() == [[True, False, True, False], [False] * 4, [False, True, False, False]]


def test_groups_are_dealt_out_so_that_every_head_is_on_both_sides():
    load = np.array([[2, 0], [2, 0], [0, 1], [0, 1], [1, 1]], dtype=float)
    part = balanced(load, 2)
    for head in range(2):
        assert {load[part == side, head].sum() > 0 for side in (0, 1)} == {True}
    assert part[0] != part[1]


def test_half_of_the_pairs_of_every_kind():
    known = labelled.pairs()
    half = first_half(known)
    for domain, subdomain, lang in {(p.domain, p.subdomain, p.lang) for p in known}:
        chosen = [
            h for p, h in zip(known, half, strict=True) if (p.domain, p.subdomain, p.lang) == (domain, subdomain, lang)
        ]
        assert sum(chosen) == len(chosen) // 2


def test_a_latent_bound_to_a_language():
    known = labelled.pairs()
    chinese = np.array([p.lang == "zh" for p in known])
    everywhere = np.ones(len(known), dtype=bool)
    fires = np.stack([chinese, ~chinese, everywhere, ~everywhere], axis=1)
    assert bound_to_language(known, fires, fires) == ["zh", "en", "", ""]
    # On one side of Chinese pairs alone it may well hold a concept.
    assert bound_to_language(known, fires, np.zeros_like(fires)) == ["", "", "", ""]


def test_what_is_marked_as_a_surface_form():
    def marked(share, coverage, lang="", *, by_contrast=False):
        found = mark(TokenUse(12, share, coverage), lang, by_contrast=by_contrast)
        return found.surface, found.why

    assert marked(0.9, 0.8) == (True, "90% of its firings on token 12, on 80% of its occurrences")
    # A pair parts the word with the concept: it cannot speak for a latent of one word.
    told = "90% of its firings on token 12, on 80% of its occurrences; but its pairs tell the concept"
    assert marked(0.9, 0.8, by_contrast=True) == (True, told)
    # On a token, but only where something else is so.
    assert marked(0.9, 0.2) == (False, "90% of its firings on token 12, on 20% of its occurrences")
    assert marked(0.4, 1.0) == (False, "")
    assert marked(0.4, 1.0, "zh") == (True, "fires on both sides of zh pairs")
    spoken_for = "fires on both sides of zh pairs; but its pairs tell the concept"
    assert marked(0.4, 1.0, "zh", by_contrast=True) == (False, spoken_for)
    both = "50% of its firings on token 12, on 50% of its occurrences; fires on both sides of zh pairs"
    assert marked(0.5, 0.5, "zh") == (True, both)


def test_what_is_said_of_a_latent_whose_tokens_are_not_known():
    unknown = mark(None, "", by_contrast=False, unknown="fired too rarely to say")
    assert (unknown.surface, unknown.why) == (None, "fired too rarely to say")
    assert mark(None, "zh", by_contrast=False).surface is True
    spoken_for = mark(None, "zh", by_contrast=True)
    assert (spoken_for.surface, spoken_for.why) == (
        None,
        "fires on both sides of zh pairs; but its pairs tell the concept; tokens not known",
    )


def test_the_tokens_of_a_latent_are_counted_over_all_texts(tmp_path):
    """Texts stand source by source: what fires in a few of the last shards alone is counted as well."""
    count, tokens = 9, 40
    made = shards.ShardSet(
        model="none", fingerprint={}, hook_points=("h",), d_model=3, dtype="float32", context=64, seed=0,
        tokens=count * tokens, sources=(), shard_count=count,
    )  # fmt: skip
    shards.describe(tmp_path, made)
    for index in range(count):
        ids = torch.arange(tokens) % 10  # each of ten tokens four times
        x = torch.zeros(tokens, 3)
        x[:, 0] = (index == 7) * (ids < 6)  # 24 firings, on six tokens alike
        x[:, 1] = (ids == 4).float() + (index == 2) * (ids == 5)  # all 36 of token 4, 4 of 36 of token 5
        x[:, 2] = (index >= 5) * (ids == 3)  # 16: too few
        shards.write(tmp_path, index, {"h": x.bfloat16(), "token": ids.int(), "piece": torch.zeros(tokens).int()})
    eye, zero = torch.eye(3), torch.zeros(3)
    by_threshold = FullSae("a", "h", eye, zero, zero + 0.5, eye)
    by_rank = FullSae("b", "h", eye, zero, zero, eye, k=3)
    chosen = [np.array([1, 2]), np.array([0, 1])]
    seen = []
    found = token_use([by_threshold, by_rank], chosen, tmp_path, lambda done, of: seen.append((done, of)))
    assert found[0] == [TokenUse(4, 0.9, 1.0), None]
    assert (found[1][0].share, found[1][0].coverage) == (4 / 24, 4 / 36)
    assert found[1][1] == TokenUse(4, 0.9, 1.0)
    assert seen == [(1, 2), (2, 2)]
    with pytest.raises(InvalidInput) as refused:
        token_use([replace(by_rank, hook_point="other")], [np.array([0])], tmp_path)
    assert str(refused.value) == (
        f"{tmp_path}: harvested without other; harvest the texts again at the suite's hook points"
    )


def test_rows_without_the_pairs_are_refused():
    rows, known = planted.made_up_rows(), labelled.pairs()
    with pytest.raises(InvalidInput) as refused:
        pair_rows(rows, known)
    assert str(refused.value) == (
        f"the texts lack 1700 of the contrast pairs, such as {known[0].id}/with; harvest again"
    )


def test_languages_of_a_source_are_ranked_apart():
    """A latent of Chinese alone, in a source whose Chinese texts are mostly on the topic, says nothing of the topic."""
    rows = [
        labelled.Row(id=f"{i}", text="t", lang="zh" if chinese else "en", source=source, label_domains=("terror",) if i % 10 < yes else (), scope=("terror",), kind="topical" if i % 10 < yes else "benign")
        for source in ("a", "b")
        for chinese, yes in ((True, 8), (False, 2))
        for i in range(100)
    ]  # fmt: skip
    ground = Ground([*rows, *(r for r in labelled.own_rows() if r.source == "own_pairs")], labelled.pairs())
    strength = np.zeros((len(rows) + 1700, 2), dtype=np.float16)
    strength[: len(rows), 0] = [r.lang == "zh" for r in rows]
    strength[: len(rows), 1] = [bool(r.label_domains) for r in rows]
    answers = ground.answers(strength)["all"]
    asked = [q.evidence for q in ground.questions].index("labelled.presence")
    assert answers.effect[asked].tolist() == pytest.approx([0, 0.5])
    assert (answers.p[asked] < 1e-6).tolist() == [False, True]


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planted")
    planted.write_suite(folder / "saes")
    planted.write_texts(folder / "texts")
    planted.write_texts(folder / "blind", with_tokens=False)
    return folder


def test_planted_latents_are_found_tagged_and_borne_out(suite):
    out = suite / "found.jsonl"
    summary = stages.candidates(saes=suite / "saes", texts=suite / "texts", out=out)
    assert json.loads((suite / "found.summary.json").read_text())["saes"] == summary.saes
    lines = [json.loads(line) for line in out.open()]
    for sae in summary.saes:
        found = {line["latent"]: line for line in lines if line["sae"] == sae}
        for place, domain in enumerate(labelled.DOMAINS):
            tags = {(t["domain"], t["subdomain"], t["evidence"]) for t in found[place]["tags"]}
            assert {(domain, "*", "contrast"), (domain, "*", "labelled.presence")} <= tags
            assert found[place]["surface"] is False
            assert all(t["q"] <= 0.05 and t["p"] <= t["q"] and t["effect"] > 0 for t in found[place]["tags"])
            assert all(a["p"] <= b["p"] for a, b in pairwise(found[place]["tags"]))
        tags = {(t["domain"], t["subdomain"], t["evidence"]) for t in found[planted.SUBDOMAIN_LATENT]["tags"]}
        assert ("violence", "insult", "contrast") in tags
        assert {d for d, *_ in tags} == {"violence"}
        token = found[planted.TOKEN_LATENT]
        assert {t["domain"] for t in token["tags"]} == {"terror"}
        assert (token["token"], token["token_coverage"]) == (77, 1.0)
        if sae.endswith(planted.CLEAN):
            assert (token["surface"], token["why"]) == (
                True,
                "100% of its firings on token 77, on 100% of its occurrences",
            )
            assert token["token_share"] == 1.0
        else:  # it also fires on nothing in particular
            assert (token["surface"], token["token_share"] < 0.5) == (False, True)
        assert set(found) >= {0, 1, 2, 3, 4, 5}
        assert len(found) <= 8  # the other 42 latents are noise
        assert found[0]["hook_point"] == sae.rpartition(".")[0]
        assert found[0]["firing_rate"] == 0.125


@pytest.mark.parametrize("texts", ["texts", "blind"])
def test_the_bar_never_runs_back(suite, texts):
    steps = []
    out = suite / "bar.jsonl"
    stages.candidates(saes=suite / "saes", texts=suite / texts, out=out, progress=lambda *s: steps.append(s))
    assert len({of for _, of in steps}) == 1
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)
    assert steps[-1][0] == steps[-1][1]


def test_counts_and_precision_on_what_did_not_choose(suite):
    summary = stages.candidates(saes=suite / "saes", texts=suite / "texts", out=suite / "again.jsonl")
    violence = next(c for c in summary.counts if (c.domain, c.subdomain, c.depth) == ("violence", "*", 1))
    assert violence.latents == 2 * planted.WIDTH
    # Of two SAEs: the domain's own, and that of insults.
    assert (violence.by_contrast, violence.by_both, violence.surface) == (4, 2, 0)
    terror = next(c for c in summary.counts if (c.domain, c.subdomain, c.depth) == ("terror", "*", 3))
    assert terror.surface == 1  # the clean SAE's latent of one token
    overall = {(p.chosen_by, p.judged_on): p for p in summary.precision if p.domain == "*"}
    assert set(overall) == {
        ("contrast", "other pairs"), ("contrast", "sources"), ("labelled", "other sources"), ("labelled", "pairs")
    }  # fmt: skip
    assert all(0 <= p.untested < 1 for p in overall.values())
    assert overall["contrast", "other pairs"].confirmed > 0.9
    assert overall["labelled", "other sources"].confirmed > 0.9
    assert all(p.expected <= 0.05 for p in overall.values())
    # The token's latent, chosen by labels alone, is not borne out by pairs.
    terror = next(
        p for p in summary.precision
        if (p.domain, p.depth, p.chosen_by, p.judged_on) == ("terror", 1, "labelled", "pairs")
    )  # fmt: skip
    assert terror.confirmed <= 0.5
    assert {g for half in summary.halves.values() for g in half} == {"left", "right", "third", "fourth"}


def test_where_shards_hold_no_token_ids_surface_forms_are_not_known(suite):
    summary = stages.candidates(
        saes=suite / "saes", texts=suite / "blind", out=suite / "blind.jsonl", names=[f"{planted.POINTS[0]}.b8"]
    )
    assert summary.tokens_known is False
    lines = [json.loads(line) for line in (suite / "blind.jsonl").open()]
    assert {line["sae"] for line in lines} == {f"{planted.POINTS[0]}.b8"}
    assert {(line["surface"], line["why"], line["token"]) for line in lines} == {(None, "tokens not known", None)}


def test_the_command(suite, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    out = suite / "command.jsonl"
    given = ["lab", "candidates", "--saes", str(suite / "saes"), "--texts", str(suite / "texts"), "--out", str(out)]
    assert main([*given, "--control", "by", "--fdr", "0.01"]) == 0
    shown = capsys.readouterr().out
    assert "Latents found at 1% false discovery of a domain's at a depth (BY)" in shown
    assert f"{out}: {len(out.read_text().splitlines()):,} candidates of 4 SAEs" in shown
    assert main([*given, "--control", "bonferroni"]) == 2
    assert "--control: found 'bonferroni', expected bh or by" in capsys.readouterr().err
    assert main([*given, "--name", "no.such"]) == 1
    assert "holds no SAE no.such" in capsys.readouterr().err
