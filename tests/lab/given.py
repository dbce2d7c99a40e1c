"""Activations and SAEs made by hand."""

import torch

from guard.lab import shards

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
