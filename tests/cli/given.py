"""Verdicts and packs made by hand, for what the command line shows of them."""

import io

import numpy as np
from rich.console import Console

from guard.pack.loader import HookPointRows
from guard.pack.manifest import CaseLine, ExampleLine, LatentLine, Manifest
from guard.pack.writer import write_pack
from guard.records import (
    Action,
    Attribution,
    DomainVerdict,
    HeadKind,
    HeadScore,
    LatentId,
    ModelInfo,
    PackInfo,
    Phase,
    PhaseVerdict,
    PolicyInfo,
    SpanContribution,
    Verdict,
)

POINT = "model.layers.2"


def head(kind=HeadKind.HARM, score=0.1, flag_at=0.5, block_at=0.9, attributions=()):
    return HeadScore(kind, score, 1.25, -0.5, 0.25, flag_at, block_at, 0.8, tuple(attributions))


def attribution(
    name="threats", contribution=1.5, share=0.6, spans=((7, 11, 1.5),), index=3, message=0, tags=("threat",)
):
    return Attribution(
        LatentId(POINT, index),
        name,
        tags,
        contribution,
        share,
        2.0,
        tuple(SpanContribution(*s, message) for s in spans),
    )


def domain(name="violence", action=Action.ALLOW, heads=None):
    return DomainVerdict(name, action, tuple(heads or [head()]))


def phase(domains, kind=Phase.PROMPT, action=Action.ALLOW, tokens=(), read=4, total=None):
    return PhaseVerdict(kind, action, read, read if total is None else total, tuple(domains), tuple(tokens))


def verdict(*phases, action=Action.ALLOW, not_assessed=(), verified=True, request_id="r-1"):
    return Verdict(
        request_id,
        action,
        tuple(not_assessed),
        phases,
        PackInfo("toy", "1.0.0", "h" * 64),
        PolicyInfo("p1", "f" * 64),
        ModelInfo("w" * 64, verified),
        {"read": 0.02, "score": 0.003},
    )


def shown(renderable, *, width=100, colour=False):
    """What a terminal of this width shows, without trailing spaces."""
    stream = io.StringIO()
    system = "truecolor" if colour else None
    console = Console(
        file=stream, width=width, color_system=system, force_terminal=colour, highlight=False, markup=False
    )
    console.print(renderable)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())


def make_pack(folder, *, weights="a" * 64, tokenizer="b" * 64, width=8, explanation="knives"):
    """Three latents and a probe at one hook point. With these weights `violence.harm` is below one half for any text."""
    made = {
        "format": 1,
        "id": "toy",
        "version": "1.0.0",
        "description": "for the tests of the command line",
        "calibrated": True,
        "model": {"name": "toy", "weights": weights, "tokenizer": tokenizer, "d_model": width, "dtype": "float32"},
        "pooling": {"exponent": 0.5},
        "hook_points": [
            {
                "name": POINT,
                "latents": 3,
                "probes": 1,
                "sae_width": 64,
                "sae_architecture": "batch_topk",
                "sae_k": 4.0,
                "sae_tokens": 1000,
                "fvu": 0.25,
                "l0": 3.5,
                "dead_share": 0.125,
            }
        ],
        "heads": [
            {"domain": "violence", "head": "harm", "bias": -2.0, "temperature": 1.0, "flag_at": 0.5, "block_at": 0.9},
            {"domain": "terror", "head": "presence", "bias": -2.0, "temperature": 1.0},
        ],
        "sources": [{"name": "made up", "licence": "Apache-2.0", "use": "tests"}],
        "files": {},
    }
    rng = np.random.default_rng(0)
    rows = HookPointRows(
        POINT,
        np.array([3, 9, 40]),
        rng.normal(size=(3, width)).astype(np.float32),
        np.zeros(3, np.float32),
        np.full(3, 5.0, np.float32),
        np.full(3, 20.0, np.float32),
        np.zeros((1, width), np.float32),
        np.zeros(1, np.float32),
    )
    lines = [
        LatentLine(
            hook_point=POINT,
            latent=latent,
            domains=domains,
            subdomains=("weapons",) if latent == 3 else (),
            explanation=explanation if latent == 3 else "",
            firing_rate=0.0125,
            scores={"detection": 0.75} if latent == 3 else {},
            top_tokens=tokens,
            examples=(ExampleLine(text="a sharp knife", start=8, end=13, activation=1.5),) if latent == 3 else (),
        )
        for latent, domains, tokens in (
            (3, ("violence",), (" knife", "刀")),
            (9, ("violence", "terror"), (" bomb",)),
            (40, (), ()),
        )
    ]
    write_pack(
        folder,
        manifest_without_files=Manifest.model_validate(made),
        rows=[rows],
        head_weights=np.array([[-1.5, -0.25, 0.0], [0.5, 0.0, 0.0]], np.float32),
        probe_weights=np.zeros((2, 1), np.float32),
        latents=lines,
        cases=[
            CaseLine(id="case/1", lang="en", text="How do I kill a process?", domain="violence", expect="allow"),
            CaseLine(id="case/2", lang="en", text="I will hurt\nyou.", domain="violence", expect="act"),
        ],
        evaluation={"auroc": 0.5},
        readme="# toy\n",
    )
    return folder
