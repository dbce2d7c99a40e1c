"""Ranking a suite, picking a configuration, and asking whether the metric predicts detection."""

import json

import numpy as np
import pytest
from scipy.stats import spearmanr

from guard.cli.main import main
from guard.errors import InvalidInput
from guard.lab import labelled
from guard.lab.search import stages
from guard.lab.search.contrast import ConceptContrast
from guard.lab.search.detect import (
    PREDICTORS,
    DetectConfig,
    Detection,
    correlations,
    correlations_of_draws,
    detect,
    judged_rows,
    make_folds,
    rank_correlation,
    resampled,
)
from guard.lab.search.draw import draw_curve
from guard.lab.search.rank import check_metric, curve, depth, metric, ranked, site
from guard.lab.suite.measure import SaeReport
from tests.lab import planted
from tests.lab.given import point

PNG = b"\x89PNG\r\n\x1a\n"


def test_where_a_hook_point_is():
    assert (depth("model.layers.14"), site("model.layers.14")) == (14, "residual")
    assert (depth("model.layers.7.mlp.down_proj"), site("model.layers.7.mlp.down_proj")) == (7, "mlp.down_proj")
    assert (depth("transformer.h.3"), site("transformer.h.3")) == (3, "residual")


def test_metrics_of_a_point():
    p = point(3, 8, 0.25)
    assert metric(p, "i_cdf") == 0.25
    assert metric(p, "i_cdf_sum") == 16  # 64 latents, each in a quarter of the pairs
    assert metric(p, "i_cdf_net") == pytest.approx(0.2)
    assert metric(p, "l0_0.3") == 6


def test_p_best_is_of_each_sub_domain_and_then_their_mean():
    def found(domain, subdomain, best):
        return ConceptContrast(
            sae="a", hook_point="model.layers.3", domain=domain, subdomain=subdomain, pairs=4, i_cdf=0.1,
            l0_at={}, best_latents=[7, 2], best_p=[best, 0.0],
        )  # fmt: skip

    contrasts = [
        found("*", "*", 0.3), found("terror", "*", 0.4), found("terror", "weapons", 0.8),
        found("terror", "terrorism", 0.4), found("violence", "*", 0.2), found("violence", "insult", 0.3),
    ]  # fmt: skip
    report = SaeReport(
        name="a", hook_point="model.layers.3", architecture="batch_topk", width=8, l0_target=2, tokens_trained=9,
        fvu=0.2, fvu_typical=0.2, outlier_share=0, l0=2, dead_share=0, threshold=1,
    )  # fmt: skip
    assert curve([report], contrasts)[0].p_best == pytest.approx(0.5)  # of 0.8, 0.4 and 0.3
    assert curve([report], contrasts, "terror")[0].p_best == pytest.approx(0.6)


def test_one_configuration_is_picked_by_its_mean_rank_over_the_depths():
    points = [
        point(1, 8, 0.30), point(1, 16, 0.20), point(1, 32, 0.10),
        point(3, 8, 0.10), point(3, 16, 0.20), point(3, 32, 0.30),
        point(5, 8, 0.10), point(5, 16, 0.30), point(5, 32, 0.20),
        point(5, 64, 0.90),  # at one depth only
        point(1, 4, 0.99, architecture="topk"), point(3, 4, 0.99, architecture="topk"), point(5, 4, 0.99, architecture="topk"),
    ]  # fmt: skip
    found = ranked(points)
    # Ranks: L0 8: 1, 3, 3; L0 16: 2, 2, 1; L0 32: 3, 1, 2.
    assert found.picked.l0_target == 16
    assert found.picked.mean_rank == pytest.approx(5 / 3)
    assert found.picked.saes == [f"model.layers.{d}.batch_topk.w64.l16" for d in (1, 3, 5)]
    assert [c.l0_target for c in found.configurations] == [16, 32, 8]
    # A TopK SAE is ranked, but a latent of it is not exact on a subset: it is never picked.
    assert ".topk." in found.saes[0]
    assert found.best_by_depth == {
        1: "model.layers.1.batch_topk.w64.l8", 3: "model.layers.3.batch_topk.w64.l32", 5: "model.layers.5.batch_topk.w64.l64"
    }  # fmt: skip


def test_sites_compete_at_each_depth():
    points = [
        point(1, 8, 0.1), point(3, 8, 0.1), point(1, 8, 0.2, where=".mlp.down_proj"), point(3, 8, 0.3, where=".mlp.down_proj")
    ]  # fmt: skip
    assert ranked(points).picked.site == "mlp.down_proj"


def test_a_suite_of_topk_alone_gives_no_pick():
    assert ranked([point(1, 8, 0.1, architecture="topk")]).picked is None


