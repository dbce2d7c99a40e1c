"""Build: fitted heads and the rows that they need become a pack."""

from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from tempfile import TemporaryDirectory
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
from guard.lab.heads.explained import Explained, numbered
from guard.lab.heads.faithful import faithfulness
from guard.lab.heads.features import Floats, LatentStats
from guard.lab.heads.fit import Design
from guard.lab.heads.operating import operating, prose_flagged
from guard.lab.heads.readme import explanation_figures, pack_readme
from guard.lab.labelled import ANNOTATED, pairs
from guard.lab.suite.config import SuiteConfig
from guard.lab.suite.measure import SaeReport
from guard.lab.suite.sae import FullSae
from guard.pack.cases import replay
from guard.pack.loader import HookPointRows
from guard.pack.manifest import (
    FORMAT,
    CaseLine,
    ExplanationsSection,
    HookPointSection,
    Manifest,
    ModelSection,
    PoolingSection,
    SourceSection,
)
from guard.pack.writer import check_replaceable, write_pack
from guard.reader import weights
from guard.reader.tokens import TextTokenizer
from guard.records import Action, CheckInput

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
    explained: Sequence[Explained],
    version: str,
    out: Path,
    progress: Callable[[int, int], None] = lambda _done, _all: None,
) -> str:
    """Fits the heads that ship and writes the pack to `out`. Returns its hash.

    Raises InvalidInput for an SAE of which a few rows do not say what they say in the whole, and for two at one hook
    point; PackError where `out` holds something else than a pack.
    """
    _check_suite(suite)
    check_replaceable(out)
    heads = fit_all(design, kept)
    rows = np.unique(np.concatenate([h.model.latents for h in heads]))
    harvested = shards.described(texts)
    tokenizer = TextTokenizer(weights.resolve(harvested.model))
    model = Path(harvested.model).resolve().name  # of a folder its name, not where it lay
    points = hook_point_rows(suite, rows, heads, stats, design.centre)
    head_weights, probe_weights = weight_matrices(rows, heads, len(points))
    evaluation = {
        "detection": [f for f in figures if not f["in_chats"]],
        "detection_in_chats": [f for f in figures if f["in_chats"]],
        "standing": [s.model_dump() for s in standings([Figure.model_validate(f) for f in figures])],
        "lookalikes": lookalike_figures(design, heads),
        "lookalikes_in_chats": lookalike_figures(design, heads, in_chats=True),
        "prose": prose_flagged(design, kept, heads),
        "operating": [o.model_dump(mode="json") for o in operating(design, kept, heads)],
        "saes": [report.model_dump(mode="json") for report in reports],
        "training": training.model_dump(mode="json"),
        "fit": vars(design.config),
        "calibration": {"flag_fpr": FLAG_FPR, "block_fpr": BLOCK_FPR, "rows": "left out of the fit, source by source"},
    }
    manifest = Manifest(
        format=FORMAT,
        id=f"{model}/{out.resolve().name}",
        version=version,
        description="Safety latents of BatchTopK SAEs on the residual stream, with dense probe rows.",
        calibrated=True,
        model=ModelSection(
            name=model,
            weights=harvested.fingerprint["weights"],
            tokenizer=harvested.fingerprint["tokenizer"],
            d_model=harvested.d_model,
            dtype=harvested.dtype,
        ),
        pooling=PoolingSection(
            exponent=design.config.exponent,
            power=design.config.power,
            prior_tokens=design.config.prior_tokens,
            passage_tokens=design.config.passage_tokens,
            passage_caution=design.config.passage_caution,
        ),
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
        explanations=_explanations(explained, design.config.least_score),
        files={},
    )
    said = numbered(suite, explained)
    lines = latent_lines(suite, rows, stats, design, heads, pairs(), texts, tokenizer, said)

    evaluation["explanations"] = explanation_figures(lines)

    def write(folder: Path, cases: Sequence[CaseLine]) -> str:
        missed = [case.id for case in cases if case.known == "miss"]
        evaluation["cases"] = {"cases": len(cases), "missed": missed}
        readme = pack_readme(manifest, evaluation)
        return write_pack(folder, manifest, points, head_weights, probe_weights, lines, cases, evaluation, readme)

    cases = [CaseLine.model_validate_json(line) for line in _data("cases.jsonl")]
    with TemporaryDirectory() as scratch:  # what stands at `out` stays there until all is known of the new one
        trial = Path(scratch, out.name)
        write(trial, cases)
        settings = {"pack": str(trial), "reader": {"model": harvested.model}}
        assessor = Assessor.load(load_config(overrides=settings))
        try:
            cases = _replayed(assessor, cases)
            evaluation["faithfulness"] = faithfulness(assessor, design.rows, progress=progress).model_dump()
        finally:
            assessor.close()
    return write(out, cases)


