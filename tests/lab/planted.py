"""A suite whose truth is known: SAEs that read activations off one by one, and texts with concepts planted in them."""

import json

import numpy as np
import torch
from safetensors.torch import save_file

from guard.lab import labelled, shards
from guard.lab.suite.config import Grid, SuiteConfig, write_config

WIDTH = 48
POINTS = ("model.layers.1", "model.layers.3")
SUBDOMAIN_LATENT = 4  # violence/insult alone
TOKEN_LATENT = 5  # fires on token 77, which texts on terror hold more often, but either side of a pair alike
TOKEN = 77
CLEAN, NOISY = "b8", "a4"  # the noisy one fires ten times as often, on nothing


def made_up_rows(sources=("left", "right", "third", "fourth"), texts=40):
    """Sources that label harm, half of their texts harmful."""
    return [
        labelled.Row(
            id=f"{source}/{domain}/{i}",
            text=f"{source} {i} {domain}",
            lang="en",
            source=source,
            label_domains=(domain,) if i % 2 else (),
            scope=(domain,),
            kind="harmful_text" if i % 2 else "benign",
        )
        for source in sources
        for domain in labelled.DOMAINS
        for i in range(texts)
    ]


def all_rows():
    return [*made_up_rows(), *(row for row in labelled.own_rows() if row.source == "own_pairs")]


def activations(rows, tokens, seed):
    """`x [N * tokens, WIDTH]`: latent k fires where x > 0.5; and the token ids."""
    rng = np.random.default_rng(seed)
    x = np.zeros((len(rows), tokens, WIDTH), dtype=np.float32)
    ids = rng.integers(100, 200, size=(len(rows), tokens))
    shared = {}
    for i, row in enumerate(rows):
        x[i, :, 8:] = rng.random((tokens, WIDTH - 8)) < 0.01
        for d in row.label_domains:
            x[i, :, labelled.DOMAINS.index(d)] = rng.random(tokens) < 0.4
        if row.id.startswith("violence/insult/") and row.label_domains:
            x[i, :, SUBDOMAIN_LATENT] = 1
        if row.source == "own_pairs":  # the token stands on both sides of a pair, or on none
            there = shared.setdefault(row.id.rpartition("/")[0], rng.random() < 0.3)
        else:
            there = rng.random() < (0.9 if "terror" in row.label_domains else 0.2)
        if there:
            ids[i, 0] = TOKEN
    x[:, :, TOKEN_LATENT] = ids == TOKEN
    return torch.from_numpy(x.reshape(-1, WIDTH)), torch.from_numpy(ids.reshape(-1)).int()


def write_texts(out, *, with_tokens=True, tokens=4):
    rows = all_rows()
    made = shards.ShardSet(
        model="none",
        fingerprint={},
        hook_points=POINTS,
        d_model=WIDTH,
        dtype="float32",
        context=64,
        seed=0,
        tokens=tokens * len(rows),
        sources=(labelled.digest(rows),),
        shard_count=1,
    )
    shards.describe(out, made)
    (out / "rows.jsonl").write_text("".join(r.model_dump_json() + "\n" for r in rows), encoding="utf-8")
    tensors = {"piece": torch.arange(len(rows), dtype=torch.int32).repeat_interleave(tokens)}
    for seed, point in enumerate(POINTS):
        x, ids = activations(rows, tokens, seed=0)
        noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed))
        tensors[point] = torch.where(x > 0.5, x, 0.4 * (noise < 0.1)).bfloat16()
    if with_tokens:
        tensors["token"] = ids
    shards.write(out, 0, tensors)
    return out


def write_suite(out):
    """At each hook point an SAE with a threshold of 0.5, and a noisy one whose threshold is 0.3."""
    reports = []
    for point in POINTS:
        for kind, l0, threshold in ((CLEAN, 8, 0.5), (NOISY, 4, 0.3)):
            name = f"{point}.{kind}"
            (out / name).mkdir(parents=True)
            config = {"architecture": "jumprelu", "apply_b_dec_to_input": False}
            (out / name / "cfg.json").write_text(json.dumps(config))
            eye, zero = torch.eye(WIDTH), torch.zeros(WIDTH)
            save_file(
                {
                    "W_enc": eye,
                    "W_dec": eye.clone(),
                    "b_enc": zero,
                    "b_dec": zero.clone(),
                    "threshold": zero + threshold,
                },
                out / name / "sae_weights.safetensors",
            )
            scale = np.ones(WIDTH, dtype=np.float32)
            np.savez(out / name / "stats.npz", firing_rate=scale / 8, scale=scale)
            reports.append(
                {
                    "name": name,
                    "hook_point": point,
                    "architecture": "batch_topk",
                    "width": WIDTH,
                    "l0_target": l0,
                    "tokens_trained": 1000,
                    "fvu": 0.2 if kind == CLEAN else 0.1,
                    "fvu_typical": 0.2 if kind == CLEAN else 0.1,
                    "outlier_share": 0.0,
                    "l0": 1.0 if kind == CLEAN else 5.0,
                    "dead_share": 0.0,
                    "threshold": threshold,
                }
            )
    (out / "report.json").write_text(json.dumps(reports))
    write_config(out / "suite.toml", SuiteConfig(grid=(Grid(hook_points=POINTS, widths=(WIDTH,), l0=(8, 4)),)))
    return out
