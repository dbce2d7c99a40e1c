"""Activations, SAEs, labelled rows and held-out logits made by hand."""

import numpy as np
import torch

from guard.lab import shards
from guard.lab.heads.evaluate import OutOfFold
from guard.lab.heads.features import PooledTexts
from guard.lab.heads.fit import Design, FitConfig
from guard.lab.labelled import DOMAINS, Row
from guard.lab.search.rank import CurvePoint, site

POINTS = ("model.layers.1", "model.layers.3")


def synthetic_shards(folder, *, count=6, tokens=256, d_model=16, features=32, hook_points=POINTS, seed=0):
    """A harvest of sparse sums of unknown directions, off centre, as residual streams are."""
    generator = torch.Generator().manual_seed(seed)
    made = shards.ShardSet(
        model="none",
        fingerprint={},
        hook_points=hook_points,
        d_model=d_model,
        dtype="float32",
        context=64,
        seed=seed,
        tokens=count * tokens,
        sources=("synthetic",),
        shard_count=count,
    )
    shards.describe(folder, made)
    directions = {p: torch.randn(features, d_model, generator=generator) for p in hook_points}
    for index in range(count):
        tensors = {"piece": torch.arange(tokens, dtype=torch.int32) // 8 + index * tokens // 8}
        for point in hook_points:
            codes = torch.rand(tokens, features, generator=generator)
            codes = codes * (torch.rand(tokens, features, generator=generator) < 3 / features)
            tensors[point] = (3 * codes @ directions[point] + 1.5).bfloat16()
        shards.write(folder, index, tensors)
    return folder


def point(layer, l0, i_cdf, *, where="", architecture="batch_topk", width=64, **more):
    """A point of a suite's curve."""
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
            "tokens_trained": 1000,
            "l0": l0 + 0.5,
            "fvu": 1 / l0,
            "fvu_typical": 1 / l0,
            "i_cdf": i_cdf,
            "i_cdf_reversed": 0.01,
            "i_cdf_shuffled": 0.02,
            "i_cdf_excess": 0.3,
            "i_cdf_excess_null": 0.1,
            "l0_at": {"0.05": 9, "0.1": 8, "0.2": 7, "0.3": 6, "0.5": 5},
            "p_best": i_cdf,
        }
        | more
    )


# Few latents are chosen, and quickly.
SMALL_FIT = {
    "latents_per_head": 4,
    "latents_by_weight": 0,
    "latents_by_contrast": 0,
    "per_domain": (),
    "iterations": 20,
}


def labelled_row(source, number, *, harmful=False, **marks):
    """A text of a source that can decide every domain; a harmful one is harmful in all of them."""
    return Row(
        id=f"{source}/{number}",
        text=f"{source} {number}",
        lang="en",
        source=source,
        label_domains=DOMAINS if harmful else (),
        scope=DOMAINS,
        kind="harmful_text" if harmful else "benign",
        **marks,
    )


def design_of(rows, strength=None, mean=None, *, allowed=None, passages=None, **config):
    """The rows as heads are fitted to them; without `strength [N, K]` and `mean [N, D]` to be judged on alone."""
    count = len(rows)
    strength = np.zeros((count, 1)) if strength is None else strength
    mean = np.zeros((count, 1)) if mean is None else mean
    strength = strength if allowed is None else strength[:, allowed]
    pooled = PooledTexts(np.ones(count, dtype=np.int64), mean.astype(np.float32), strength.astype(np.float16))
    return Design(rows, pooled, FitConfig(**(SMALL_FIT | config)), allowed, passages)


def out_of_fold(latents, probe, passages=0):
    """Held-out logits by head of the two columns that a combined head mixes; those of `passages` are unknown."""
    columns = {"latents": latents, "probe": probe}
    return OutOfFold(
        {(head, name): np.asarray(of[head], dtype=float) for name, of in columns.items() for head in of},
        {(head, name): np.full(passages, np.nan) for name, of in columns.items() for head in of},
    )
