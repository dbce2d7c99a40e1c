"""Ranking a suite, picking a configuration, and asking whether the metric predicts detection."""

import json

import numpy as np
import pytest
from scipy.stats import spearmanr

from guard.cli.main import main
from guard.errors import InvalidInput
from guard.lab import labelled
from guard.lab.search.detect import (
    PREDICTORS,
    DetectConfig,
    Detection,
    correlations,
    detect,
    judged_rows,
    make_folds,
    rank_correlation,
    resampled,
)
from guard.lab.search.rank import CurvePoint, depth, draw_curve, metric, ranked, site
from tests.lab import planted

PNG = b"\x89PNG\r\n\x1a\n"


def point(layer, l0, i_cdf, *, where="", architecture="batch_topk", width=64, **more):
    hook_point = f"model.layers.{layer}{where}"
    return CurvePoint(
        **{
            "sae": f"{hook_point}.{architecture}.w{width}.l{l0}",
            "hook_point": hook_point,
            "site": site(hook_point),
            "depth": layer,
            "architecture": architecture,
            "width": width,
            "l0_target": l0,
            "l0": l0 + 0.5,
            "fvu": 1 / l0,
            "fvu_typical": 1 / l0,
            "i_cdf": i_cdf,
            "i_cdf_reversed": 0.01,
            "i_cdf_shuffled": 0.02,
            "i_cdf_excess": 0.3,
            "i_cdf_excess_null": 0.1,
            "l0_at": {"0.05": 9, "0.1": 8, "0.2": 7, "0.3": 6, "0.5": 5},
        }
        | more
    )


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
        ranked([point(1, 8, 0.1)], "fvu")
    assert str(refused.value) == (
        "by: found 'fvu', expected one of i_cdf, i_cdf_excess, i_cdf_net, i_cdf_sum, l0_0.05, l0_0.1, l0_0.2, l0_0.3, l0_0.5"
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
        point(1 + i % 3, 8 * rng.random(), q, sae=f"s{i}", fvu=rng.random(), i_cdf_excess=rng.random())
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
        assert best.over["-fvu"][1] > 0  # the whole interval of the difference
        assert best.over["l0"][1] > 0
        other = found[scope, "-fvu"]
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
    assert main([*given, "--by", "beauty"]) == 1
    assert "by: found 'beauty', expected one of i_cdf" in capsys.readouterr().err
