"""The search's stages as commands run them: contrast -> predict, and candidates; each reads and writes files."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pydantic import BaseModel

from guard.lab import labelled
from guard.lab.search import candidates as searching
from guard.lab.search import precision
from guard.lab.search import rank as ranking
from guard.lab.search.contrast import ALL, ConceptContrast, concept_contrasts
from guard.lab.search.detect import (
    DetectConfig,
    Detection,
    Prediction,
    correlations,
    detect,
    draw_prediction,
    judged_rows,
    make_folds,
)
from guard.lab.search.significance import Control
from guard.lab.search.surface import bound_to_language, token_use
from guard.lab.stages import Progress, read_rows, statistics, strengths
from guard.lab.suite.measure import read_reports
from guard.lab.suite.sae import load_suite


def contrast(
    *,
    saes: Path,
    texts: Path,
    out: Path,
    activations: Path | None = None,
    by: str = "i_cdf",
    progress: Progress = lambda _done, _all: None,
) -> tuple[list[ConceptContrast], list[ranking.CurvePoint], ranking.Ranking]:
    """The pre-explanation metric of every SAE over the project's contrast pairs.

    Writes `out/contrast.json` (every SAE and concept), `out/ranking.json` (the pick), and the curve against sparsity,
    `out/curve.json` and `out/curve.png`. `activations`, a corpus's, is needed on the first run, for the SAEs' scales.
    """
    suite, rows, reports = load_suite(saes), read_rows(texts), read_reports(saes) or []
    pairs = labelled.pairs()
    with_, without = searching.pair_rows(rows, pairs)
    pooled = strengths(suite, saes, texts, activations, progress)
    result: list[ConceptContrast] = []
    for sae, strength in zip(suite, pooled, strict=True):
        result += concept_contrasts(pairs, strength[with_] > 0, strength[without] > 0, sae.hook_point, sae.name)
    points = ranking.curve(reports, result)
    ranked = ranking.ranked(points, by)
    out.mkdir(parents=True, exist_ok=True)
    _write(out / "contrast.json", result)
    _write(out / "curve.json", points)
    (out / "ranking.json").write_text(ranked.model_dump_json(indent=1))
    ranking.draw_curve(points, out / "curve.png")
    return result, points, ranked


def predict(
    *,
    saes: Path,
    texts: Path,
    contrasted: Path,
    config: DetectConfig,
    progress: Progress = lambda _done, _all: None,
) -> Prediction:
    """Whether the metric that `contrast` left in `contrasted` goes with detection by each SAE's latents alone.

    Writes `prediction.json` and `prediction.png` there. Memory holds the strengths of one SAE, three times over.
    """
    suite, rows, reports = load_suite(saes), read_rows(texts), read_reports(saes) or []
    found = [ConceptContrast.model_validate(c) for c in json.loads((contrasted / "contrast.json").read_text())]
    kept = judged_rows(rows)
    judged = [rows[i] for i in kept]
    folds = make_folds(judged, config.folds)
    detections: list[Detection] = []
    for sae, strength in zip(suite, strengths(suite, saes, texts), strict=True):
        detections.append(detect(sae.name, judged, strength[kept], folds, config))
        progress(len(detections), len(suite))
    targets = [ALL, *detections[0].by_domain]
    points = {target: ranking.curve(reports, found, target) for target in targets}
    prediction = Prediction(
        latents=config.latents,
        c=config.c,
        iterations=config.iterations,
        folds=[sorted(g for g, fold in folds.items() if fold == i) for i in range(config.folds)],
        rows=len(judged),
        detections=detections,
        correlations=correlations(points, detections),
    )
    (contrasted / "prediction.json").write_text(prediction.model_dump_json(indent=1))
    draw_prediction(points[ALL], prediction, contrasted / "prediction.png")
    return prediction


def candidates(
    *,
    saes: Path,
    texts: Path,
    out: Path,
    names: Sequence[str] = (),
    activations: Path | None = None,
    fdr: float = 0.05,
    control: Control = "bh",
    surface_shards: int = 6,
    progress: Progress = lambda _done, _all: None,
) -> precision.Summary:
    """Safety latents of the named SAEs, or of all: writes `out` (JSON lines) and its neighbour `*.summary.json`.

    The texts of an SAE are read one SAE at a time. Raises InvalidInput for a name that the suite does not hold.
    """
    suite, rows = load_suite(saes, names or None), read_rows(texts)
    known = {report.name: report for report in read_reports(saes) or []}
    reports = [known[sae.name] for sae in suite]
    ground = searching.Ground(rows, labelled.pairs())
    pooled = strengths(suite, saes, texts, activations, progress)
    answers = []
    for strength in pooled:
        answers.append(ground.answers(strength))
        progress(len(answers), len(suite))
    q = {
        part: searching.family_q(reports, ground.questions, [a[part] for a in answers], control)
        for part in searching.PARTS
    }
    chosen = [np.flatnonzero((found <= fdr).any(axis=0)) for found in q["all"]]
    uses = token_use(suite, chosen, texts, surface_shards, progress)
    result: list[searching.Candidate] = []
    for i, sae in enumerate(suite):
        with_, without = ground.fires(pooled[i])
        result += searching.lines(
            reports[i],
            ground.questions,
            answers[i]["all"],
            q["all"][i],
            chosen[i],
            fdr=fdr,
            langs=bound_to_language(ground.pairs, with_[:, chosen[i]], without[:, chosen[i]]),
            use=uses[i] if uses else None,
            firing_rate=statistics(sae, saes, activations).firing_rate,
        )
    summary = precision.Summary(
        fdr=fdr,
        control=control,
        saes=[sae.name for sae in suite],
        pairs=len(ground.pairs),
        strata={f"{d}.{kind.value}": [name for name, *_ in found] for (d, kind), found in ground.strata.items()},
        halves={
            part: sorted(g for g, half in ground.half_of.items() if half == i)
            for i, part in enumerate(("first", "second"))
        },
        tokens_known=uses is not None,
        counts=precision.counts(reports, result, ground.questions),
        precision=precision.precision(reports, ground, answers, q, fdr),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(candidate.model_dump_json() + "\n" for candidate in result), encoding="utf-8")
    out.with_suffix(".summary.json").write_text(summary.model_dump_json(indent=1))
    return summary


def _write(file: Path, lines: Sequence[BaseModel]) -> None:
    file.write_text(json.dumps([line.model_dump() for line in lines], indent=1))
