"""Texts become a pack, stage by stage, read by a small model of random weights; the pack scores as the lab does."""

import json
from functools import partial

import numpy as np
import pytest
import torch

from guard.assessor import Assessor
from guard.cli.main import main
from guard.config import load_config
from guard.kernels.contract import EncodeRows
from guard.kernels.reference import ReferenceEncoder
from guard.lab import labelled, shards, stages
from guard.lab.harvest import harvest
from guard.lab.heads.calibrate import fit_all
from guard.lab.heads.faithful import faithfulness
from guard.lab.heads.fit import HEADS, FitConfig
from guard.lab.suite.config import Grid, SuiteConfig
from guard.lab.suite.train import train
from guard.pack.loader import load_pack
from guard.pack.manifest import PoolingSection
from guard.policy.decide import decide
from guard.reader import weights
from guard.records import CheckInput, CheckOptions, Message, Role
from guard.scoring.heads import HeadSet
from guard.scoring.pooling import Hits
from tests.lab.given import POINTS

CONFIG = FitConfig(
    latents_per_head=12,
    latents_by_weight=0,
    latents_by_contrast=4,
    per_domain=("terror=6,0,1e-3",),
    exponent=0.75,
    power=0.5,
    prior_tokens=2.0,
    passage_tokens=8,
    passage_caution=0.1,
)