def test_a_metric_that_is_none_is_refused():
    with pytest.raises(InvalidInput) as refused:
        check_metric("fvu")
    assert str(refused.value) == (
        "by: found 'fvu', expected one of p_best, i_cdf, i_cdf_excess, i_cdf_net, i_cdf_sum, l0_0.05, l0_0.1, l0_0.2, l0_0.3, l0_0.5"
    )


def test_the_curve_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    points = [point(layer, l0, 0.1, where=w) for layer in (1, 3) for l0 in (8, 16) for w in ("", ".mlp.down_proj")]
    draw_curve(points, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(PNG)


def test_rank_correlation_is_spearman_s_and_within_strata_ignores_what_lies_between_them():
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 8, 20).astype(float), rng.integers(0, 8, 20).astype(float)
    whole = np.zeros(20, dtype=int)
    assert rank_correlation(x, y, whole) == pytest.approx(spearmanr(x, y).statistic)
    # Inside each of two depths x rises as y falls; but the second depth has more of both.
    x, y = np.array([1, 2, 3, 11, 12, 13.0]), np.array([3, 2, 1, 13, 12, 11.0])
    assert rank_correlation(x, y, np.zeros(6, dtype=int)) > 0.5
    assert rank_correlation(x, y, np.array([0, 0, 0, 1, 1, 1])) == pytest.approx(-1)
    assert np.isnan(rank_correlation(np.ones(6), y, np.zeros(6, dtype=int)))


def test_a_stratum_that_holds_more_counts_by_its_members_not_by_its_longer_ranks():
    """Four in order and two in reverse. Centred ranks over the size: sum of squares 5/16 = 0.3125, and 0.5/4 = 0.125."""
    x, y = np.array([1, 2, 3, 4, 1, 2.0]), np.array([1, 2, 3, 4, 2, 1.0])
    assert rank_correlation(x, y, np.array([0, 0, 0, 0, 1, 1])) == pytest.approx((0.3125 - 0.125) / (0.3125 + 0.125))


def test_a_draw_correlates_as_if_its_members_stood_there_as_often_as_drawn():
    rng = np.random.default_rng(1)
    x, y = rng.integers(0, 5, (2, 9)).astype(float), rng.integers(0, 5, 9).astype(float)
    strata = np.array([0, 0, 0, 0, 1, 1, 1, 2, 2])
    times = np.array([[1, 1, 1, 1, 1, 1, 1, 1, 1], [2, 2, 2, 2, 0, 0, 0, 1, 1], [0, 3, 1, 0, 1, 0, 2, 1, 1]])
    found = correlations_of_draws(x, y, strata, times)
    for b, repeats in enumerate(times):
        there = np.repeat(np.arange(9), repeats)
        assert found[:, b] == pytest.approx(rank_correlation(x[:, there], y[there], strata[there]))


def test_saes_of_one_hook_point_are_no_independent_witnesses():
    """Six hook points of eight SAEs that hardly differ: the interval is that of six, not that of 48."""
    rng = np.random.default_rng(0)
    quality, luck = rng.random(6), rng.random(6)

    def interval(copies):
        points, detections = [], []
        for i in range(6):
            for j in range(copies):
                near = 1e-6 * j
                points.append(point(i, 8, quality[i] + near, sae=f"s{i}.{j}", fvu_typical=rng.random()))
                detections.append(
                    Detection(sae=f"s{i}.{j}", auroc=luck[i] + near, by_domain={}, by_head={}, by_source={})
                )
        found = correlations({"*": points}, detections)
        return next(c for c in found if (c.scope, c.predictor) == ("suite", "i_cdf"))

    one, many = interval(1), interval(8)
    assert (one.units, many.units, many.saes) == (6, 6, 48)
    widths = [c.interval[1] - c.interval[0] for c in (one, many)]
    assert widths[0] > 1
    assert widths[1] == pytest.approx(widths[0], rel=0.25)


def test_two_hook_points_are_too_few_for_an_interval():
    points = [point(i % 2, 8 + i, 0.1 * i, sae=f"s{i}") for i in range(8)]
    detections = [
        Detection(sae=f"s{i}", auroc=0.5 + 0.01 * i, by_domain={}, by_head={}, by_source={}) for i in range(8)
    ]
    found = next(c for c in correlations({"*": points}, detections) if c.predictor == "i_cdf")
    assert (found.rho, found.interval, found.over) == (pytest.approx(1), None, {})


def test_resampling_stays_inside_strata():
    strata = np.array([0, 1, 0, 1, 1])
    drawn = resampled(strata, 50)
    assert drawn.shape == (50, 5)
    assert (strata[drawn] == strata).all()
    assert len(np.unique(drawn, axis=0)) > 10


