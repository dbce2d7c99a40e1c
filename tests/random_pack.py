"""A pack of random rows for the default model, in the shape of a real one: what must hold for any pack is tested on it."""

import numpy as np

from guard.pack.loader import HookPointRows
from guard.pack.manifest import CaseLine, LatentLine, Manifest
from guard.pack.writer import write_pack

HOOK_POINTS = ("model.layers.7", "model.layers.13", "model.layers.19")
DOMAINS = ("pornography", "politics", "violence", "terror")
D_MODEL = 576
# On this model a random direction of length 1 reads values with a deviation of 6 to 9: about one row in twenty fires.
THRESHOLD, SCALE, SPREAD = 10.0, 15.0, 7.0


def write_random_pack(folder, fingerprint, *, latents=170, seed=0):
    """`fingerprint` as of guard.reader.weights.fingerprint; `latents` at each hook point. Gives the folder back."""
    rng = np.random.default_rng(seed)
    heads = [(domain, head) for domain in DOMAINS for head in ("harm", "presence")]
    rows = [_rows(rng, name, latents, probes=len(heads)) for name in HOOK_POINTS]
    shape = (len(heads), latents * len(rows))
    head_weights = rng.normal(scale=0.1, size=shape) * (rng.random(shape) < 0.3)  # sparse and signed
    lines = [
        LatentLine(
            hook_point=point.name,
            latent=int(latent),
            domains=(DOMAINS[number % len(DOMAINS)],),
            subdomains=(),
            explanation=f"random direction {number}" if number % 2 else "",  # some are named, some are not
            firing_rate=0.05,
        )
        for point in rows
        for number, latent in enumerate(point.latents)
    ]
    write_pack(
        folder,
        manifest_without_files=_manifest(fingerprint, rows, heads),
        rows=rows,
        head_weights=head_weights.astype(np.float32),
        probe_weights=rng.normal(scale=0.2, size=(len(heads), len(heads) * len(rows))).astype(np.float32),
        latents=lines,
        cases=[CaseLine(id="case/1", lang="en", text="Bake the bread.", domain=DOMAINS[0], expect="allow")],
        evaluation={},
        readme="# random\n",
    )
    return folder


def _rows(rng, name, latents, probes):
    def directions(count, length):
        return (rng.normal(size=(count, D_MODEL)) * length / D_MODEL**0.5).astype(np.float32)

    return HookPointRows(
        name,
        np.sort(rng.choice(16 * D_MODEL, size=latents, replace=False)),
        directions(latents, 1.0),
        rng.normal(size=latents).astype(np.float32),
        np.full(latents, THRESHOLD, np.float32),
        np.full(latents, SCALE, np.float32),
        directions(probes, 1 / SPREAD),
        np.zeros(probes, np.float32),
    )


def _manifest(fingerprint, rows, heads):
    return Manifest.model_validate(
        {
            "format": 1,
            "id": "random",
            "version": "1.0.0",
            "description": "random rows, for tests",
            "calibrated": False,
            "model": {"name": "smollm2-135m-instruct", **fingerprint, "d_model": D_MODEL, "dtype": "float32"},
            "pooling": {"exponent": 0.5, "passage_tokens": 32, "passage_caution": 0.05},
            "hook_points": [
                {
                    "name": point.name,
                    "latents": len(point.latents),
                    "probes": len(point.probe_rows),
                    "sae_width": 16 * D_MODEL,
                    "sae_architecture": "none",
                    "sae_k": 1.0,
                    "sae_tokens": 0,
                    "fvu": 1.0,
                    "l0": 1.0,
                    "dead_share": 0.0,
                }
                for point in rows
            ],
            "heads": [
                {"domain": domain, "head": head, "bias": -0.5, "temperature": 1.5, "flag_at": 0.5, "block_at": 0.9}
                for domain, head in heads
            ],
            "sources": [],
            "files": {},
        }
    )
