"""Build: fitted heads and the rows that they need become a pack."""

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from guard.assessor import Assessor
from guard.config import load_config
from guard.errors import InvalidInput
from guard.lab import shards
from guard.lab.heads.calibrate import BLOCK_FPR, FLAG_FPR, CalibratedHead, fit_all, weight_matrices
from guard.lab.heads.describe import latent_lines
from guard.lab.heads.evaluate import Figure, OutOfFold, standings
from guard.lab.heads.features import LatentStats
from guard.lab.heads.fit import Design
from guard.lab.labelled import pairs
from guard.lab.suite.config import SuiteConfig
from guard.lab.suite.measure import SaeReport
from guard.lab.suite.sae import FullSae
from guard.pack.cases import replay
from guard.pack.loader import HookPointRows
from guard.pack.manifest import (
    FORMAT,
    CaseLine,
    HookPointSection,
    Manifest,
    ModelSection,
    PoolingSection,
    SourceSection,
)
from guard.pack.writer import write_pack
from guard.reader import weights
from guard.reader.tokens import TextTokenizer
from guard.records import Action, CheckInput

PACK_VERSION = "0.2.0"

# What the project's own sentences are listed as among the sources.
_OWN_LICENCE = "Apache-2.0 (written for this project)"


def build_pack(
    *,
    suite: Sequence[FullSae],
    reports: Sequence[SaeReport],
    training: SuiteConfig,
    stats: LatentStats,
    design: Design,
    kept: OutOfFold,
    figures: Sequence[dict[str, Any]],
    texts: Path,
    licences: dict[str, str],
    out: Path,
) -> str:
    """Fits the heads that ship and writes the pack to `out`. Returns its hash.

    Raises InvalidInput for an SAE of which a few rows do not say what they say in the whole, and for two at one hook
    point.
    """
    _check_suite(suite)
    heads = fit_all(design, kept)
    rows = np.unique(np.concatenate([h.model.latents for h in heads]))
    harvested = shards.described(texts)
    tokenizer = TextTokenizer(weights.resolve(harvested.model))
    points = hook_point_rows(suite, rows, heads, stats)
    head_weights, probe_weights = weight_matrices(rows, heads, len(points))
    lookalikes = lookalike_figures(design, heads)
    evaluation = {
        "detection": list(figures),
        "standing": [s.model_dump() for s in standings([Figure.model_validate(f) for f in figures])],
        "lookalikes": lookalikes,
        "saes": [report.model_dump(mode="json") for report in reports],
        "training": training.model_dump(mode="json"),
        "fit": vars(design.config),
        "calibration": {"flag_fpr": FLAG_FPR, "block_fpr": BLOCK_FPR, "rows": "left out of the fit, source by source"},
    }
    manifest = Manifest(
        format=FORMAT,
        id=f"{harvested.model}/{out.name}",
        version=PACK_VERSION,
        description="Safety latents of BatchTopK SAEs on the residual stream, with dense probe rows.",
        calibrated=True,
        model=ModelSection(
            name=harvested.model,
            weights=harvested.fingerprint["weights"],
            tokenizer=harvested.fingerprint["tokenizer"],
            d_model=harvested.d_model,
            dtype=harvested.dtype,
        ),
        pooling=PoolingSection(exponent=design.config.exponent, power=design.config.power),
        hook_points=tuple(
            HookPointSection(
                name=point.name,
                latents=len(point.latents),
                probes=len(point.probe_rows),
                sae_width=report.width,
                sae_architecture="jumprelu",
                sae_k=report.l0_target,
                sae_tokens=report.tokens_trained,
                fvu=round(report.fvu_typical, 5),
                l0=round(report.l0, 3),
                dead_share=round(report.dead_share, 5),
            )
            for point, report in zip(points, reports, strict=True)
        ),
        heads=tuple(h.section for h in heads),
        sources=_sources(design, licences),
        files={},
    )
    lines = latent_lines(suite, rows, stats, design, heads, pairs(), texts, tokenizer)

    def write(cases: Sequence[CaseLine]) -> str:
        missed = [case.id for case in cases if case.known == "miss"]
        evaluation["cases"] = {"cases": len(cases), "missed": missed}
        readme = pack_readme(manifest, evaluation)
        return write_pack(out, manifest, points, head_weights, probe_weights, lines, cases, evaluation, readme)

    cases = [CaseLine.model_validate_json(line) for line in _data("cases.jsonl")]
    write(cases)
    return write(_replayed(out, cases))


def _check_suite(suite: Sequence[FullSae]) -> None:
    if inexact := [sae.name for sae in suite if not sae.subset_exact]:
        raise InvalidInput(f"{inexact[0]}: found topk, expected batch_topk or jumprelu: a pack holds a few rows alone")
    for sae in suite:
        if (same := [s.name for s in suite if s.hook_point == sae.hook_point]) != [sae.name]:
            raise InvalidInput(f"{', '.join(same)}: found {len(same)} SAEs of one hook point, expected one")


