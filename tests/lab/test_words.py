"""Latents found by a domain's own words, on texts whose tokens are known."""

import json

import numpy as np
import pytest
import torch

from guard.errors import InvalidInput
from guard.lab import labelled, shards
from guard.lab.search import stages
from guard.lab.search.words import shares, telling_tokens
from guard.lab.suite.measure import SaeReport, write_reports
from guard.lab.suite.sae import load_suite, save_rows

POINT = "model.layers.1"
VOTE, SHOT, THE, RARE, NOVEL = 1, 2, 3, 4, 5
SAE = f"{POINT}.batch_topk.w8.l2"


def texts(folder, keys=("token", "piece", POINT)):
    """Own sentences on politics that hold VOTE and on violence that hold SHOT; a foreign source that misuses both."""
    rows, tokens = [], []
    for i in range(40):
        for domain, word in (("politics", VOTE), ("violence", SHOT)):
            rows.append(row(f"{domain}/{i}", f"own_{domain}", (domain,)))
            tokens.append([word, THE, RARE if i == 0 and domain == "politics" else THE])
        rows.append(row(f"novel/{i}", "novels", ()))
        tokens.append([VOTE, NOVEL, NOVEL])
    (folder / "rows.jsonl").write_text("".join(r.model_dump_json() + "\n" for r in rows), encoding="utf-8")
    ids = torch.tensor(tokens).flatten()
    x = torch.nn.functional.one_hot(ids, 8).bfloat16()
    made = shards.ShardSet(
        model="none", fingerprint={}, hook_points=(POINT,), d_model=8, dtype="float32", context=64, seed=0,
        tokens=len(ids), sources=(labelled.digest(rows),), shard_count=1,
    )  # fmt: skip
    shards.describe(folder, made)
    tensors = {"token": ids.int(), "piece": torch.arange(len(rows)).int().repeat_interleave(3), POINT: x}
    shards.write(folder, 0, {key: tensors[key] for key in keys})
    return folder


def row(name, source, domains):
    return labelled.Row(
        id=f"{source}/{name}", text=name, lang="en", source=source, label_domains=domains, scope=labelled.DOMAINS,
        kind="harmful_text" if domains else "benign",
    )  # fmt: skip


def suite(folder):
    """Latents 0 to 3: VOTE; SHOT, and THE as much; THE; RARE. The others are silent."""
    latents = torch.arange(4)
    enc_rows = torch.zeros(4, 8)
    enc_rows[0, VOTE] = enc_rows[1, SHOT] = enc_rows[1, THE] = enc_rows[2, THE] = enc_rows[3, RARE] = 1
    save_rows(folder / SAE, 8, latents, enc_rows=enc_rows, bias=torch.zeros(4), threshold=torch.full((4,), 0.5))
    write_reports(folder, [
        SaeReport(
            name=SAE, hook_point=POINT, architecture="batch_topk", width=8, l0_target=2, tokens_trained=0, fvu=0,
            fvu_typical=0, outlier_share=0, l0=2, dead_share=0, threshold=0.5,
        )
    ])  # fmt: skip
    return folder


@pytest.fixture
def given(tmp_path):
    for name in ("texts", "saes"):
        (tmp_path / name).mkdir()
    return {"saes": suite(tmp_path / "saes"), "texts": texts(tmp_path / "texts"), "out": tmp_path / "words.jsonl"}


def found(given, **options):
    stages.words(**given, **options)
    return {
        line["latent"]: line["domains"]
        for line in map(json.loads, given["out"].read_text().splitlines())
        if (line["sae"], line["hook_point"]) == (SAE, POINT)
    }


def test_a_latent_of_a_domains_words_is_found_wherever_it_fires(given):
    """Though half of the texts in which latent 0 fires are novels, and nothing is telling of a token seen once."""
    assert found(given, per_domain=8) == {0: ["politics"], 1: ["violence"]}


def test_the_first_alone_are_named_and_none_twice(given):
    said = []
    assert found(given, per_domain=1, besides={(SAE, 1)}, progress=lambda *now: said.append(now)) == {0: ["politics"]}
    assert said == [(1, 1)]


def test_texts_without_tokens_are_refused(given, tmp_path):
    (tmp_path / "blind").mkdir()
    blind = texts(tmp_path / "blind", keys=("piece", POINT))
    with pytest.raises(InvalidInput, match="holds no token ids"):
        stages.words(**{**given, "texts": blind}, per_domain=1)
    assert not given["out"].exists()


def test_shares_are_of_activation(given):
    telling = telling_tokens(stages.read_rows(given["texts"]), given["texts"])
    assert {tuple(place) for place in np.argwhere(telling).tolist()} == {(VOTE, 1), (SHOT, 2)}
    (share,) = shares(load_suite(given["saes"]), given["texts"], telling)
    assert share[:2, 1:3].tolist() == [[1, 0], [0, pytest.approx(40 / (40 + 159))]]