def _check_suite(suite: Sequence[FullSae]) -> None:
    if inexact := [sae.name for sae in suite if not sae.subset_exact]:
        raise InvalidInput(f"{inexact[0]}: found topk, expected batch_topk or jumprelu: a pack holds a few rows alone")
    for sae in suite:
        if (same := [s.name for s in suite if s.hook_point == sae.hook_point]) != [sae.name]:
            raise InvalidInput(f"{', '.join(same)}: found {len(same)} SAEs of one hook point, expected one")


def _replayed(assessor: Assessor, cases: Sequence[CaseLine]) -> list[CaseLine]:
    """The cases, marked where the finished pack misses one: shipped as what it is known to get wrong."""

    def act(text: str) -> dict[str, Action]:
        verdict = assessor.check(CheckInput(prompt=text))
        return {d.domain: d.action for phase in verdict.phases for d in phase.domains}

    results = replay(cases, act)
    return [r.case.model_copy(update={"known": "pass" if r.passed else "miss"}) for r in results]


def lookalike_figures(
    design: Design, heads: Sequence["CalibratedHead"], *, in_chats: bool = False
) -> dict[str, Any] | None:
    """Harmless look-alikes that the finished heads would flag; None where there are none."""
    held = np.flatnonzero(design.lookalike & (design.in_chat == in_chats))
    if not len(held):
        return None
    flagged: dict[str, list[str]] = {}
    for head in heads:
        if head.section.flag_at is None:
            continue
        whole = np.full(len(design.rows), np.nan)
        whole[held] = head.model.logits(design, held)
        logits = design.severest(whole, head.model.passage_logits(design, held))[held]
        logits += head.section.bias - head.model.bias
        scores = 1 / (1 + np.exp(-logits / head.section.temperature))
        for place in np.flatnonzero(scores >= head.section.flag_at):
            flagged.setdefault(design.rows[held[place]].id, []).append(head.section.name)
    return {"texts": len(held), "flagged": len(flagged), "share": round(len(flagged) / len(held), 4), "which": flagged}


def _explanations(explained: Sequence[Explained], least_score: float) -> ExplanationsSection | None:
    if not explained:
        return None

    def told(names: set[str]) -> str:
        return ", ".join(sorted(names))

    return ExplanationsSection(
        annotator=told({e.annotator for e in explained}),
        explained=told({e.explained for e in explained}),
        simulated=told({e.simulated for e in explained}),
        least_score=least_score,
    )


def _sources(design: Design, licences: dict[str, str]) -> tuple[SourceSection, ...]:
    fitted_on = set(design.source[design.usable].tolist())
    fitted = [
        SourceSection(
            name=name,
            licence=licences.get(name, "not stated"),
            use=_use(name) if name in fitted_on else "judging the heads",
        )
        for name in sorted({row.source for row, held in zip(design.rows, design.lookalike, strict=True) if not held})
        if not name.startswith("own_")
    ]
    corpora = [SourceSection(name=n, licence=x, use="SAEs") for n, x in sorted(licences.items()) if n in _CORPORA]
    return (
        *fitted,
        *corpora,
        SourceSection(name="own sentences", licence=_OWN_LICENCE, use="SAEs, heads, contrast, cases"),
    )


def _use(source: str) -> str:
    return "heads, by labels of a language model" if source.startswith(ANNOTATED) else "heads"


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
    suite: Sequence[FullSae],
    rows: NDArray[np.int64],
    heads: Sequence[CalibratedHead],
    stats: LatentStats,
    centre: Floats,
) -> list[HookPointRows]:
    """The kept latents (numbered through the suite) and the heads' dense parts, by hook point.

    `centre [D]`: what probes read as nothing (`Design.centre`).
    """
    result = []
    offset = 0
    d_model = suite[0].enc_rows.shape[1]
    for number, sae in enumerate(suite):
        local = rows[(rows >= offset) & (rows < offset + sae.width)] - offset
        place = slice(number * d_model, (number + 1) * d_model)
        picked = torch.from_numpy(local)
        probe_rows = np.stack([h.model.dense_weights[place] for h in heads])
        result.append(
            HookPointRows(
                name=sae.hook_point,
                latents=local,
                enc_rows=sae.enc_rows[picked].contiguous().numpy(),
                bias=sae.bias[picked].numpy(),
                threshold=sae.threshold[picked].numpy(),
                scale=stats.scale[offset + local],
                probe_rows=probe_rows.astype(np.float32),
                probe_bias=(-probe_rows @ centre[place]).astype(np.float32),
            )
        )
        offset += sae.width
    return result
