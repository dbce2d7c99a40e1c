"""The stages as the command line runs them, on made-up activations of the project's own sentences."""

import json
import shutil

import numpy as np
import pytest
import torch

from guard.cli.main import main
from guard.lab import labelled, shards, stages
from guard.lab.explain.records import Explanation, read, write
from guard.lab.explain.scores import LatentScores
from guard.lab.heads.fit import HEADS
from guard.lab.suite.config import Grid, SuiteConfig, read_config
from guard.lab.suite.measure import read_reports
from guard.lab.suite.sae import load_suite
from guard.lab.suite.train import train
from tests.lab import explained
from tests.lab.given import POINTS, synthetic_shards


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Activations, SAEs trained on them, and a harvest of texts in which presence of a domain shows."""
    folder = tmp_path_factory.mktemp("runs")
    synthetic_shards(folder / "activations", count=4)
    grid = Grid(hook_points=POINTS, widths=(64,), l0=(4,))
    config = SuiteConfig(grid=(grid,), tokens=3200, batch=32, shards_mixed=2, held_out_shards=1)
    train(config, folder / "activations", folder / "saes")
    write_texts(folder / "texts")
    return folder


def made_up_rows():
    """Two sources that label harm, so that either can be judged by heads fitted on the other."""
    return [
        labelled.Row(
            id=f"{source}/{domain}/{i}",
            text=f"{source} {i} {domain if harmful else 'garden'}",
            lang="en",
            source=source,
            label_domains=(domain,) if harmful else (),
            scope=labelled.DOMAINS,
            kind="harmful_text" if harmful else "benign",
        )
        for source in ("left", "right")
        for domain in labelled.DOMAINS
        for i in range(24)
        for harmful in [i % 2 == 0]
    ]


def write_texts(out, tokens=4, d_model=16, in_chats=False):
    # All pairs, which must be whole, and a few of the other own sentences: a fit over all of them takes minutes.
    own = [row for i, row in enumerate(labelled.own_rows()) if row.source == labelled.PAIRS or i % 20 == 0]
    rows = [*made_up_rows(), *own, *labelled.lookalike_rows()]
    if in_chats:
        rows = labelled.in_chats(rows, 0)
    generator = torch.Generator().manual_seed(5)
    made = shards.ShardSet(
        model="none",
        fingerprint={},
        hook_points=POINTS,
        d_model=d_model,
        dtype="float32",
        context=64,
        seed=0,
        tokens=tokens * len(rows),
        sources=(labelled.digest(rows),),
        shard_count=1,
    )
    shards.describe(out, made)
    (out / "rows.jsonl").write_text("".join(r.model_dump_json() + "\n" for r in rows), encoding="utf-8")
    about = torch.tensor([[float(d in r.label_domains) for d in labelled.DOMAINS] for r in rows])
    tensors = {"piece": torch.arange(len(rows), dtype=torch.int32).repeat_interleave(tokens)}
    for point in POINTS:
        signal = (4 * about @ torch.randn(len(labelled.DOMAINS), d_model, generator=generator)).repeat_interleave(
            tokens, 0
        )
        tensors[point] = (signal + torch.randn(len(signal), d_model, generator=generator)).bfloat16()
    shards.write(out, 0, tensors)


def guard(capsys, monkeypatch, *arguments):
    monkeypatch.setenv("COLUMNS", "140")
    capsys.readouterr()
    status = main([str(a) for a in arguments])
    found = capsys.readouterr()
    return status, found.out, found.err


def test_a_killed_pooling_loses_one_hook_point(runs, tmp_path):
    saes = shutil.copytree(runs / "saes", tmp_path / "saes")
    suite = load_suite(saes)
    said = []

    def killed(done, total):
        said.append((done, total))
        if len(said) == 3:  # the second hook point's statistics are there
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stages.strengths(suite, saes, runs / "texts", runs / "activations", killed)
    # Ten shards of activations for the statistics of either, and one of texts.
    assert said == [(10, 22), (11, 22), (21, 22)]
    kept = [file.parent.name for file in saes.glob("*/strength-*.npy")]
    assert kept == [suite[0].name]
    said.clear()
    first, second = stages.strengths(suite, saes, runs / "texts", progress=lambda *now: said.append(now))
    assert said == [(0, 1), (1, 1)]
    assert first.shape == second.shape == (len(stages.read_rows(runs / "texts")), 64)
    only = np.arange(128) % 3 == 0
    for some, all_, kept in zip(
        stages.strengths(suite, saes, runs / "texts", only=only), (first, second), np.split(only, 2), strict=True
    ):
        assert (some == all_[:, kept]).all()
        assert some.any()


def test_a_narrowed_suite_says_what_its_latents_said(runs, tmp_path, capsys, monkeypatch):
    saes = shutil.copytree(runs / "saes", tmp_path / "saes")
    suite = load_suite(saes)
    kept = [5, 11, 40]
    lines = [
        {"hook_point": s.hook_point, "latent": n, "sae": s.name, "domains": ["terror"]} for s in suite for n in kept
    ]
    (tmp_path / "latents.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    stages.strengths(suite, saes, runs / "texts", runs / "activations")  # statistics come with them
    given = ("--saes", saes, "--latents", tmp_path / "latents.jsonl", "--out", tmp_path / "kept")
    status, shown, err = guard(capsys, monkeypatch, "lab", "narrow", *given)
    assert (status, "6 latents of 2 SAEs" in shown) == (0, True), err
    only = np.isin(np.arange(128) % 64, kept)
    wanted = stages.strengths(suite, saes, runs / "texts", only=only)
    narrowed = load_suite(tmp_path / "kept")
    assert [s.width for s in narrowed] == [64, 64]
    for found, before in zip(stages.strengths(narrowed, tmp_path / "kept", runs / "texts"), wanted, strict=True):
        np.testing.assert_allclose(found[:, kept], before, atol=1e-3)
        assert found.any()


def test_strengths_are_those_of_the_rows_that_stand_there_now(runs, tmp_path):
    saes = shutil.copytree(runs / "saes", tmp_path / "saes")
    suite = load_suite(saes)
    before = [part.copy() for part in stages.strengths(suite, saes, runs / "texts", runs / "activations")]
    first, second = (tmp_path / "saes" / sae.name for sae in suite)
    files = [folder / "sae_weights.safetensors" for folder in (first, second)]
    weights = [file.read_bytes() for file in files]
    for file, others in zip(files, reversed(weights), strict=True):  # other SAEs under the same names
        file.write_bytes(others)
    after = stages.strengths(load_suite(saes), saes, runs / "texts", runs / "activations")
    assert all((now != then).any() for now, then in zip(after, before, strict=True))
    for file, own in zip(files, weights, strict=True):
        file.write_bytes(own)
    again = stages.strengths(load_suite(saes), saes, runs / "texts", runs / "activations")
    assert all((now == then).all() for now, then in zip(again, before, strict=True))


def test_texts_that_another_model_read_are_refused(runs, tmp_path, capsys, monkeypatch):
    texts = shutil.copytree(runs / "texts", tmp_path / "texts")
    harvest = json.loads((texts / "harvest.json").read_text())
    (texts / "harvest.json").write_text(json.dumps(harvest | {"model": "other", "fingerprint": {"weights": "1"}}))
    given = ("--saes", runs / "saes", "--activations", runs / "activations", "--texts", texts, "--out", tmp_path / "o")
    status, _, err = guard(capsys, monkeypatch, "lab", "fit", *given)
    assert status == 1
    assert "texts: found a harvest of other, expected one of none, with the weights that the SAEs of" in err


def test_a_suite_is_narrowed_to_what_was_explained(runs, tmp_path, capsys, monkeypatch):
    saes = shutil.copytree(runs / "saes", tmp_path / "saes")
    suite = load_suite(saes)
    stages.strengths(suite, saes, runs / "texts", runs / "activations")  # statistics come with them
    told = {0: ((), 0.9), 1: (("terror",), 0.9), 2: (("terror",), 0.1), 3: (("politics",), 0.2)}
    name = suite[0].name
    said = [
        explained.explanation(f"{POINTS[0]}/{n}", f"latent {n}", sae=name).model_copy(update={"domains": domains})
        for n, (domains, _) in told.items()
    ]
    scores = [
        LatentScores(latent=f"{POINTS[0]}/{n}", sae=name, scores={"simulation_segment": score}, items=9, firing=3)
        for n, (_, score) in told.items()
    ]
    kept, tested = tmp_path / "kept", tmp_path / "tested"
    (tmp_path / "explained").mkdir()
    tested.mkdir()
    explained.written(tmp_path / "explained", [], said)
    write(tested / "scores.jsonl", scores)

    narrow = ("lab", "narrow", "--saes", saes, "--out", kept)
    status, _, err = guard(capsys, monkeypatch, *narrow)
    assert (status, "found neither --latents nor --explained" in err) == (2, True), err
    status, _, err = guard(capsys, monkeypatch, *narrow, "--explained", tmp_path / "explained")
    assert (status, "--explained and --scores go together" in err) == (2, True), err
    given = (*narrow, "--explained", tmp_path / "explained", "--scores", tested, "--in-domains")
    status, shown, err = guard(capsys, monkeypatch, *given)
    assert (status, "2 latents of 1 SAEs" in shown) == (0, True), err
    assert [sae.speaking.tolist() for sae in load_suite(kept)] == [[1, 3]]
    for name, schema in (("explanations.jsonl", Explanation), ("scores.jsonl", LatentScores)):
        assert [line.number for line in read(kept / name, schema)] == [1, 3]
    # What was said came along, so that the folder is one that others join.
    status, shown, err = guard(capsys, monkeypatch, "lab", "join", "--saes", kept, "--out", tmp_path / "joined")
    assert (status, "2 latents" in shown) == (0, True), err

    lines = [{"hook_point": POINTS[0], "latent": n, "sae": suite[0].name, "domains": []} for n in (2, 3)]
    (tmp_path / "some.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    status, shown, err = guard(capsys, monkeypatch, *given, "--latents", tmp_path / "some.jsonl")
    assert (status, "1 latents of 1 SAEs" in shown) == (0, True), err
    assert [sae.speaking.tolist() for sae in load_suite(kept)] == [[3]]


def test_the_picked_configuration_is_trained_on(runs, tmp_path, capsys, monkeypatch):
    saes = shutil.copytree(runs / "saes", tmp_path / "saes")
    status, shown, err = guard(
        capsys, monkeypatch, "lab", "contrast", "--saes", saes, "--texts", runs / "texts", "--out", tmp_path / "contrast",
        "--activations", runs / "activations",
    )  # fmt: skip
    assert status == 0, err
    picked = tmp_path / "contrast" / "picked.toml"
    assert f"guard lab train --config {picked} --from {saes} --tokens N" in shown.replace("\n", "")
    config = read_config(str(picked))
    assert [spec.name for spec in config.specs] == [f"{point}.batch_topk.w64.l4" for point in POINTS]
    assert (config.tokens, config.batch) == (3200, 32)
    status, shown, err = guard(
        capsys, monkeypatch, "lab", "train", "--config", picked, "--from", saes, "--tokens", 640, "--activations",
        runs / "activations", "--out", tmp_path / "further",
    )  # fmt: skip
    assert status == 0, err
    assert [report.tokens_trained for report in read_reports(tmp_path / "further")] == [3840, 3840]


def test_from_saes_to_figures(runs, capsys, monkeypatch):
    saes, texts, out = runs / "saes", runs / "texts", runs / "contrast"
    contrast = ("lab", "contrast", "--saes", saes, "--texts", texts, "--out", out)
    status, _, err = guard(capsys, monkeypatch, *contrast)
    assert status == 1
    assert err == (
        f"guard: error: {saes}/{POINTS[0]}.batch_topk.w64.l4/stats.npz: absent; run `guard lab contrast` or `guard lab fit` with "
        "--activations first\n"
    )
    status, shown, _ = guard(capsys, monkeypatch, *contrast, "--activations", runs / "activations")
    assert status == 0
    found = json.loads((out / "contrast.json").read_text())
    assert len(found) == 2 * (1 + 4 + 17)
    assert [c["pairs"] for c in found[:3]] == [850, 200, 50]
    assert f"{found[0]['i_cdf']:.5f}" in shown
    assert shown.count("violence/insult") == 2
    # What was computed is kept, whole: the activations are not needed again, and nothing half-written lies about.
    assert guard(capsys, monkeypatch, *contrast)[:2] == (0, shown)
    assert list(saes.glob(".*")) == []

    fitted = runs / "heads"
    options = ("--latents-per-head", 16, "--latents-by-contrast", 4)
    status, _, err = guard(
        capsys, monkeypatch, "lab", "fit", "--saes", saes, "--activations", runs / "activations", "--texts", texts,
        "--out", fitted, *options,
    )  # fmt: skip
    assert status == 0, err
    assert json.loads((fitted / "fit.json").read_text())["latents_per_head"] == 16

    judged = ("--saes", saes, "--texts", texts, "--fitted", fitted)
    status, _, err = guard(capsys, monkeypatch, "lab", "build", *judged, "--out", runs / "pack")
    assert (status, "evaluation.json: absent; run `guard lab evaluate` first" in err) == (1, True), err
    twice = ("--texts", texts, *judged)
    status, _, err = guard(capsys, monkeypatch, "lab", "evaluate", *twice)
    assert (status, "not the texts of the fit" in err) == (1, True), err

    monkeypatch.setattr("guard.lab.heads.evaluate._BOOTSTRAPS", 5)  # 200 take half a minute
    status, shown, err = guard(
        capsys, monkeypatch, "lab", "evaluate", "--saes", saes, "--texts", texts, "--fitted", fitted
    )
    assert status == 0, err
    figures = json.loads((fitted / "evaluation.json").read_text())
    assert {(f["domain"], f["head"]) for f in figures if f["source"] == "left"} == {(d, h.value) for d, h in HEADS}
    assert min(f["auroc"]["combined"] for f in figures if f["source"] == "left") > 0.9
    assert all(set(f["auroc"]) == {"tfidf", "probe", "latents", "combined"} for f in figures)
    assert all(set(f["lead_interval"]) == {"tfidf", "probe", "latents"} for f in figures)
    assert f"combined against tfidf: ahead or level in {len(figures)} of {len(figures)}" in shown
    assert shown.splitlines()[1].split()[-4:] == ["tfidf", "probe", "latents", "combined"]
    for f in figures:
        assert f"{f['auroc']['combined']:.3f}" in shown


def test_heads_over_explained_latents_and_permissive_sources(runs, tmp_path, capsys, monkeypatch):
    saes, texts = runs / "saes", runs / "texts"
    name = f"{POINTS[0]}.batch_topk.w64.l4"
    tested = [(latent, round(latent / 64, 3)) for latent in range(64)]
    said = [explained.explanation(f"{POINTS[0]}/{latent}", f"latent {latent}", sae=name) for latent, _ in tested]
    scores = [
        LatentScores(latent=f"{POINTS[0]}/{i}", sae=name, scores={"simulation_segment": r}, items=9, firing=3)
        for i, r in tested
    ]
    for folder in ("explained", "scores", "data"):
        (tmp_path / folder).mkdir()
    explained.written(tmp_path / "explained", [], said)
    write(tmp_path / "scores" / "scores.jsonl", scores)
    licences = {"left": {"license": "MIT"}, "right": {"license": "CC BY-NC 4.0"}}
    (tmp_path / "data" / "manifest_dev.json").write_text(json.dumps(licences))
    fit = (
        "lab", "fit", "--saes", saes, "--activations", runs / "activations", "--texts", texts, "--out",
        tmp_path / "heads", "--explained", tmp_path / "explained", "--least-score", 0.5, "--permissive",
        "--passage-tokens", 2, "--passage-caution", 0.1,
    )  # fmt: skip
    assert guard(capsys, monkeypatch, *fit)[0] == 2
    fit = (*fit, "--scores", tmp_path / "scores")
    status, _, err = guard(capsys, monkeypatch, *fit)
    assert status == 2
    assert "--permissive needs --manifests, which say how each source is licensed" in " ".join(err.split())
    status, shown, err = guard(capsys, monkeypatch, *fit, "--manifests", tmp_path / "data")
    assert status == 0, err
    assert "32 explained latents to choose among, 32 dropped (below 0.5)" in shown
    assert "fitted on own sentences and left" in shown
    kept = [json.loads(line) for line in (tmp_path / "heads" / "latents.jsonl").open()]
    assert {line["sae"] for line in kept} == {name}
    assert min(line["latent"] for line in kept) >= 32
    logits = np.load(tmp_path / "heads" / "logits.npz")
    assert len(logits["terror.harm.probe.passages"]) == 3 * len(logits["terror.harm.probe"])  # of texts of four tokens

    # The other source is judged, by heads that were not fitted on it.
    monkeypatch.setattr("guard.lab.heads.evaluate._BOOTSTRAPS", 5)
    status, _, err = guard(
        capsys, monkeypatch, "lab", "evaluate", "--saes", saes, "--texts", texts, "--fitted", tmp_path / "heads"
    )
    assert status == 0, err
    figures = json.loads((tmp_path / "heads" / "evaluation.json").read_text())
    assert {f["source"] for f in figures} == {"left", "right"}


def test_heads_fitted_to_texts_in_chats_too_are_judged_in_both(runs, tmp_path, capsys, monkeypatch):
    saes, texts, chats = runs / "saes", runs / "texts", tmp_path / "chats"
    write_texts(chats, in_chats=True)
    given = ("--saes", saes, "--activations", runs / "activations", "--out", tmp_path / "heads")
    fit = ("lab", "fit", *given, "--latents-per-head", 16, "--latents-by-contrast", 4, "--latents-by-weight", 0)
    status, _, err = guard(capsys, monkeypatch, *fit, "--texts", chats)
    assert status == 1
    assert err == (
        f"guard: error: {chats}: found texts in chats, expected bare ones first (harvested without --in-chats)\n"
    )
    elsewhere = shutil.copytree(chats, tmp_path / "elsewhere")
    (elsewhere / "harvest.json").write_text((chats / "harvest.json").read_text().replace(POINTS[1], "model.layers.29"))
    status, _, err = guard(capsys, monkeypatch, *fit, "--texts", texts, "--texts", elsewhere)
    assert status == 1
    assert err == (
        f"guard: error: {elsewhere}: found a harvest of none at {POINTS[0]}, model.layers.29, expected the same weights "
        f"and hook points as {texts} (none at {', '.join(POINTS)})\n"
    )
    both = ("--texts", texts, "--texts", chats)
    status, _, err = guard(capsys, monkeypatch, *fit, *both)
    assert status == 0, err
    monkeypatch.setattr("guard.lab.heads.evaluate._BOOTSTRAPS", 5)
    status, shown, err = guard(
        capsys, monkeypatch, "lab", "evaluate", "--saes", saes, *both, "--fitted", tmp_path / "heads"
    )
    assert status == 0, err
    figures = json.loads((tmp_path / "heads" / "evaluation.json").read_text())
    bare, framed = ([f for f in figures if f["in_chats"] == wanted] for wanted in (False, True))
    assert [(f["domain"], f["head"], f["source"]) for f in bare] == [
        (f["domain"], f["head"], f["source"]) for f in framed
    ]
    assert [(f["positives"], f["negatives"]) for f in bare] == [(f["positives"], f["negatives"]) for f in framed]
    assert min(f["auroc"]["combined"] for f in framed) > 0.9
    assert "violence.harm in chats" in shown
    assert f"ahead or level in {len(bare)} of {len(bare)}" in shown