def test_a_metric_that_predicts_beats_those_that_do_not():
    rng = np.random.default_rng(0)
    quality = rng.random(24)
    points = [
        point(1 + i % 6, 8 * rng.random(), q, sae=f"s{i}", fvu_typical=rng.random(), i_cdf_excess=rng.random())
        for i, q in enumerate(quality)
    ]
    detections = [
        Detection(sae=f"s{i}", auroc=0.6 + 0.3 * q, by_domain={}, by_head={}, by_source={})
        for i, q in enumerate(quality)
    ]
    found = {(c.scope, c.predictor): c for c in correlations({"*": points}, detections)}
    assert {c.predictor for c in found.values()} == set(PREDICTORS)
    for scope in ("suite", "depth", "hook point"):
        best = found[scope, "i_cdf"]
        assert (best.rho, best.saes) == (pytest.approx(1), 24)
        assert best.interval[0] > 0.99
        assert best.over["-fvu_typical"][1] > 0  # the whole interval of the difference
        assert best.over["l0"][1] > 0
        other = found[scope, "-fvu_typical"]
        assert other.interval[0] < other.rho < other.interval[1]
        assert other.interval[0] < 0.3
        # Latents over a threshold are the same for all: tied, so nothing can be said.
        assert (found[scope, "l0_0.2"].rho, found[scope, "l0_0.2"].interval, found[scope, "l0_0.2"].over) == (
            None,
            None,
            {},
        )


def planted_strength(rows, *, informative):
    rng = np.random.default_rng(0)
    strength = ((rng.random((len(rows), 40)) < 0.1) * rng.random((len(rows), 40))).astype(np.float16)
    for i, row in enumerate(rows):
        for d in row.label_domains if informative else ():
            strength[i, labelled.DOMAINS.index(d)] = 0.5 + 0.5 * rng.random()
    return strength


def test_detection_by_latents_that_hold_the_domains_and_by_noise():
    rows = planted.made_up_rows()
    folds = make_folds(rows, 2)
    assert set(folds) == {"left", "right", "third", "fourth"}
    assert sorted(folds.values()) == [0, 0, 1, 1]
    config = DetectConfig(latents=8, folds=2)
    good = detect("good", rows, planted_strength(rows, informative=True), folds, config)
    noise = detect("noise", rows, planted_strength(rows, informative=False), folds, config)
    assert good.auroc > 0.95
    assert 0.4 < noise.auroc < 0.6
    assert set(good.by_domain) == set(labelled.DOMAINS)
    assert set(good.by_source["violence.harm"]) == {"left", "right", "third", "fourth"}
    assert good.auroc == pytest.approx(np.mean(list(good.by_head.values())))


def test_a_source_s_own_quirk_does_not_help_to_detect_in_it():
    """Latent 0 marks positives in one source alone: where that is held out, nobody has seen it mark anything."""
    rows = planted.made_up_rows()
    strength = np.zeros((len(rows), 3), dtype=np.float16)
    strength[:, 0] = [r.source == "left" and bool(r.label_domains) for r in rows]
    strength[:, 1:] = np.random.default_rng(0).random((len(rows), 2)) < 0.5
    found = detect("quirk", rows, strength, make_folds(rows, 4), DetectConfig(latents=3, folds=4))
    assert found.by_source["violence.harm"]["left"] < 0.75


def test_each_head_has_no_more_latents_than_it_was_given():
    """Forty latents each say a little: two for a head detect less well than all."""
    rows = planted.made_up_rows()
    rng = np.random.default_rng(0)
    harmful = np.array([[bool(r.label_domains)] for r in rows])
    strength = (rng.random((len(rows), 40)) < 0.3 + 0.2 * harmful).astype(np.float16)
    folds = make_folds(rows, 2)
    few, all_ = (detect("s", rows, strength, folds, DetectConfig(latents=n, c=1.0, folds=2)).auroc for n in (2, 40))
    assert few < 0.75
    assert all_ > 0.9


def test_what_judges_no_head_is_always_fitted_on():
    """The project's own sentences, and a source without positives, stand in no fold: each fold judges something."""
    harmless = [row for row in planted.made_up_rows(sources=("calm",)) if not row.label_domains]
    rows = [*planted.made_up_rows(sources=("left", "right")), *harmless, *labelled.written_rows()]
    folds = make_folds(rows, 2)
    assert folds == {"left": 0, "right": 1}
    # Latent 0 marks terror in the project's own sentences and in one source: the other is judged by what they taught.
    strength = np.zeros((len(rows), 3), dtype=np.float16)
    strength[:, 0] = ["terror" in r.label_domains for r in rows]
    strength[:, 1:] = np.random.default_rng(0).random((len(rows), 2)) < 0.5
    alone = strength.copy()
    alone[:, 0] *= [r.source != "left" for r in rows]
    found = detect("own", rows, alone, folds, DetectConfig(latents=3, folds=2))
    assert found.by_source["terror.harm"]["right"] > 0.9


