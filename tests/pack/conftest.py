"""A pack small enough to read: d_model 8, two hook points (3 latents and 1 probe, 2 latents and none), 2 heads."""

import hashlib

import numpy as np
import pytest

from guard.pack.loader import HookPointRows, sealed
from guard.pack.manifest import CaseLine, LatentLine, Manifest, read_manifest
from guard.pack.writer import manifest_toml, write_pack

D_MODEL = 8
LATENTS = {"model.layers.3": [5, 0, 15], "model.layers.7": [2, 9]}
PROBES = {"model.layers.3": 1, "model.layers.7": 0}


def _numbers(*shape, start):
    """Different in every place, exact in float32."""
    return (np.arange(np.prod(shape), dtype=np.float32).reshape(shape) + start) / 16


def _manifest():
    hook_points = [
        {
            "name": name,
            "latents": len(latents),
            "probes": PROBES[name],
            "sae_width": 16,
            "sae_architecture": "batch_topk",
            "sae_k": 4.0,
            "sae_tokens": 1000,
            "fvu": 0.25,
            "l0": 3.5,
            "dead_share": 1e-05,
        }
        for name, latents in LATENTS.items()
    ]
    heads = [
        {"domain": "violence", "head": "harm", "bias": -1.5, "temperature": 1.25, "flag_at": 0.5, "block_at": 0.9},
        {"domain": "terror", "head": "presence", "bias": 0.1, "temperature": 1.0, "flag_at": 0.4},
    ]
    return Manifest.model_validate(
        {
            "format": 1,
            "id": "tiny/test",
            "version": "1.0.0",
            "description": 'A "tiny" pack\nfor tests: Δ, 暴力, 🙂',
            "calibrated": True,
            "model": {
                "name": "tiny-model",
                "weights": "a" * 64,
                "tokenizer": "b" * 64,
                "d_model": D_MODEL,
                "dtype": "float32",
            },
            "pooling": {"exponent": 0.5},
            "hook_points": hook_points,
            "heads": heads,
            "sources": [{"name": "made up", "licence": "Apache-2.0", "use": "tests"}],
            "files": {},
        }
    )


def _arguments():
    rows, lines = [], []
    for name, latents in LATENTS.items():
        k, p = len(latents), PROBES[name]
        rows.append(
            HookPointRows(
                name=name,
                latents=np.array(latents, dtype=np.int64),
                enc_rows=_numbers(k, D_MODEL, start=-3),
                bias=_numbers(k, start=-1),
                threshold=_numbers(k, start=1),
                scale=_numbers(k, start=16),
                probe_rows=_numbers(p, D_MODEL, start=2),
                probe_bias=_numbers(p, start=0),
            )
        )
        lines += [
            LatentLine(
                hook_point=name,
                latent=latent,
                domains=("violence",),
                subdomains=(),
                explanation="weapons\u2028in news",  # a line break of Unicode, none of JSONL
                firing_rate=0.01,
                quantiles={"0.99": 2.5, "0.5": 0.75},
                top_tokens=(" gun", "刀"),
            )
            for latent in latents
        ]
    cases = [
        CaseLine(id="case/1", lang="en", text="I will hurt you.", domain="violence", expect="act"),
        CaseLine(id="case/2", lang="en", text="How do I kill a process?", domain="violence", expect="allow"),
        CaseLine(id="case/3", lang="en", text="The attack was in the news.", domain="terror", expect="act"),
    ]
    return {
        "manifest_without_files": _manifest(),
        "rows": rows,
        "head_weights": _numbers(2, 5, start=-4),
        "probe_weights": _numbers(2, 1, start=0),
        "latents": lines,
        "cases": cases,
        "evaluation": {"auroc": {"violence.harm": 0.875}, "rows": 12},
        "readme": "# tiny/test\n",
    }


@pytest.fixture
def tiny():
    """The arguments of write_pack; made anew for each test, so a test may change them."""
    return _arguments()


@pytest.fixture
def folder(tmp_path, tiny):
    """A sound pack on disk."""
    write_pack(tmp_path / "pack", **tiny)
    return tmp_path / "pack"


@pytest.fixture(scope="module")
def lasting_folder(tmp_path_factory):
    """A sound pack for tests that draw many examples and mend it after each."""
    folder = tmp_path_factory.mktemp("lasting") / "pack"
    write_pack(folder, **_arguments())
    return folder


@pytest.fixture(scope="session")
def rewrite():
    """Puts new bytes into a pack's file and lists their hash, so that the checks behind the hash are reached."""

    def change(folder, name, data):
        (folder / name).write_bytes(data)
        manifest = read_manifest((folder / "manifest.toml").read_bytes(), folder)
        files = {**manifest.files, name: hashlib.sha256(data).hexdigest()}
        changed = manifest.model_copy(update={"files": files})
        (folder / "manifest.toml").write_bytes(sealed(manifest_toml(changed).encode()))

    return change


@pytest.fixture
def edit_manifest():
    """Replaces a piece of the manifest's text, and seals it anew."""

    def change(folder, old, new):
        file = folder / "manifest.toml"
        body = file.read_bytes().rpartition(b"# sha256 of all lines above: ")[0].decode()
        assert body.count(old) == 1
        file.write_bytes(sealed(body.replace(old, new).encode()))

    return change
