"""Build: fitted heads and the rows that they need become a pack."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from guard.assessor import Assessor
from guard.config import load_config
from guard.lab import shards
from guard.lab.evaluate import OutOfFold, mixed, probe_share
from guard.lab.features import LatentStats
from guard.lab.fit import HEADS, Design, Linear, calibrate, choose_latents, contrast_scores, fit_head, mix
from guard.lab.labelled import Pair, Row, pairs
from guard.lab.sae import FullSae
from guard.pack.cases import replay
from guard.pack.loader import HookPointRows
from guard.pack.manifest import (
    FORMAT,
    CaseLine,
    ExampleLine,
    HeadSection,
    HookPointSection,
    LatentLine,
    Manifest,
    ModelSection,
    PoolingSection,
    SourceSection,
)
from guard.pack.writer import write_pack
from guard.reader import weights
from guard.reader.tokens import TextTokenizer
from guard.records import Action, CheckInput, HeadKind

_EXAMPLES = 6
_TOP_TOKENS = 8

# Flag and block where these shares of harmless rows, weighted by source, would be hit; presence alone never blocks.
FLAG_FPR = 0.02
BLOCK_FPR = 0.002


# A latent is tagged where it fires on this share more of the texts with a concept than of those without.
DOMAIN_CONTRAST = 0.1
SUBDOMAIN_CONTRAST = 0.25

PACK_VERSION = "0.1.0"

# What the project's own sentences are listed as among the sources.
_OWN_LICENCE = "Apache-2.0 (written for this project)"


def build_pack(
    *,
    suite: Sequence[FullSae],
    reports: Sequence[dict[str, Any]],
    training: dict[str, Any],
    stats: LatentStats,
    design: Design,
    kept: OutOfFold,
    figures: Sequence[dict[str, Any]],
    texts: Path,
    licences: dict[str, str],
    out: Path,
) -> str:
    """Fits the heads that ship and writes the pack to `out`. Returns its hash."""
    heads = fit_all(design, kept)
    rows = np.unique(np.concatenate([h.model.latents for h in heads]))
    harvested = shards.described(texts)
    tokenizer = TextTokenizer(weights.resolve(harvested.model))
    points = hook_point_rows(suite, rows, heads, stats)
    head_weights, probe_weights = weight_matrices(rows, heads, len(points))
    lookalikes = lookalike_figures(design, heads)
    evaluation = {
        "detection": list(figures),
        "lookalikes": lookalikes,
        "saes": list(reports),
        "training": training,
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
        pooling=PoolingSection(
            activation=design.config.pooling, exponent=design.config.exponent, power=design.config.power
        ),
        hook_points=tuple(
            HookPointSection(
                name=point.name,
                latents=len(point.latents),
                probes=len(point.probe_rows),
                sae_width=report["width"],
                sae_architecture="jumprelu",
                sae_k=float(training.get("k", 0)),
                sae_tokens=report["tokens_trained"],
                fvu=round(report["fvu_typical"], 5),
                l0=round(report["l0"], 3),
                dead_share=round(report["dead_share"], 5),
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


@dataclass(frozen=True)
class CalibratedHead:
    section: HeadSection
    model: Linear


def fit_all(design: Design, kept: OutOfFold) -> list[CalibratedHead]:
    """The heads that ship: fitted on all rows but the look-alikes, calibrated on rows that their folds had not seen."""
    usable = ~np.array([row.source.startswith("lookalike") for row in design.rows])
    chosen = choose_latents(design, usable)
    heads = []
    for head in HEADS:
        share = probe_share(design, head, kept)
        latents = fit_head(design, head, usable, chosen[head[0]], "latents")
        model = mix(latents, fit_head(design, head, usable, chosen[head[0]], "probe"), share)
        logits, y = mixed(kept, head, share), design.targets[head]
        seen = ~np.isnan(logits) & (y >= 0)
        weights = _source_weights(design, y, seen)
        temperature, shift = calibrate(logits[seen], y[seen], weights[seen])
        scores = 1 / (1 + np.exp(-(logits + shift) / temperature))
        negative = seen & (y == 0) & ~design.weak
        flag_at = _cut(scores[negative], weights[negative], FLAG_FPR)
        block_at = _cut(scores[negative], weights[negative], BLOCK_FPR)
        flags = head[1] is HeadKind.HARM or head[0] == "politics"  # politics has no harm head: presence speaks for it
        heads.append(
            CalibratedHead(
                HeadSection(
                    domain=head[0],
                    head=head[1],
                    bias=model.bias + shift,
                    temperature=temperature,
                    flag_at=round(flag_at, 4) if flags else None,
                    block_at=round(max(block_at, flag_at), 4) if head[1] is HeadKind.HARM else None,
                ),
                model,
            )
        )
    return heads


def _source_weights(design: Design, y: NDArray[np.int8], seen: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Every source counts by the root of its size, at its own share of positives."""
    weights = np.zeros(len(y))
    for source in np.unique(design.source[seen]):
        part = seen & (design.source == source)
        weights[part] = 1 / np.sqrt(part.sum())
    return weights * np.where(design.weak, 0.3, 1.0)