def _replayed(pack: Path, cases: Sequence[CaseLine]) -> list[CaseLine]:
    """The cases, marked where the finished pack misses one: shipped as what it is known to get wrong."""
    assessor = Assessor.load(load_config(overrides={"pack": str(pack)}))
    try:

        def act(text: str) -> dict[str, Action]:
            verdict = assessor.check(CheckInput(prompt=text))
            return {d.domain: d.action for phase in verdict.phases for d in phase.domains}

        results = replay(cases, act)
    finally:
        assessor.close()
    return [r.case.model_copy(update={"known": "pass" if r.passed else "miss"}) for r in results]


def lookalike_figures(design: Design, heads: Sequence["CalibratedHead"]) -> dict[str, Any]:
    """Harmless look-alikes, used nowhere else, that the finished heads would flag."""
    held = np.flatnonzero([row.source.startswith("lookalike") for row in design.rows])
    flagged: dict[str, list[str]] = {}
    for head in heads:
        if head.section.flag_at is None:
            continue
        logits = head.model.logits(design, held) + (head.section.bias - head.model.bias)
        scores = 1 / (1 + np.exp(-logits / head.section.temperature))
        for place in np.flatnonzero(scores >= head.section.flag_at):
            flagged.setdefault(design.rows[held[place]].id, []).append(head.section.name)
    return {"texts": len(held), "flagged": len(flagged), "share": round(len(flagged) / len(held), 4), "which": flagged}


def pack_readme(manifest: Manifest, evaluation: dict[str, Any]) -> str:
    """The pack's README: what it is, what it was made from, and its figures."""
    lines = [
        f"# {manifest.id} {manifest.version}",
        "",
        f"{manifest.description} Generated by `guard lab build`; every figure stands in `evaluation.json`.",
        "",
        "| hook point | latents kept | of | FVU | L0 | dead | tokens trained |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {p.name} | {p.latents} | {p.sae_width} | {p.fvu:.3f} | {p.l0:.1f} | {p.dead_share:.1%} "
            f"| {p.sae_tokens:,} |"
            for p in manifest.hook_points
        ),
        "",
        "Detection on sources that the fit had not seen (AUROC):",
        "",
        "| head | source | positives / negatives | TF-IDF | probe | latents | combined |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {f['domain']}.{f['head']} | {f['source']}{' (weak negatives)' if f['weak_negatives'] else ''} "
            f"| {f['positives']} / {f['negatives']} | "
            + " | ".join(f"{f['auroc'][c]:.3f}" for c in ("tfidf", "probe", "latents", "combined"))
            + " |"
            for f in evaluation["detection"]
        ),
        "",
        *(
            f"Combined against {s['baseline']}, source by source: ahead or level in {s['ahead']} of {s['judged']}; "
            f"behind by more than chance (95%) in {len(s['behind_beyond_chance'])}."
            for s in evaluation["standing"]
        ),
        "",
        f"Harmless look-alikes flagged: {evaluation['lookalikes']['flagged']} of {evaluation['lookalikes']['texts']}.",
        "",
        f"Own cases: {evaluation['cases']['cases']}, of which {len(evaluation['cases']['missed'])} are known misses.",
        "",
        "Made from (no text of these sources is in the pack):",
        "",
        *(f"- {s.name}: {s.licence} ({s.use})" for s in manifest.sources),
        "",
    ]
    return "\n".join(lines)


def _sources(design: Design, licences: dict[str, str]) -> tuple[SourceSection, ...]:
    names = sorted({row.source for row in design.rows if not row.own and not row.source.startswith("lookalike")})
    fitted = [SourceSection(name=n, licence=licences.get(n, "not stated"), use="heads") for n in names]
    corpora = [SourceSection(name=n, licence=x, use="SAEs") for n, x in sorted(licences.items()) if n in _CORPORA]
    return (*fitted, *corpora, SourceSection(name="own sentences", licence=_OWN_LICENCE, use="heads, contrast, cases"))


# The corpora that the shipped SAEs were trained on.
_CORPORA = frozenset(
    {
        "instructions",
        "literature",
        "news_misc",
        "political_speech",
        "reviews_webtext",
        "social_media",
        "usenet_20news",
        "wiki_en_domains",
        "wiki_en_general",
        "wiki_zh",
    }
)


def _data(name: str) -> list[str]:
    return resources.files("guard.lab").joinpath("data", name).read_text(encoding="utf-8").splitlines()


def hook_point_rows(
    suite: Sequence[FullSae], rows: NDArray[np.int64], heads: Sequence[CalibratedHead], stats: LatentStats
) -> list[HookPointRows]:
    """The kept latents (numbered through the suite) and the heads' dense parts, by hook point."""
    result = []
    offset = 0
    d_model = suite[0].enc_rows.shape[1]
    for number, sae in enumerate(suite):
        local = rows[(rows >= offset) & (rows < offset + sae.width)] - offset
        place = slice(number * d_model, (number + 1) * d_model)
        picked = torch.from_numpy(local)
        result.append(
            HookPointRows(
                name=sae.hook_point,
                latents=local,
                enc_rows=sae.enc_rows[picked].contiguous().numpy(),
                bias=sae.bias[picked].numpy(),
                threshold=sae.threshold[picked].numpy(),
                scale=stats.scale[offset + local],
                probe_rows=np.stack([h.model.dense_weights[place] for h in heads]).astype(np.float32),
                probe_bias=np.zeros(len(heads), dtype=np.float32),
            )
        )
        offset += sae.width
    return result
