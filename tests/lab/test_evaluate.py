"""How a column's lead over another is judged: on the same resampled rows, so that what both find hard cancels."""

import numpy as np
import pytest

from guard.lab.heads.evaluate import Figure, _interval, _resampled_auroc, standings
from guard.records import HeadKind


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