def _cut(scores: NDArray[np.float64], weights: NDArray[np.float64], share: float) -> float:
    """The score that `share` of the weight lies above."""
    order = np.argsort(-scores)
    behind = np.cumsum(weights[order]) / weights.sum()
    return float(scores[order][np.searchsorted(behind, share)])


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


def weight_matrices(
    rows: NDArray[np.int64], heads: Sequence[CalibratedHead], hook_points: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """`head_weights [H, K]`, and `probe_weights [H, P]`: a head reads its own probe row at every hook point."""
    head_weights = np.zeros((len(heads), len(rows)), dtype=np.float32)
    for place, head in enumerate(heads):
        head_weights[place, np.searchsorted(rows, head.model.latents)] = head.model.latent_weights
    probe_weights = np.tile(np.eye(len(heads), dtype=np.float32), (1, hook_points))
    return head_weights, probe_weights


def latent_lines(
    suite: Sequence[FullSae],
    rows: NDArray[np.int64],
    stats: LatentStats,
    design: Design,
    heads: Sequence[CalibratedHead],
    pairs: Sequence[Pair],
    texts: Path,
    tokenizer: TextTokenizer,
) -> list[LatentLine]:
    """What is known of each kept latent: tags, rates, and examples from the project's own texts."""
    usable = ~np.array([row.source.startswith("lookalike") for row in design.rows])
    by_domain = contrast_scores(design, usable)
    by_subdomain = _subdomain_scores(design, pairs)
    favoured = _favoured_domain(rows, heads)
    examples = _examples(suite, rows, stats, design.rows, texts, tokenizer)
    frequency = Counter(
        _plain(row.text[start:end]) for row in design.rows if row.own for start, end in tokenizer.text(row.text).spans
    )
    owner = np.searchsorted(np.cumsum([0, *(sae.width for sae in suite)]), rows, side="right") - 1
    starts = np.cumsum([0, *(sae.width for sae in suite)])
    lines = []
    for row, number in zip(rows, owner, strict=True):
        found = sorted(examples.get(int(row), []), key=lambda e: -e[1].activation)
        lines.append(
            LatentLine(
                hook_point=suite[number].hook_point,
                latent=int(row - starts[number]),
                domains=_domains(int(row), by_domain, favoured),
                subdomains=tuple(name for name, scores in by_subdomain.items() if scores[row] >= SUBDOMAIN_CONTRAST),
                scores={f"contrast.{d}": round(float(scores[row]), 4) for d, scores in by_domain.items()},
                firing_rate=round(float(stats.firing_rate[row]), 6),
                quantiles={name: round(float(values[row]), 4) for name, values in stats.quantiles.items()},
                top_tokens=_top_tokens(found, frequency),
                examples=tuple(e for _, e in _spread(found)),
            )
        )
    return lines


def _favoured_domain(rows: NDArray[np.int64], heads: Sequence[CalibratedHead]) -> dict[int, str]:
    """By latent, the domain whose head it speaks for most strongly; absent where it only speaks against."""
    head_weights, _ = weight_matrices(rows, heads, 1)
    best = head_weights.argmax(axis=0)
    return {
        int(row): heads[head].section.domain
        for row, head, column in zip(rows, best, head_weights.T, strict=True)
        if column[head] > 0
    }


def _domains(row: int, by_domain: dict[str, NDArray[np.float32]], favoured: dict[int, str]) -> tuple[str, ...]:
    """The domains whose concept it tells from its absence; where there is none, the one that its weight favours."""
    told = tuple(domain for domain, scores in by_domain.items() if scores[row] >= DOMAIN_CONTRAST)
    return told or ((favoured[row],) if row in favoured else ())


def _subdomain_scores(design: Design, pairs: Sequence[Pair]) -> dict[str, NDArray[np.float32]]:
    place = {row.id: i for i, row in enumerate(design.rows) if row.source == "own_pairs"}
    result = {}
    for name in dict.fromkeys(pair.subdomain for pair in pairs):
        ids = [pair.id for pair in pairs if pair.subdomain == name]
        with_ = design.fires[[place[f"{i}/with"] for i in ids]]
        without = design.fires[[place[f"{i}/without"] for i in ids]]
        result[name] = ((with_ & ~without).mean(axis=0) - (without & ~with_).mean(axis=0)).astype(np.float32)
    return result


def _examples(
    suite: Sequence[FullSae],
    rows: NDArray[np.int64],
    stats: LatentStats,
    texts: Sequence[Row],
    folder: Path,
    tokenizer: TextTokenizer,
) -> dict[int, list[tuple[str, ExampleLine]]]:
    """Tokens of the project's own texts on which each kept latent fires, `(token, example)`."""
    own = {i for i, row in enumerate(texts) if row.own}
    spans = {i: tokenizer.text(texts[i].text).spans for i in own}
    result: dict[int, list[tuple[str, ExampleLine]]] = {}
    for index in range(shards.described(folder).shard_count):
        shard = shards.load(folder, index)
        piece = shard["piece"].numpy()
        ours = np.flatnonzero(np.isin(piece, list(own)))
        if not len(ours):
            continue
        position = ours - np.searchsorted(piece, piece[ours])  # token number within its text; pieces are sorted
        offset = 0
        for sae in suite:
            local = rows[(rows >= offset) & (rows < offset + sae.width)]
            acts = sae.encode(shard[sae.hook_point][torch.from_numpy(ours)])[:, torch.from_numpy(local - offset)]
            for token, column in acts.nonzero().tolist():
                row, number = int(local[column]), int(piece[ours[token]])
                text = texts[number].text
                start, end = spans[number][int(position[token])]
                strength = round(float(acts[token, column]) / float(stats.scale[row]), 3)
                result.setdefault(row, []).append(
                    (text[start:end], ExampleLine(text=text, start=start, end=end, activation=strength))
                )
            offset += sae.width
    return result


def _top_tokens(found: Sequence[tuple[str, ExampleLine]], frequency: Counter[str]) -> tuple[str, ...]:
    """The tokens that hold most of the activation for how often they occur at all."""
    mass: dict[str, float] = {}
    for token, example in found:
        if token.strip():
            mass[_plain(token)] = mass.get(_plain(token), 0.0) + example.activation
    ranked = sorted(mass, key=lambda token: (-mass[token] / np.sqrt(frequency[token] + 1.0), token))
    return tuple(ranked[:_TOP_TOKENS])


def _plain(token: str) -> str:
    return token.strip().lower()


def _spread(found: Sequence[tuple[str, ExampleLine]]) -> list[tuple[str, ExampleLine]]:
    """The strongest examples, one of each text."""
    kept: dict[str, tuple[str, ExampleLine]] = {}
    for token, example in found:
        kept.setdefault(example.text, (token, example))
    return list(kept.values())[:_EXAMPLES]