def rows():
    """Two sources that label harm, not always rightly, the contrast pairs, and the look-alikes."""
    made_up = [
        labelled.Row(
            id=f"{source}/{domain}/{i}",
            text=f"{source} {i} {domain if told else 'garden'}" + ", and nothing else happened that day" * (i % 3),
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
        for told in [harmful != (i in {0, 1})]
    ]
    pairs = [row for row in labelled.own_rows() if row.source == labelled.PAIRS]
    return [*made_up, *pairs, *labelled.lookalike_rows()]


@pytest.fixture(scope="module")
def runs(model, tmp_path_factory):
    """All that `guard lab build` takes, each stage run on what the one before it wrote."""
    folder = tmp_path_factory.mktemp("runs")
    corpus = folder / "corpus.txt"
    corpus.write_text("\n\n\n".join(row.text for row in labelled.lookalike_rows()), encoding="utf-8")
    read = {"model": str(model), "hook_points": POINTS}
    harvest(**read, corpus=[corpus], out=folder / "activations", tokens=4000, context=64, shard_tokens=800)
    config = SuiteConfig(
        grid=(Grid(hook_points=POINTS, widths=(64,), l0=(4,)),),
        tokens=6400,
        batch=64,
        shards_mixed=2,
        held_out_shards=1,
    )
    train(config, folder / "activations", folder / "saes")
    stages.harvest_labelled(**read, rows=rows(), out=folder / "texts", seed=0)
    stages.harvest_labelled(**read, rows=rows(), out=folder / "chats", seed=0, in_chats=True)
    given = {"saes": folder / "saes", "texts": [folder / "texts", folder / "chats"]}
    stages.fit(**given, activations=folder / "activations", out=folder / "heads", config=CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("guard.lab.heads.evaluate._BOOTSTRAPS", 2)
        stages.evaluate(**given, fitted=folder / "heads")
    return folder


@pytest.fixture(scope="module")
def build(runs, model):
    """`guard lab build` into a folder; gives what load_pack reads there."""

    def run(out):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("guard.lab.heads.build.faithfulness", partial(faithfulness, of_each=5))
            texts = ("--texts", str(runs / "texts"), "--texts", str(runs / "chats"))
            saes = ("--saes", str(runs / "saes"), "--fitted", str(runs / "heads"))
            assert main(["lab", "build", *saes, *texts, "--out", str(out)]) == 0
        return load_pack(out)

    return run


@pytest.fixture(scope="module")
def pack(build, tmp_path_factory):
    return build(tmp_path_factory.mktemp("packs") / "small")


@pytest.fixture(scope="module")
def scored(runs):
    """The rows of both harvests, and of every head the lab's own scores of them, by its name."""
    design = stages._design(runs / "saes", [runs / "texts", runs / "chats"], runs / "heads")
    every = np.arange(len(design.rows))
    result = {}
    for head in fit_all(design, stages._unflat(runs / "heads" / "logits.npz")):
        logits = design.severest(head.model.logits(design, every), head.model.passage_logits(design, every))
        result[head.section.name] = 1 / (1 + np.exp(-(logits + head.shift) / head.section.temperature))
    return design.rows, result


def test_a_pack_holds_what_fit_was_given_and_chose(pack, runs, model):
    manifest = pack.manifest
    assert manifest.id == f"{model.name}/small"  # not where the folder lies
    assert manifest.model.name == model.name
    assert manifest.pooling == PoolingSection(
        exponent=0.75, power=0.5, prior_tokens=2.0, passage_tokens=8, passage_caution=0.1
    )
    assert [(head.domain, head.head) for head in manifest.heads] == list(HEADS)
    assert pack.domains == labelled.DOMAINS
    flagging = {head.name for head in manifest.heads if head.flag_at is not None}
    assert flagging == {"pornography.harm", "politics.presence", "violence.harm", "terror.harm"}
    assert {"weights": manifest.model.weights, "tokenizer": manifest.model.tokenizer} == weights.fingerprint(model)
    assert [(point.name, point.sae_width, point.sae_tokens) for point in manifest.hook_points] == [
        (point, 64, 6400) for point in POINTS
    ]
    chosen = [json.loads(line) for line in (runs / "heads" / "latents.jsonl").open()]
    kept = [(rows.name, latent) for rows in pack.hook_points for latent in rows.latents.tolist()]
    assert kept == [(line["hook_point"], line["latent"]) for line in chosen]
    assert 20 < len(kept) < 128
    assert {source.name for source in manifest.sources} == {"left", "right", "own sentences"}


def test_a_pack_tells_its_figures_in_evaluation_json_and_in_its_readme(pack, runs):
    judged = json.loads((runs / "heads" / "evaluation.json").read_text())
    found = json.loads((pack.folder / "evaluation.json").read_text())
    assert [*found["detection"], *found["detection_in_chats"]] == [
        f for in_chats in (False, True) for f in judged if f["in_chats"] == in_chats
    ]
    assert (found["lookalikes"]["texts"], found["lookalikes_in_chats"]["texts"]) == (200, 200)
    assert found["fit"]["passage_tokens"] == 8
    assert [f"{o['domain']}.{o['head']}" for o in found["operating"]] == [head.name for head in pack.manifest.heads]
    assert found["faithfulness"]["texts"] == 4 * 5
    missed = [case.id for case in pack.cases if case.known == "miss"]
    assert found["cases"] == {"cases": len(pack.cases), "missed": missed}
    readme = (pack.folder / "README.md").read_text()
    assert readme.startswith(f"# {pack.manifest.id} {pack.manifest.version}\n")
    for figure in found["detection"]:
        assert f"| {figure['domain']}.{figure['head']} | {figure['source']} | 12 / 84 |" in readme
        assert f" {figure['auroc']['combined']:.3f} |" in readme
    assert f"Own cases: {len(pack.cases)}, of which {len(missed)} are known misses." in readme
    assert f"look-alikes flagged: {found['lookalikes']['flagged']} of 200; in chats" in readme


def test_the_packs_rows_score_harvested_activations_as_the_labs_heads_do(pack, runs, scored):
    rows, expected = scored
    harvested = shards.load_many(
        runs / "texts", range(shards.described(runs / "texts").shard_count), ["piece", *POINTS]
    )
    thresholds = {head.name: (head.flag_at, head.block_at) for head in pack.manifest.heads}
    heads = HeadSet(pack, thresholds, decide, [""] * len(pack.latents))
    passages = set()
    for number in [n for n, row in enumerate(rows) if not row.in_chat][::17]:
        state = heads.new_state()
        hits = encoded(pack, {point: harvested[point][harvested["piece"] == number] for point in POINTS})
        state.add(hits, np.zeros((hits.tokens, 3), dtype=np.int64))
        for domain in heads.verdicts(state, pack.domains, 0):
            for head in domain.heads:
                assert head.score == pytest.approx(expected[f"{domain.domain}.{head.head}"][number], abs=1e-3)
                passages.add(head.passage is not None)
    assert passages == {True, False}


def encoded(pack, x):
    """Hits of the pack's rows on `x [T, d_model]` of each hook point."""
    parts = [ReferenceEncoder()(x[point.name], EncodeRows.of(point, torch.from_numpy)) for point in pack.hook_points]
    before = [0, *(len(point.latents) for point in pack.hook_points)]
    return Hits(
        np.concatenate([part.token for part in parts]),
        np.concatenate([part.row + offset for part, offset in zip(parts, np.cumsum(before), strict=False)]),
        np.concatenate([part.value for part in parts]).astype(np.float64),
        np.concatenate([part.probe for part in parts], axis=1).astype(np.float64),
    )


def test_texts_read_anew_bare_and_in_chats_score_as_the_lab_says(pack, model, scored):
    rows, expected = scored
    off = {"text": [], "prompt": [], "completion": []}
    assessor = Assessor.load(load_config(overrides={"pack": str(pack.folder), "reader": {"model": str(model)}}))
    try:
        for number in range(3, len(rows), 23):
            row = rows[number]
            if row.frame == "text":
                given = CheckInput(row.text)
            elif row.frame == "prompt":
                given = CheckInput((Message(Role.USER, row.text),))
            else:
                given = CheckInput(labelled.said_before(row), row.text)
            for domain in assessor.check(given, CheckOptions(max_attributions=0)).phases[-1].domains:
                for head in domain.heads:
                    off[row.frame].append(head.score - expected[f"{domain.domain}.{head.head}"][number])
    finally:
        assessor.close()
    for each in off.values():
        assert np.abs(each).max() < 0.01  # harvests keep bfloat16


def test_building_again_gives_the_same_pack(pack, build, tmp_path):
    assert build(tmp_path / pack.folder.name).hash == pack.hash