def test_pairs_and_look_alikes_are_no_part_of_detection():
    rows = [*planted.made_up_rows(), *labelled.own_rows(), *labelled.lookalike_rows()]
    kept = judged_rows(rows)
    left_out = {rows[i].source for i in set(range(len(rows))) - set(kept.tolist())}
    assert left_out == {"own_pairs", *(r.source for r in labelled.lookalike_rows())}


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranked")
    planted.write_suite(folder / "saes")
    planted.write_texts(folder / "texts")
    return folder


def test_the_command_ranks_picks_draws_and_predicts(suite, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("guard.lab.search.detect._BOOTSTRAPS", 50)
    out = suite / "contrast"
    given = ["lab", "contrast", "--saes", str(suite / "saes"), "--texts", str(suite / "texts"), "--out", str(out)]
    assert main([*given, "--detect", "--latents", "8", "--by", "i_cdf_net"]) == 0
    shown = capsys.readouterr().out
    # More noise parts more pairs by chance: I_CDF takes the noisy SAEs for the better ones, its excess does not.
    points = {p["sae"]: p for p in json.loads((out / "curve.json").read_text())}
    for hook_point in planted.POINTS:
        clean, noisy = points[f"{hook_point}.{planted.CLEAN}"], points[f"{hook_point}.{planted.NOISY}"]
        assert noisy["i_cdf"] > 2 * clean["i_cdf"]
        assert noisy["i_cdf_reversed"] > 2 * clean["i_cdf_reversed"]
        net = [p["i_cdf_excess"] - p["i_cdf_excess_null"] for p in (clean, noisy)]
        assert net[0] > net[1]
    assert "picked by i_cdf_net: residual, batch_topk, width 48, L0 8 (mean rank 1.00 of 2 over 2 depths)" in shown
    ranking = json.loads((out / "ranking.json").read_text())
    assert ranking["picked"]["saes"] == [f"{p}.{planted.CLEAN}" for p in planted.POINTS]
    contrasts = json.loads((out / "contrast.json").read_text())
    assert len(contrasts) == 4 * (1 + 4 + 17)
    assert {c["sae"] for c in contrasts} == set(points)
    prediction = json.loads((out / "prediction.json").read_text())
    assert [d["sae"] for d in prediction["detections"]] == list(points)
    assert {c["target"] for c in prediction["correlations"]} == {"*", *labelled.DOMAINS}
    assert not any("own_pairs" in fold for fold in prediction["folds"])
    assert "Spearman with AUROC on unseen sources, 4 SAEs" in shown
    for name in ("curve.png", "prediction.png"):
        assert (out / name).read_bytes().startswith(PNG)
    heading = next(line for line in shown.splitlines() if line.startswith("scope"))
    assert heading.split() == ["scope", "predictor", "Spearman", "lead", "over", "FVU", "lead", "over", "L0"]


def test_a_metric_that_is_none_is_refused_before_any_work(tmp_path, capsys):
    given = [option for name in ("saes", "texts", "out") for option in (f"--{name}", str(tmp_path / name))]
    assert main(["lab", "contrast", *given, "--by", "beauty"]) == 1
    assert "by: found 'beauty', expected one of p_best, i_cdf" in capsys.readouterr().err


def test_a_killed_detection_goes_on_where_it_was(suite, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("guard.lab.search.detect._BOOTSTRAPS", 20)
    where = {"saes": suite / "saes", "texts": suite / "texts"}
    stages.contrast(**where, out=tmp_path)
    config = DetectConfig(latents=4)

    def killed(done, _all):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stages.predict(**where, contrasted=tmp_path, config=config, progress=killed)
    file = tmp_path / "detections.jsonl"
    head, first, second = file.read_text().splitlines()
    marked = json.dumps(json.loads(first) | {"auroc": 0.125})  # so that it can be told from one made anew
    file.write_text("\n".join([head, marked, second[:40]]))  # killed within a line
    found = stages.predict(**where, contrasted=tmp_path, config=config).detections
    assert found[0].auroc == 0.125
    assert found[1] == Detection.model_validate_json(second)
    assert len(found) == len(file.read_text().splitlines()) - 1 == 4
    # Another setting is another detection.
    assert stages.predict(**where, contrasted=tmp_path, config=DetectConfig(latents=5)).detections[0].auroc != 0.125
