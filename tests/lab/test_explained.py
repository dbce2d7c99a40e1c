"""From tested explanations to the latents that heads may keep."""

import numpy as np
import pytest

from guard.errors import InvalidInput
from guard.lab.explain.gather import gather
from guard.lab.explain.records import write
from guard.lab.explain.scores import LatentScores
from guard.lab.heads.explained import keep, kept, mask
from guard.lab.heads.features import PooledTexts
from guard.lab.heads.fit import Design, FitConfig, choose_latents
from guard.lab.labelled import Row
from tests.lab import explained as given
from tests.lab.test_features import an_sae


def scored(folder, prompt="segment-1", **scores):
    folder.mkdir()
    write(
        folder / "scores.jsonl",
        [
            LatentScores(latent=f"model.layers.1/{i}", sae="an-sae", scores=values, items=9, firing=3, prompt=prompt)
            for i, values in ((int(name[1:]), values) for name, values in scores.items())
        ],
    )
    return folder


def explanations(folder, count=3):
    said = [given.explanation(f"model.layers.1/{i}", f"the word {i}", sae="an-sae") for i in range(count)]
    folder.mkdir()
    return given.written(folder, [], said)


def test_latents_whose_explanation_holds_are_kept_with_every_score(tmp_path):
    folder = explanations(tmp_path / "explained")
    segment = scored(
        tmp_path / "segment", _0={"simulation_segment": 0.5}, _1={"simulation_segment": 0.1}
    )  # 2 could not be tested
    judged = scored(tmp_path / "judged", prompt="detect-1", _0={"detection": 0.9}, _2={"detection": 0.8})
    found, dropped = gather(folder, [segment, judged], 0.2)
    assert dropped == 2
    (one,) = found
    assert (one.latent, one.explanation, one.annotator) == (0, "the word 0", "ann")
    assert one.scores == {"simulation_segment": 0.5, "detection": 0.9}
    assert (one.explained, one.simulated) == ("explain-1", "segment-1")
    keep(tmp_path / "kept.jsonl", found)
    assert kept(tmp_path / "kept.jsonl") == found


def test_what_cannot_be_gathered_is_said(tmp_path):
    folder = explanations(tmp_path / "explained")
    judged = scored(tmp_path / "judged", _0={"detection": 0.9})
    with pytest.raises(InvalidInput, match=r"judged: found no simulation_segment of any latent"):
        gather(folder, [judged], 0.2)
    segment = scored(tmp_path / "segment", _0={"simulation_segment": 0.1})
    with pytest.raises(InvalidInput, match=r"explained: found no latent whose explanation scores 0\.2"):
        gather(folder, [segment], 0.2)


def test_heads_keep_to_explained_latents(tmp_path):
    folder = explanations(tmp_path / "explained", 6)
    found, _ = gather(
        folder,
        [scored(tmp_path / "segment", _3={"simulation_segment": 0.5}, _5={"simulation_segment": 0.3})],
        0.2,
    )
    sae = an_sae("model.layers.1")
    allowed = mask([sae], found)
    assert np.flatnonzero(allowed).tolist() == [3, 5]
    rows = [
        Row(
            id=str(i),
            text=str(i),
            lang="en",
            source="x",
            label_domains=("terror",) if i % 2 else (),
            scope=("terror",),
            kind="harmful_text" if i % 2 else "benign",
        )
        for i in range(80)
    ]
    strength = np.random.default_rng(0).random((80, sae.width)).astype(np.float16)
    pooled = PooledTexts(np.ones(80, dtype=np.int64), np.zeros((80, 1), dtype=np.float32), strength[:, allowed])
    for choice in ("terror=10,0,1.0", "terror=0,10,1.0"):
        config = FitConfig(latents_per_head=0, latents_by_weight=0, latents_by_contrast=0, per_domain=(choice,))
        design = Design(rows, pooled, config, allowed)
        assert choose_latents(design, np.ones(80, dtype=bool))["terror"].tolist() == [3, 5]
    stranger = found[0].model_copy(update={"sae": "another"})
    with pytest.raises(InvalidInput, match="explained latents: found some of another, expected SAEs of an-sae"):
        mask([sae], [stranger])
