"""How a column's lead over another is judged, on the same resampled rows, and how two columns are mixed.

What both find hard cancels; no source that is to be judged has a say in the mixture.
"""

import numpy as np
import pytest

from guard.lab.heads.evaluate import SHARES, Figure, _interval, _resampled_auroc, figures, probe_share, standings
from guard.lab.heads.fit import HEADS
from guard.records import HeadKind
from tests.lab.given import design_of, labelled_row, out_of_fold


def test_a_lead_that_is_steady_is_beyond_chance_though_both_columns_vary():
    rng = np.random.default_rng(0)
    y = np.repeat(np.array([1, 0], dtype=np.int8), 60)
    shared = rng.normal(size=120) + 1.2 * y
    found = _resampled_auroc(y, {"a": shared, "same": shared * 2 + 1, "better": shared + 0.8 * y})
    low, high = _interval(found["a"])
    assert high - low > 0.05
    assert _interval(found["a"] - found["same"]) == (0.0, 0.0)  # only the order counts
    assert _interval(found["better"] - found["a"])[0] > 0


def test_resampled_aurocs_lie_about_the_plain_one():
    y = np.array([1] * 30 + [0] * 70, dtype=np.int8)
    scores = np.concatenate([np.full(30, 1.0), np.arange(70) / 35])  # of 70 negatives, 35 below, one level, 34 above
    assert _resampled_auroc(y, {"a": scores})["a"].mean() == pytest.approx(35.5 / 70, abs=0.01)


def test_standings_name_what_is_behind_beyond_chance():
    def figure(source, auroc, lead):
        return Figure(
            domain="terror",
            head=HeadKind.HARM,
            source=source,
            lang="zh",
            positives=20,
            negatives=30,
            weak_negatives=False,
            auroc=auroc,
            auroc_interval={},
            lead_interval=lead,
            auprc={},
            tpr_at_1_fpr={},
        )

    ahead = {"tfidf": 0.7, "probe": 0.8, "combined": 0.8}
    behind = {"tfidf": 0.9, "probe": 0.7, "combined": 0.8}
    tfidf, probe = standings(
        [
            figure("x", ahead, {"tfidf": (0.05, 0.15), "probe": (-0.02, 0.02)}),
            figure("y", behind, {"tfidf": (-0.2, -0.01), "probe": (-0.01, 0.2)}),
        ]
    )
    assert (tfidf.judged, tfidf.ahead, tfidf.ahead_beyond_chance) == (2, 1, 1)
    assert tfidf.behind_beyond_chance == ["terror.harm on y"]
    assert (probe.ahead, probe.ahead_beyond_chance, probe.behind_beyond_chance) == (2, 0, [])


def two_sources(left="left", right="right", **config):
    """On `left` the latents tell all and the probe is noise, on `right` the other way round."""
    rows = [labelled_row(name, i, harmful=i % 2 == 0) for name in (left, right) for i in range(200)]
    design = design_of(rows, **config)
    truth = 2.0 * np.array([bool(row.label_domains) for row in rows])
    noise = np.random.default_rng(0).normal(scale=2, size=len(rows))
    here = design.source == left
    latents, probe = np.where(here, truth, noise), np.where(here, noise, truth)
    return design, out_of_fold(dict.fromkeys(HEADS, latents), dict.fromkeys(HEADS, probe))


def test_the_mixture_that_judges_a_source_was_chosen_on_the_others():
    design, kept = two_sources()
    assert probe_share(design, HEADS[0], kept, without="right") == SHARES[0]
    assert probe_share(design, HEADS[0], kept, without="left") == SHARES[-1]


def test_a_source_of_the_judged_one_s_group_has_no_say_in_it():
    design, kept = two_sources(left="catqa_en", right="catqa_zh")  # one set of questions in two languages
    assert len(np.unique(design.group)) == 1
    assert probe_share(design, HEADS[0], kept, without="catqa_zh") == 0.5


def test_figures_use_that_mixture(monkeypatch):
    monkeypatch.setattr("guard.lab.heads.evaluate._BOOTSTRAPS", 2)
    design, kept = two_sources()
    kept.logits.update({(head, "tfidf"): kept.logits[head, "probe"] for head in HEADS})
    found = {f.source: f.auroc for f in figures(design, kept) if (f.domain, f.head) == HEADS[0]}
    assert (found["left"]["latents"], found["right"]["probe"]) == (1.0, 1.0)
    # Mostly of what is noise here, since that told all elsewhere.
    assert max(found["left"]["combined"], found["right"]["combined"]) < 0.8


def test_sources_that_heads_may_not_be_fitted_on_and_our_own_have_no_say_in_the_mixture():
    design, kept = two_sources(sources=("left",))
    assert probe_share(design, HEADS[0], kept) == SHARES[0]
    assert probe_share(design, HEADS[0], kept, without="left") == 0.5
    design, kept = two_sources(right="own_terror")
    assert probe_share(design, HEADS[0], kept) == SHARES[0]
    design, kept = two_sources(left="annotated_left", right="own_terror")
    assert probe_share(design, HEADS[0], kept) == 0.5
